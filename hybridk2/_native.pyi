"""What csrc/bindings.cc gives Python. Tensors are addresses: experts/host.py checks them first."""

READ_LOOPS: tuple[str, ...]

class ConfigurationError(ValueError): ...
class StateError(RuntimeError): ...
class OutOfMemoryError(MemoryError): ...

class Ticket:
    @property
    def done(self) -> bool: ...
    def wait(self) -> None: ...
    def finish(self) -> None: ...

class Experts:
    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        hidden: int,
        intermediate: int,
        isa: str,
        threads: int,
        huge_pages: bool,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def huge_pages(self) -> bool: ...
    @property
    def weight_bytes(self) -> int: ...
    def load(
        self,
        layer: int,
        expert: int,
        gate: tuple[int, int],
        up: tuple[int, int],
        down: tuple[int, int],
        /,
    ) -> None: ...
    def dequantise(self, layer: int, expert: int, gate: int, up: int, down: int, /) -> None: ...
    def submit(
        self,
        layer: int,
        num_tokens: int,
        top_k: int,
        x: int,
        bf16: bool,
        expert_ids: int,
        weights: int,
        out: int,
        /,
    ) -> Ticket: ...
    def read_weights_seconds(self, loop: int, /) -> float: ...
    def arithmetic_roof(self, bf16: bool, /) -> float: ...

def available_isas() -> list[str]: ...

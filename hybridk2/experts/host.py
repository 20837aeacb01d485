"""Routed experts in host memory.

Owns the packed INT4 weights and the queue to the C++ workers; the only file that imports the
extension. Knows nothing of CUDA or of files: it receives host tensors and returns host tensors, or
addresses of a device's, which handoff.py has checked. The caller (router.py) decides what overlaps
with what.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from hybridk2 import _native
from hybridk2.checkpoint import QuantizedLinear
from hybridk2.config import K2Config
from hybridk2.errors import ConfigError, EngineError, OutOfMemoryError
from hybridk2.placement import Mask

__all__ = [
    "HANDOFF_TOKENS",
    "READ_LOOPS",
    "CardPinning",
    "DeviceStream",
    "ExpertRegion",
    "Handoff",
    "HandoffMechanism",
    "HostExperts",
    "Ticket",
    "available_isas",
    "card_stream",
    "reserved_page_bytes",
    "usable_cores",
]

logger = logging.getLogger(__name__)

READ_LOOPS: tuple[str, ...] = tuple(_native.READ_LOOPS)

# Tokens that a handoff takes at once.
HANDOFF_TOKENS: int = _native.HANDOFF_TOKENS

HandoffMechanism = Literal["host-functions", "mailbox"]
# What a device does in order, as the extension sees it.
DeviceStream = _native.DeviceStream


def available_isas() -> list[str]:
    """Instruction sets whose kernels this machine can run, slowest first."""
    return list(_native.available_isas())


def usable_cores() -> int:
    """Physical cores that this process may run on, by its affinity and its cgroup's CPU set."""
    return _native.usable_cores()


def reserved_page_bytes() -> int:
    """What 1 GB pages that nobody has taken hold: room for weights, but no "available" memory."""
    return _native.free_gigabyte_pages() << 30


class ExpertRegion(NamedTuple):
    """Bytes of an expert in host memory. offset: where they begin in what `pack_expert` returns."""

    address: int
    bytes: int
    offset: int


class Ticket:
    """One submitted layer, to be given to `HostExperts.wait`.

    Keeps its tensors alive while workers use them: a ticket that nobody waits for is waited for
    when it is dropped.
    """

    def __init__(
        self, job: _native.Ticket, inputs: tuple[Tensor, Tensor, Tensor], out: Tensor
    ) -> None:
        self._job = job
        self._inputs = inputs
        self._out = out

    def __del__(self) -> None:
        self._job.finish()

    def times(self) -> tuple[float, float]:
        """When the workers began and ended, in seconds of time.perf_counter.

        Raises EngineError as long as they have not ended; after `HostExperts.wait` they have.
        """
        with _engine_errors():
            return self._job.times

    def result(self) -> Tensor:
        """Wait, then the layer's output; what failed in a worker is raised as the extension's."""
        self._job.wait()
        return self._out


class HostExperts:
    """All routed experts of the model, packed, with the threads that compute them.

    weight_bytes: what the packed weights occupy once all experts are loaded: 4.5 bits per weight.
    expert_bytes: of one expert.
    isa, threads: what runs. threads_of_node: on each NUMA node, which holds and computes its part
    of every expert. gigabyte_pages: 1 GB pages that weights lie in.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        hidden: int,
        intermediate: int,
        *,
        isa: str | None = None,
        threads: int | None = None,
        huge_pages: bool = True,
        simulated_nodes: int | None = None,
        elsewhere: Mask | None = None,
        spins_when_idle: bool = True,
    ) -> None:
        """Reserve the memory and start the threads.

        num_layers: MoE layers only; slot 0 is the first of them. hidden, intermediate: multiples of
        32. isa: one of `available_isas()`, or "amx_emulated", the slow portable twin of AMX, for
        tests; None for the one that the environment variable HYBRIDK2_ISA names, else the fastest.
        threads: None for one per physical core. huge_pages: 2 MB pages for the weights, and 1 GB
        pages as far as there are any reserved. simulated_nodes: for tests, so many NUMA nodes
        whatever this machine has; with fewer threads than nodes, here as on real ones, there is one
        node and a warning. elsewhere: (layers, experts), True where another place keeps and
        computes the expert, which then takes no memory here and cannot be loaded. spins_when_idle:
        threads look out for the next call for 0.2 ms before they sleep; say False where others
        compute on the same cores between calls, as torch does on a host without a card.

        Raises ConfigError for an instruction set or a shape that cannot be run and for more threads
        than the system lets us have, OutOfMemoryError with the bytes that were asked for.
        """
        for name, number in (("threads", threads), ("simulated_nodes", simulated_nodes)):
            if number is not None and number < 1:
                raise ConfigError(f"{name}: expected 1 or more, found {number}")
        if elsewhere is not None and elsewhere.shape != (num_layers, num_experts):
            raise ConfigError(
                f"elsewhere: expected {num_layers} layers of {num_experts} experts, found a mask "
                f"of shape {elsewhere.shape}"
            )
        self.hidden = hidden
        self.intermediate = intermediate
        with _engine_errors(argument_error=ConfigError):
            self._native: _native.Experts | None = _native.Experts(
                num_layers,
                num_experts,
                hidden,
                intermediate,
                isa or "",
                threads or 0,
                huge_pages,
                simulated_nodes or 0,
                [] if elsewhere is None else elsewhere.ravel().tolist(),
                spins_when_idle,
            )
        self.isa: str = self._native.isa
        self.threads: int = self._native.threads
        self.threads_of_node: tuple[int, ...] = tuple(self._native.threads_of_node)
        self.weight_bytes: int = self._native.weight_bytes
        self.expert_bytes: int = self._native.expert_bytes
        self.huge_pages: bool = self._native.huge_pages
        self.gigabyte_pages: int = self._native.gigabyte_pages
        logger.info("host experts: %s", self._description(spins_when_idle))
        for trouble in self._native.troubles:
            logger.warning("host experts: %s", trouble)

    @classmethod
    def of_model(cls, config: K2Config, **choices: Any) -> Self:
        """Room for all routed experts of a model. choices: what __init__ takes by name."""
        return cls(
            config.num_moe_layers,
            config.n_routed_experts,
            config.hidden_size,
            config.moe_intermediate_size,
            **choices,
        )

    def _description(self, spins_when_idle: bool) -> str:
        nodes = len(self.threads_of_node)
        on_nodes = f" on {nodes} NUMA nodes ({' + '.join(map(str, self.threads_of_node))})"
        pages = "2 MB pages" if self.huge_pages else "4 KB pages"
        if self.gigabyte_pages:
            pages = f"{self.gigabyte_pages} pages of 1 GB and {pages}"
        between_calls = "" if spins_when_idle else " that sleep between calls"
        return (
            f"{self.isa} kernels, {self.threads} threads{on_nodes if nodes > 1 else ''}"
            f"{between_calls}, {self.weight_bytes / 1e9:.1f} GB of weights in {pages}"
        )

    def load_expert(
        self,
        slot: int,
        expert: int,
        gate: QuantizedLinear,
        up: QuantizedLinear,
        down: QuantizedLinear,
    ) -> None:
        """Repack one expert. Any thread may call it; the matrices can be dropped afterwards.

        On several NUMA nodes the workers of each repack what they will read. gate, up:
        (intermediate, hidden); down: (hidden, intermediate). Raises EngineError for a wrong shape,
        dtype or place, or an expert that was loaded before.
        """
        self._check_matrices(f"layer slot {slot}, expert {expert}: ", gate, up, down)
        with _engine_errors():
            self._open().load(slot, expert, _addresses(gate), _addresses(up), _addresses(down))

    def pack_expert(
        self, gate: QuantizedLinear, up: QuantizedLinear, down: QuantizedLinear
    ) -> Tensor:
        """An expert in the layout of one node, for a place other than this memory, which is left as
        it is. Any thread may call it, and does the work.

        gate, up: (intermediate, hidden); down: (hidden, intermediate). Returns uint8
        (expert_bytes,): the strips of gate and up, then those of down (csrc/kernels/kernels.h).
        Raises EngineError for a wrong shape or dtype.
        """
        self._check_matrices("an expert to be packed: ", gate, up, down)
        packed = torch.empty(self.expert_bytes, dtype=torch.uint8)
        with _engine_errors():
            native = self._open()
            native.pack(_addresses(gate), _addresses(up), _addresses(down), packed.data_ptr())
        return packed

    def expert_regions(self, slot: int, expert: int) -> tuple[ExpertRegion, ...]:
        """Where a loaded expert lies in this memory, by ascending offset.

        On one NUMA node one region, on several at most two on each. Together they are what
        `pack_expert` returns, and stay where they are until `close`. A layer's experts follow each
        other on each node without gaps.

        Raises EngineError for an expert that is not here or not loaded.
        """
        with _engine_errors():
            return tuple(ExpertRegion(*region) for region in self._open().regions(slot, expert))

    def expert_weights(self, slot: int, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down of an expert as fp32, dequantised from what the kernels read.

        Exact: a 4-bit integer times a bf16 scale fits into fp32.
        """
        gate = torch.empty(self.intermediate, self.hidden)
        up = torch.empty(self.intermediate, self.hidden)
        down = torch.empty(self.hidden, self.intermediate)
        with _engine_errors():
            self._open().dequantise(slot, expert, gate.data_ptr(), up.data_ptr(), down.data_ptr())
        return gate, up, down

    def submit(self, slot: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Ticket:
        """Start one layer's routed experts; return before they are done. Any thread may call it.

        x: (tokens, hidden), bfloat16 or float32. With bfloat16, silu(gate x) * up x is rounded to
        bfloat16 before down; with float32 nothing is rounded. Sums are fp32 in both. expert_ids:
        (tokens, k) int32, -1 where another place computes that expert; an expert may stand twice in
        a row. weights: (tokens, k) float32. All three are contiguous CPU tensors and stay
        unmodified until `wait`.

        Raises EngineError, before any work starts, for tensors of another form, ids out of range
        and experts that are not loaded.
        """
        native = self._open()
        if x.dtype not in (torch.bfloat16, torch.float32):
            raise EngineError(f"x: expected bfloat16 or float32, found {x.dtype}")
        _check_tensor("x", x, x.dtype, (None, self.hidden))
        tokens = x.shape[0]
        _check_tensor("expert_ids", expert_ids, torch.int32, (tokens, None))
        top_k = expert_ids.shape[1]
        _check_tensor("weights", weights, torch.float32, (tokens, top_k))
        out = torch.empty(tokens, self.hidden)
        with _engine_errors():
            job = native.submit(
                slot,
                tokens,
                top_k,
                x.data_ptr(),
                x.dtype == torch.bfloat16,
                expert_ids.data_ptr(),
                weights.data_ptr(),
                out.data_ptr(),
            )
        return Ticket(job, (x, expert_ids, weights), out)

    def wait(self, ticket: Ticket) -> Tensor:
        """The layer's result: (tokens, hidden) float32, sum over k of weight_k * expert_k(x).

        On one instruction set bit for bit the same for a token whatever the threads, the NUMA
        nodes, the schedule and the other tokens of the call; AMX's tiles are no exception, as its
        kernels add in the tiles' order for every number of tokens.

        Raises EngineError or OutOfMemoryError when the work failed.
        """
        with _engine_errors():
            return ticket.result()

    def read_weights_seconds(self, loop: int) -> float:
        """Read all weights once with every thread and do nothing with them: the roof of decoding.

        loop: index into READ_LOOPS. Returns the seconds it took.
        """
        with _engine_errors():
            return self._open().read_weights_seconds(loop)

    def read_bytes_per_second(self) -> float:
        """Bytes/s of the fastest of several plain loops over all weights, measured now."""
        loops = range(len(READ_LOOPS))
        return self.weight_bytes / min(self.read_weights_seconds(loop) for loop in loops)

    def arithmetic_roof(self, dtype: torch.dtype) -> float | None:
        """FLOP/s of every thread multiplying in registers: the roof of calls with many tokens.

        The multiplications are those of the kernels for activations of dtype (bfloat16 or
        float32). None where these kernels have no such loop.
        """
        with _engine_errors():
            return self._open().arithmetic_roof(dtype == torch.bfloat16) or None

    def close(self) -> None:
        """Finish what was submitted, end the threads, free the weights. More calls do nothing."""
        self._native = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> _native.Experts:
        if self._native is None:
            raise EngineError("these host experts are closed")
        return self._native

    def _check_matrices(
        self, where: str, gate: QuantizedLinear, up: QuantizedLinear, down: QuantizedLinear
    ) -> None:
        self._check_matrix(f"{where}gate", gate, self.intermediate, self.hidden)
        self._check_matrix(f"{where}up", up, self.intermediate, self.hidden)
        self._check_matrix(f"{where}down", down, self.hidden, self.intermediate)

    @staticmethod
    def _check_matrix(name: str, matrix: QuantizedLinear, rows: int, columns: int) -> None:
        _check_tensor(f"{name}.packed", matrix.packed, torch.int32, (rows, columns // 8))
        _check_tensor(f"{name}.scale", matrix.scale, torch.bfloat16, (rows, columns // 32))


class Handoff:
    """Layers between a device and the experts, in the order of the device's stream; see
    csrc/handoff.h. stream: the driver's handle. Addresses are of contiguous tensors on the device,
    whose dtype, shape and lifetime the caller answers for. All calls raise EngineError.
    """

    def __init__(
        self,
        experts: HostExperts,
        stream: DeviceStream,
        mechanism: HandoffMechanism,
        top_k: int,
        dtype: torch.dtype,
        timeout_seconds: float,
    ) -> None:
        if dtype not in (torch.bfloat16, torch.float32):
            raise EngineError(f"handoff: expected bfloat16 or float32, found {dtype}")
        opened = {"mailbox": _native.open_mailbox, "host-functions": _native.open_host_functions}
        with _engine_errors():
            self._native: _native.Handoff | None = opened[mechanism](
                experts._open(), stream, top_k, dtype == torch.bfloat16, timeout_seconds
            )

    def begin_step(self, stream: int, submissions: int) -> None:
        with _engine_errors():
            self._open().begin_step(stream, submissions)

    def submit(
        self, stream: int, slot: int, tokens: int, x: int, expert_ids: int, weights: int
    ) -> None:
        with _engine_errors():
            self._open().submit(stream, slot, tokens, x, expert_ids, weights)

    def collect(self, stream: int, slot: int, tokens: int, out: int) -> None:
        with _engine_errors():
            self._open().collect(stream, slot, tokens, out)

    def end_step(self) -> None:
        with _engine_errors():
            self._open().end_step()

    def reset(self) -> None:
        with _engine_errors():
            self._open().reset()

    def close(self) -> None:
        """Wait for the device and the workers, free what both share. More calls do nothing."""
        self._native = None

    def _open(self) -> _native.Handoff:
        if self._native is None:
            raise EngineError("this handoff is closed")
        return self._native


def card_stream(index: int) -> DeviceStream:
    """The streams of an NVIDIA card, by its number, through its driver.

    Raises ConfigError where there is no driver, EngineError with what the driver says.
    """
    with _engine_errors():
        return _native.cuda_stream(index)


class CardPinning:
    """Keeps host memory in place for cards, through their driver. See stream.Pinning."""

    def pin(self, address: int, num_bytes: int) -> None:
        """Raises ConfigError where there is no driver, EngineError when it refuses."""
        with _engine_errors():
            _native.pin_host_memory(address, num_bytes)

    def unpin(self, address: int) -> None:
        with _engine_errors():
            _native.unpin_host_memory(address)


def _check_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> None:
    """Refuse a tensor that is not a contiguous CPU tensor of this dtype and shape (None: any)."""
    fits = len(shape) == tensor.dim() and all(
        expected is None or expected == found
        for expected, found in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype == dtype and fits and tensor.device.type == "cpu" and tensor.is_contiguous():
        return
    expected_shape = ", ".join("any" if size is None else str(size) for size in shape)
    layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
    raise EngineError(
        f"{name}: expected {dtype} ({expected_shape}), contiguous, on cpu; "
        f"found {tensor.dtype} {tuple(tensor.shape)}, {layout}, on {tensor.device.type}"
    )


def _addresses(matrix: QuantizedLinear) -> tuple[int, int]:
    return matrix.packed.data_ptr(), matrix.scale.data_ptr()


@contextmanager
def _engine_errors(argument_error: type[Exception] = EngineError) -> Iterator[None]:
    """Turn what the extension throws into the project's errors."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemoryError(str(error)) from error
    except _native.ConfigurationError as error:
        raise ConfigError(str(error)) from error
    except ValueError as error:
        raise argument_error(str(error)) from error
    except RuntimeError as error:
        raise EngineError(str(error)) from error

"""Where the dense part of the model computes, and how tensors cross to the host.

The model is written against `Device`; routed experts that are not on the card live on the host. The
only file that may say torch.cuda. Knows no model: which tensors lie where, who runs decides.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from hybridk2.config import DeviceName
from hybridk2.errors import ConfigError

logger = logging.getLogger(__name__)

# bf16 products and the kernels' instructions begin with Ampere.
_LEAST_CAPABILITY = (8, 0)


class CopyQueue(Protocol):
    """Copies to a device in an order of their own, beside its other work.

    A mark is a point in one of the two orders, for the other to wait for. All calls but `wait` only
    enqueue; they come from one thread.
    """

    def copy(self, target: Tensor, source: Tensor) -> None:
        """target's values, on the device, become source's, which must not change before `wait` or
        work that waits for a later mark. Both uint8, contiguous and of one size."""

    def mark_copies(self) -> Any:
        """The point at which all copies so far have been done."""

    def mark_work(self) -> Any:
        """The point at which all other work so far has been done."""

    def work_waits(self, mark: Any) -> None:
        """Other work that is given from now on begins after `mark`, of copies."""

    def copies_wait(self, mark: Any) -> None:
        """Copies that are given from now on begin after `mark`, of other work."""

    def wait(self) -> None:
        """Return once all copies have been done."""


class Device(Protocol):
    """A place for weights, caches and dense arithmetic.

    Work is done in the order in which it was given, perhaps later than the call returns: results
    may be read on the host after `wait`, or through `to_host`.

    name: for a person. capability: the card's compute capability; (0, 0) for the host. decode_rows:
    numbers of rows that a step of decoding may have, ascending. has_kernels: Triton's run here;
    where they do not, attention and experts are computed with torch and on the host.
    multiprocessors: what kernels divide their work among. program_bytes: shared memory that one
    program of a kernel may have. replays_steps: `record` is worth its while.
    """

    name: str
    torch_device: torch.device
    capability: tuple[int, int]
    decode_rows: tuple[int, ...]
    has_kernels: bool
    multiprocessors: int
    program_bytes: int
    replays_steps: bool

    def place(self, tensor: Tensor) -> Tensor:
        """The same values on this device; no copy when they are there already."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """The same values, contiguous in host memory, ready to be read by the host's workers."""

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros in host memory from which, and into which, `copy` need not wait."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """target's values become source's, in order with the other work. One is on the device, the
        other a `host_buffer`, which must not change, or be read, before `wait`."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """What does `step`'s work again whenever it is called, on the same tensors, without Python.

        step: enqueues work and reads nothing back; it is called once, and nothing of what it
        enqueues then is done. It must have run before. What it allocates stays its own. Raises
        RuntimeError for a step that cannot be recorded.
        """

    def wait(self) -> None:
        """Return once all work that was given has been done. Raises what failed of it."""

    def stream(self) -> int:
        """The handle of the queue that work is given to now, as the driver takes it; 0 for none."""

    def memory_bytes(self) -> tuple[int, int] | None:
        """Free and all bytes of the device's own memory; None where that is the host's."""

    def copy_queue(self) -> CopyQueue:
        """A new queue for copies to this device."""

    def short_products(self) -> AbstractContextManager[None]:
        """Meanwhile products of fp32 matrices take factors of up to 11 significant bits, exactly,
        where that is faster; longer ones are rounded to them. Sums stay fp32."""


class CpuDevice:
    """The host itself: tensors cross without a copy, and work is done when a call returns."""

    name = "cpu"
    torch_device = torch.device("cpu")
    capability = (0, 0)
    # torch compiles a product for each number of rows, so there are few: alone, or in company.
    decode_rows: tuple[int, ...] = (1, 8)
    has_kernels = False
    multiprocessors = 1
    program_bytes = 0
    replays_steps = False

    def place(self, tensor: Tensor) -> Tensor:
        return tensor

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous()

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        return step

    def wait(self) -> None:
        return None

    def stream(self) -> int:
        return 0

    def memory_bytes(self) -> tuple[int, int] | None:
        return None

    def copy_queue(self) -> CopyQueue:
        return InlineCopyQueue()

    def short_products(self) -> AbstractContextManager[None]:
        return nullcontext()


class InlineCopyQueue:
    """Copies that are done when the call returns, so that nobody has to wait for them."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def mark_copies(self) -> None:
        return None

    def mark_work(self) -> None:
        return None

    def work_waits(self, mark: None) -> None:
        return None

    def copies_wait(self, mark: None) -> None:
        return None

    def wait(self) -> None:
        return None


class CudaDevice:
    """One NVIDIA card. All work goes to the stream that is current, in any thread the default one;
    a step is recorded as a CUDA graph."""

    decode_rows: tuple[int, ...] = (1, 2, 4, 8)
    has_kernels = True
    replays_steps = True

    def __init__(self, index: int = 0) -> None:
        self.torch_device = torch.device("cuda", index)
        self.name = f"cuda ({torch.cuda.get_device_name(index)})"
        self.capability: tuple[int, int] = torch.cuda.get_device_capability(index)
        properties = torch.cuda.get_device_properties(index)
        self.multiprocessors: int = properties.multi_processor_count
        # Since torch 2.7, but not in its stubs.
        self.program_bytes: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        # Recorded steps are replayed one at a time, so they share the memory of what is between. A
        # mere handle would be of no more use once all steps that had it are gone.
        self._pool = torch.cuda.MemPool()

    def place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.torch_device)

    def to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        self.wait()
        return host

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that load or serve, may call CUDA meanwhile.
        pool: Any = self._pool.id
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
        return graph.replay

    def wait(self) -> None:
        _sleep_until_done(torch.cuda.current_stream(self.torch_device))

    def stream(self) -> int:
        return torch.cuda.current_stream(self.torch_device).cuda_stream

    def memory_bytes(self) -> tuple[int, int] | None:
        return torch.cuda.mem_get_info(self.torch_device)

    def copy_queue(self) -> CopyQueue:
        return CudaCopyQueue(self.torch_device)

    @contextmanager
    def short_products(self) -> Iterator[None]:
        # "high" is TF32 on cards: 8 bits of exponent as fp32 has, and 11 significant bits.
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


class CudaCopyQueue:
    """Copies on a stream of their own. They run beside kernels if their sources are pinned."""

    def __init__(self, torch_device: torch.device) -> None:
        self._torch_device = torch_device
        self._stream = torch.cuda.Stream(torch_device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark_copies(self) -> torch.cuda.Event:
        return self._stream.record_event()

    def mark_work(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._torch_device).record_event()

    def work_waits(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._torch_device).wait_event(mark)

    def copies_wait(self, mark: torch.cuda.Event) -> None:
        self._stream.wait_event(mark)

    def wait(self) -> None:
        _sleep_until_done(self._stream)


def _sleep_until_done(stream: torch.cuda.Stream) -> None:
    """Return once the stream has done all that it was given. Raises what failed of it.

    The driver would spin. But every core may have a pinned worker that computes experts, and one
    whose core is taken keeps all others waiting, 4 ms at a time: a step of 60 layers took 490 ms
    so, and takes 195 ms like this (H100 beside 16 cores).
    """
    done = torch.cuda.Event(blocking=True)
    done.record(stream)
    done.synchronize()


def select_device(name: DeviceName) -> Device:
    """The device of that name; "auto" takes a card that can be used, else the host.

    Raises ConfigError when "cuda" is asked for and cannot be used, with what is in the way.
    """
    if name == "cpu":
        return CpuDevice()
    obstacle = _cuda_obstacle()
    if obstacle is None:
        return CudaDevice()
    if name == "cuda":
        raise ConfigError(f"device cuda: {obstacle}, or use --device cpu")
    # Whoever installed a torch for the CPU knows that; whoever did not may wonder.
    level = logging.WARNING if torch.backends.cuda.is_built() else logging.DEBUG
    logger.log(level, "no card is used: %s", obstacle)
    return CpuDevice()


def _cuda_obstacle() -> str | None:
    """Why no card can be used, and what to do about it; None if one can."""
    if not torch.backends.cuda.is_built():
        return (
            f"torch {torch.__version__} was built without CUDA. Install a CUDA build of torch "
            "into this environment"
        )
    try:
        torch.cuda.init()
    except RuntimeError as error:
        # torch tells a missing driver, one that is too old and no card apart.
        reason = str(error).strip().split("\n")[0].rstrip(".")
        return f"no card can be reached: {reason}. Check `nvidia-smi`"
    capability = torch.cuda.get_device_capability(0)
    if capability < _LEAST_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, _LEAST_CAPABILITY))
        return (
            f"{torch.cuda.get_device_name(0)} has compute capability {found}; {least} or newer is "
            "needed (an A100, an RTX 30 or later). Use such a card"
        )
    if importlib.util.find_spec("triton") is None:
        return "Triton is missing, which brings the kernels. Run `pip install triton`"
    return None

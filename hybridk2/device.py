"""Where the dense part of the model computes, and how tensors cross to the host.

The model is written against `Device`; routed experts that are not on the card live on the host. The
only file that may say torch.cuda. Knows no model: which tensors lie where, who runs decides.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hybridk2.config import DeviceName
from hybridk2.errors import ConfigError

logger = logging.getLogger(__name__)

# bf16 products and the kernels' instructions begin with Ampere.
_LEAST_CAPABILITY = (8, 0)


class Device(Protocol):
    """A place for weights, caches and dense arithmetic.

    Work is done in the order in which it was given, perhaps later than the call returns: results
    may be read on the host after `wait`, or through `to_host`.

    name: for a person. decode_rows: numbers of rows that a step of decoding may have, ascending.
    has_kernels: Triton's run here; where they do not, attention and experts are computed with torch
    and on the host. multiprocessors: what kernels divide their work among. replays_steps: `record`
    is worth its while.
    """

    name: str
    torch_device: torch.device
    decode_rows: tuple[int, ...]
    has_kernels: bool
    multiprocessors: int
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


class CpuDevice:
    """The host itself: tensors cross without a copy, and work is done when a call returns."""

    name = "cpu"
    torch_device = torch.device("cpu")
    # torch compiles a product for each number of rows, so there are few: alone, or in company.
    decode_rows: tuple[int, ...] = (1, 8)
    has_kernels = False
    multiprocessors = 1
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


class CudaDevice:
    """One NVIDIA card. All work goes to the stream that is current, in any thread the default one;
    a step is recorded as a CUDA graph."""

    decode_rows: tuple[int, ...] = (1, 2, 4, 8)
    has_kernels = True
    replays_steps = True

    def __init__(self, index: int = 0) -> None:
        self.torch_device = torch.device("cuda", index)
        self.name = f"cuda ({torch.cuda.get_device_name(index)})"
        self.multiprocessors: int = torch.cuda.get_device_properties(index).multi_processor_count
        # Recorded steps are replayed one at a time, so they share the memory of what is between.
        self._pool = torch.cuda.graph_pool_handle()

    def place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.torch_device)

    def to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(self.torch_device).synchronize()
        return host

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that load or serve, may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        return graph.replay

    def wait(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def stream(self) -> int:
        return torch.cuda.current_stream(self.torch_device).cuda_stream

    def memory_bytes(self) -> tuple[int, int] | None:
        return torch.cuda.mem_get_info(self.torch_device)


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

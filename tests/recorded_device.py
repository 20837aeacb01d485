"""A device without a card that records steps as a card does: operations on tensors, not Python.

What ran while a step was recorded is done again on the same memory; neither Python variables nor
anything but those tensors is looked at. A step that reads a value back to the host cannot be
recorded, and whatever a recorded step left behind is poisoned before it runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridk2.device import CpuDevice
from hybridk2.experts.host import HostExperts
from hybridk2.experts.router import ThreadRouter

# What reads a value of a tensor, or asks for its memory, in the middle of a step.
_READS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal")


@dataclass
class _Recording(TorchDispatchMode):
    """The operations of one step, in order, with what each made."""

    replays: list[Callable[[], None]] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.name in _READS:
            raise RuntimeError(f"{func._schema.name} reads back to the host while recording")
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = _memory_of((args, kwargs))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        fresh = [leaf for leaf in made if leaf.untyped_storage().data_ptr() not in inputs]
        self.made += fresh

        def replay() -> None:
            again = [
                leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)
            ]
            for target, source in zip(made, again, strict=True):
                if any(target is leaf for leaf in fresh):
                    target.copy_(source)

        self.replays.append(replay)
        return result

    def run(self) -> None:
        for tensor in self.made:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        for replay in self.replays:
            replay()


def _memory_of(values: Any) -> set[int]:
    leaves = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    return {leaf.untyped_storage().data_ptr() for leaf in leaves}


class RecordedDevice(CpuDevice):
    """CpuDevice with memory of its own, buckets of a card, and steps that are recorded.

    recorded: how many steps were. replayed: how often one of them ran again.
    """

    name = "recorded"
    decode_rows = (1, 2, 4, 8)
    replays_steps = True

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0
        self.refuse: Exception | None = None
        self._recording: _Recording | None = None

    @property
    def is_recording(self) -> bool:
        return self._recording is not None

    def place(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def to_host(self, tensor: Tensor) -> Tensor:
        if self._recording is not None:
            raise RuntimeError("to_host while recording")
        return tensor.clone()

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    def enqueue(self, work: Callable[[], None]) -> None:
        """Work that is no operation on tensors: now, and again in every replay."""
        if self._recording is None:
            work()
        else:
            self._recording.replays.append(work)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        if self.refuse is not None:
            raise self.refuse
        self._recording = recording = _Recording()
        try:
            with recording:
                step()
        finally:
            self._recording = None
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            recording.run()

        return replay


@dataclass(frozen=True)
class _Sum:
    out: Tensor


class EnqueuedRouter(ThreadRouter):
    """The host's experts as work in the device's order: what a mailbox does, without one."""

    records = True

    def __init__(self, experts: HostExperts, device: RecordedDevice) -> None:
        super().__init__(experts, device)
        self._recorded_device = device
        self.steps = 0
        self.failing: Exception | None = None
        self._failed: Exception | None = None
        self._open = False

    def submit(self, slot: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Any:
        recording = self._recorded_device.is_recording
        assert self._open != recording, "in a step, or recorded before one"
        out = torch.zeros(x.shape, dtype=torch.float32)

        def work() -> None:
            if self.failing is not None:
                self._failed, self.failing = self.failing, None
            inputs = (x.contiguous(), expert_ids.contiguous(), weights.contiguous())
            out.copy_(self._experts.wait(self._experts.submit(slot, *inputs)))

        self._recorded_device.enqueue(work)
        return _Sum(out)

    def collect(self, pending: Any) -> Tensor:
        return pending.out

    def begin_step(self) -> None:
        assert not self._open
        self._open = True

    def end_step(self) -> None:
        self._open = False
        self.steps += 1
        if self._failed is not None:
            error, self._failed = self._failed, None
            raise error

    def reset(self) -> None:
        self._open = False
        self._failed = None


def mix_pages(
    q: Tensor, latents: Tensor, page_table: Tensor, lengths: Tensor, *, scale: float, rank: int
) -> Tensor:
    """Attention over pages with torch alone, as the kernel is to do it: see attention.PagedMix.

    Looks at every position that the page table has room for, so that nothing depends on a value.
    """
    keys = latents[page_table.long()].flatten(1, 2).float()  # (rows, positions, latent_dim)
    positions = torch.arange(keys.shape[1])
    seen = positions[None] < lengths[:, None]
    # Memory that nobody wrote may hold anything, NaN too.
    keys = torch.where(seen[..., None], keys, 0.0)
    scores = torch.einsum("rhd,rpd->rhp", q.float(), keys) * scale
    scores = torch.where(seen[:, None], scores, float("-inf"))
    largest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(largest.isinf(), 0.0, largest))
    total = weights.sum(-1, keepdim=True)
    mixed = torch.einsum("rhp,rpv->rhv", weights, keys[..., :rank])
    return torch.where(total > 0, mixed / total, 0.0)

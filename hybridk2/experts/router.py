"""The crossing between the device and the routed experts on the host.

`submit` hands a layer's tokens to the host's workers and returns at once; `collect` brings their
sum back. What runs in between on the device (the shared expert) overlaps with the host. Owns the
order of the crossing, not the arithmetic on either side. Here are the interface and the crossings
that wait in Python; handoff.py has those that only enqueue work for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hybridk2.device import Device
from hybridk2.experts.host import HostExperts, Ticket

# An expert id that stands for one which another place computes.
HOST_SHARE = -1


@dataclass(frozen=True)
class PendingExperts:
    """A submitted layer. Holds the tensors that the workers read until they are collected.

    slot: the layer's index among the MoE layers. inputs: activations, expert ids, weights.
    """

    slot: int
    inputs: tuple[Tensor, Tensor, Tensor]

    def times(self) -> tuple[float, float] | None:
        """Once it is collected: when the workers began and ended, in seconds of
        time.perf_counter; None where the crossing does not tell."""
        return None


class AsyncRouter(ABC):
    """Submits and collects the host's share of each MoE layer for one device.

    A step is a number of submissions between `begin_step` and `end_step`; what was submitted first
    is collected first. name: how a person chooses this crossing. records: submit and collect only
    enqueue work for the device, so that a step can be recorded; replaying it takes `begin_step` and
    `end_step` and nothing else. Calls come from one thread at a time.
    """

    name: ClassVar[str]
    records: ClassVar[bool] = False

    @abstractmethod
    def submit(self, slot: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> PendingExperts:
        """Start the routed experts of one MoE layer.

        slot: index among the MoE layers. x: (tokens, hidden) in the activation dtype. expert_ids:
        (tokens, top_k) int32, HOST_SHARE where another place computes that expert. weights:
        (tokens, top_k) fp32. The caller must not change them before `collect`.

        Raises EngineError for what cannot be submitted.
        """

    @abstractmethod
    def collect(self, pending: PendingExperts) -> Tensor:
        """The weighted sum of the layer's routed experts: (tokens, hidden) fp32 on the device.

        Raises EngineError with what failed in a worker, unless `records`: then `end_step` does.
        """

    def begin_step(self) -> None:
        """Before the first submit of a step, or before a recorded one is replayed.

        Raises EngineError after a step that failed and was not `reset`.
        """
        return

    def end_step(self) -> None:
        """After the device has done the step. Raises EngineError with what failed in it."""
        return

    def reset(self) -> None:
        """After a step that failed or was left: forget it, and be ready for the next.

        Raises EngineError while the workers are still busy with it; then it may be called again.
        """
        return

    def close(self) -> None:
        """Give back what the crossing took, before the experts are closed; no call after it."""
        return


@dataclass(frozen=True)
class _Computed(PendingExperts):
    result: Tensor


class InlineRouter(AsyncRouter):
    """`submit` returns when the experts are done: nothing overlaps. What others are compared to."""

    name = "inline"

    def __init__(self, experts: HostExperts, device: Device) -> None:
        self._experts = experts
        self._device = device

    def submit(self, slot: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> PendingExperts:
        inputs = _on_host(self._device, x, expert_ids, weights)
        result = self._experts.wait(self._experts.submit(slot, *inputs))
        return _Computed(slot, inputs, self._device.place(result))

    def collect(self, pending: PendingExperts) -> Tensor:
        assert isinstance(pending, _Computed)
        return pending.result


@dataclass(frozen=True)
class _Submitted(PendingExperts):
    ticket: Ticket

    def times(self) -> tuple[float, float] | None:
        return self.ticket.times()


class ThreadRouter(AsyncRouter):
    """The workers' thread computes while this one enqueues; `submit` and `collect` wait for the
    device. For a device that is the host, and for many tokens on any."""

    name = "thread"

    def __init__(self, experts: HostExperts, device: Device) -> None:
        self._experts = experts
        self._device = device

    def submit(self, slot: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> PendingExperts:
        inputs = _on_host(self._device, x, expert_ids, weights)
        return _Submitted(slot, inputs, self._experts.submit(slot, *inputs))

    def collect(self, pending: PendingExperts) -> Tensor:
        assert isinstance(pending, _Submitted)
        return self._device.place(self._experts.wait(pending.ticket))


def _on_host(
    device: Device, x: Tensor, expert_ids: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return device.to_host(x), device.to_host(expert_ids), device.to_host(weights)

"""The crossing between the device and the routed experts on the host.

`submit` hands a layer's tokens to the host's workers and returns at once; `collect` brings their
sum back. What runs in between on the device (the shared expert) overlaps with the host. Owns the
order of the crossing, not the arithmetic on either side.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybridk2.device import Device
from hybridk2.experts.host import HostExperts, Ticket

# An expert id that stands for one which another place computes.
HOST_SHARE = -1


@dataclass(frozen=True)
class PendingExperts:
    """A submitted layer. Holds the tensors that the workers read until they are collected."""

    ticket: Ticket
    inputs: tuple[Tensor, Tensor, Tensor]


class AsyncRouter:
    """Submits and collects the host's share of each MoE layer for one device.

    records: submit and collect only enqueue work for the device, so that a step can be recorded.
    """

    records = False

    def __init__(self, experts: HostExperts, device: Device) -> None:
        self._experts = experts
        self._device = device

    def submit(self, slot: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> PendingExperts:
        """Start the routed experts of one MoE layer.

        slot: index among the MoE layers. x: (tokens, hidden) in the activation dtype. expert_ids:
        (tokens, top_k) int32, -1 where another place computes that expert. weights: (tokens,
        top_k) fp32. The caller must not change them before `collect`.
        """
        inputs = (
            self._device.to_host(x),
            self._device.to_host(expert_ids),
            self._device.to_host(weights),
        )
        return PendingExperts(self._experts.submit(slot, *inputs), inputs)

    def collect(self, pending: PendingExperts) -> Tensor:
        """The weighted sum of the layer's routed experts: (tokens, hidden) fp32 on the device.

        Raises EngineError with what failed in a worker.
        """
        return self._device.place(self._experts.wait(pending.ticket))

    def begin_step(self) -> None:
        """Before the first submit of a step, or before a recorded one is replayed."""

    def end_step(self) -> None:
        """After the device has done the step. Raises EngineError with what failed in it."""

    def reset(self) -> None:
        """After a step that failed: forget it, and be ready for the next."""

"""The routed experts of a prompt's chunk, computed by the host and the device at once.

Owns the orchestration of one MoE layer: who computes what (`prefill_split` says), the host's share
through a router, the device's share expert by expert, streamed or resident, and the order of sums.
Does not know how a card unpacks panels: that is given to it.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hybridk2.device import Device
from hybridk2.experts import panels
from hybridk2.experts.resident import ResidentExperts
from hybridk2.experts.router import HOST_SHARE, AsyncRouter, PendingExperts
from hybridk2.experts.stream import ExpertStream
from hybridk2.prefill_split import ExpertCosts, Split, split


class Dequantise(Protocol):
    """One expert's panels as matrices; as `panels.dequantise`, of which cards have a kernel."""

    def __call__(
        self,
        panel: Tensor,
        *,
        hidden: int,
        intermediate: int,
        gate_up_out: Tensor,
        down_out: Tensor,
    ) -> None: ...


class ExpertProducts:
    """One expert at a time for many rows: unpacked into scratch memory, then torch's products.

    Nothing is rounded that the host does not round. A value of a panel has 11 significant bits at
    most and an activation in bf16 has 8, so that fp32 matrices hold them exactly and so do a card's
    products of 11 bits (TF32), at half the speed of bf16, which would round every weight. As long
    as experts come over a bus, the bus takes longer than either.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        device: Device,
        dequantise: Dequantise = panels.dequantise,
    ) -> None:
        self._shape = {"hidden": hidden, "intermediate": intermediate}
        self._device = device
        self._dequantise = dequantise
        place = device.torch_device
        self._gate_up = torch.empty(2 * intermediate, hidden, device=place)
        self._down = torch.empty(hidden, intermediate, device=place)

    @property
    def num_bytes(self) -> int:
        """Of the device's memory, for one expert's matrices."""
        return self._gate_up.nbytes + self._down.nbytes

    def __call__(self, panel: Tensor, x: Tensor) -> Tensor:
        """panel: uint8 (expert_bytes,); x: (rows, hidden), bf16 or fp32, both on the device.
        Returns down(silu(gate x) * up x): (rows, hidden) fp32."""
        self._dequantise(panel, **self._shape, gate_up_out=self._gate_up, down_out=self._down)
        is_short = x.dtype == torch.bfloat16
        with self._device.short_products() if is_short else nullcontext():
            return panels.swiglu_expert(x, self._gate_up, self._down)


@dataclass(frozen=True)
class PendingChunk(PendingExperts):
    """A submitted layer of which the device has a share. host: the host's part of it. device_sum:
    (tokens, hidden) fp32. is_shared: the host has a share as well."""

    host: PendingExperts
    device_sum: Tensor
    is_shared: bool

    def times(self) -> tuple[float, float] | None:
        return self.host.times()


class PrefillExperts(AsyncRouter):
    """A router for chunks of prompts, whose experts are computed in two places at once.

    A token's sum is the host's share plus the device's, each added in ascending order of experts in
    fp32, so its bits depend on who computes what and on nothing else; where the host computes all,
    they are those of the host's router. last_split: of the layer submitted last.
    """

    def __init__(
        self,
        host: AsyncRouter,
        device: Device,
        stream: ExpertStream,
        products: ExpertProducts,
        costs: ExpertCosts,
        num_experts: int,
        resident: ResidentExperts | None = None,
    ) -> None:
        """host: the router to the host's experts. costs: of an expert in each place, measured.
        num_experts: of a layer. resident: those that live on the device, which the host lacks or
        leaves to it."""
        self._host = host
        self._device = device
        self._stream = stream
        self._products = products
        self._costs = costs
        self._num_experts = num_experts
        self._resident = resident
        self.last_split: Split | None = None

    def submit(self, slot: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> PendingExperts:
        """Start one MoE layer; see AsyncRouter.submit. Waits for expert_ids, not for any expert."""
        ids = self._device.to_host(expert_ids).numpy()
        counts = np.bincount(ids[ids != HOST_SHARE], minlength=self._num_experts)
        nobody = np.zeros(self._num_experts, bool)
        at_home = nobody if self._resident is None else self._resident.mask()[slot]
        chosen = self.last_split = split(counts, at_home, self._costs)
        experts = sorted((*chosen.streamed, *chosen.resident))
        if not experts:
            return self._host.submit(slot, x, expert_ids, weights)
        on_device = nobody.copy()
        on_device[experts] = True
        host_ids = torch.from_numpy(np.where(on_device[ids], np.int32(HOST_SHARE), ids))
        # The host begins first: giving the device its share takes the caller some time.
        rows = slice(None) if chosen.host else slice(0)
        pending = self._host.submit(slot, x[rows], host_ids[rows], weights[rows])
        device_sum = self._sum_on_device(slot, x, ids, weights, chosen, experts)
        return PendingChunk(slot, pending.inputs, pending, device_sum, bool(chosen.host))

    def collect(self, pending: PendingExperts) -> Tensor:
        """The weighted sum of the layer's routed experts: (tokens, hidden) fp32 on the device."""
        if not isinstance(pending, PendingChunk):
            return self._host.collect(pending)
        host_sum = self._host.collect(pending.host)
        return pending.device_sum.add_(host_sum) if pending.is_shared else pending.device_sum

    def _sum_on_device(
        self,
        slot: int,
        x: Tensor,
        ids: np.ndarray,
        weights: Tensor,
        chosen: Split,
        experts: list[int],
    ) -> Tensor:
        """Enqueue the experts of the device. ids: (tokens, k) on the host."""
        picks, ends = _picks_of(ids, experts)
        at = self._device.place(torch.from_numpy(picks))
        rows = at // ids.shape[1]
        factors = weights.flatten()[at].unsqueeze(1)
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        begin = 0
        with closing(self._panels(slot, chosen, experts)) as found:
            for panel, end in zip(found, ends, strict=True):
                mine = rows[begin:end]
                share = self._products(panel, x[mine])
                total.index_add_(0, mine, share.mul_(factors[begin:end]))
                begin = end
        return total

    def _panels(self, slot: int, chosen: Split, experts: list[int]) -> Generator[Tensor]:
        """The panels of the device's experts in ascending order, whatever way they come."""
        with closing(self._stream.panels(slot, chosen.streamed)) as streamed:
            for expert in experts:
                if self._resident is not None and self._resident.is_resident(slot, expert):
                    yield self._resident.panel(slot, expert)
                else:
                    passing, panel = next(streamed)
                    assert passing == expert
                    yield panel


def _picks_of(ids: np.ndarray, experts: list[int]) -> tuple[np.ndarray, list[int]]:
    """Where in ids.flatten() each of these experts, which are all picked, stands: the positions of
    all, expert by expert, and where each expert's end among them."""
    flat = ids.ravel()
    order = np.argsort(flat, kind="stable")
    in_order = flat[order]
    first = np.searchsorted(in_order, experts, side="left")
    last = np.searchsorted(in_order, experts, side="right")
    picks = np.concatenate([order[a:b] for a, b in zip(first, last, strict=True)])
    return picks, np.cumsum(last - first).tolist()

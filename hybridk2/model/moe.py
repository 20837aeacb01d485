"""Mixture of experts: the router, the routed experts through AsyncRouter, the shared expert.

The routing decision is taken here in fp32; who computes an expert and where is not known here, only
that some may live on the device and are asked there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridk2.checkpoint import MlpWeights, RouterWeights
from hybridk2.config import K2Config
from hybridk2.device import Device
from hybridk2.experts.router import HOST_SHARE, AsyncRouter, PendingExperts
from hybridk2.model.decode_batch import DecodeBatch
from hybridk2.model.layers import place_mlp, swiglu
from hybridk2.timeline import Phase, Timeline


class DeviceExperts(Protocol):
    """Routed experts that live on the device."""

    def split(self, slot: int, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Who computes which of a layer's picks: host_ids (tokens, top_k) int32, HOST_SHARE where
        the device does, and places for `compute`. HOST_SHARE stays what it is."""

    def compute(self, slot: int, x: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the device's share: (tokens, hidden) fp32."""

    def is_resident(self, slot: int, expert: int) -> bool:
        """Whether that expert lives on the device."""


@dataclass(frozen=True)
class RoutedExperts:
    """Who computes routed experts.

    decoding: the host's, in steps of decoding. prompts: all of them, in chunks of prompts; None for
    the same that decodes. resident: those that decoding finds on the device. deferred: so many of
    the experts of each decoded token, those of the lowest weights, are added a layer later than
    they should be; 0 is exact.
    """

    decoding: AsyncRouter
    prompts: AsyncRouter | None = None
    resident: DeviceExperts | None = None
    deferred: int = 0

    @property
    def of_prompts(self) -> AsyncRouter:
        return self.prompts or self.decoding


class TopKRouter:
    """Picks the experts of each token and their weights, in fp32 as the model was trained."""

    def __init__(self, config: K2Config, weights: RouterWeights, device: Device) -> None:
        self._top_k = config.num_experts_per_tok
        self._scaling_factor = config.routed_scaling_factor
        weight = device.place(weights.weight)
        # A card multiplies bf16 with fp32 sums; torch has no such product for the host.
        self._weight = weight.float() if weight.is_cpu else weight
        self._bias = device.place(weights.bias)
        self._has_kernels = device.has_kernels

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (tokens, hidden). Returns expert_ids (tokens, top_k) int32 and weights fp32.

        The bias moves the choice only; weights come from the sigmoid without it and are never
        recovered by subtraction, which cancels. A NaN score counts as the lowest, so the ids are
        always in range; the NaN itself stays in that token's weights.
        """
        scores = self._logits(x).sigmoid()
        choice = torch.nan_to_num(scores + self._bias, nan=float("-inf"))
        expert_ids = choice.topk(self._top_k, dim=-1).indices
        weights = scores.gather(-1, expert_ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self._scaling_factor
        return expert_ids.int(), weights

    def decode(self, x: Tensor, batch: DecodeBatch, slot: int) -> tuple[Tensor, Tensor]:
        """The same for a step of decoding, whose batch is told the picks of the layer in `slot`.

        x: (rows, hidden). Returns expert_ids with HOST_SHARE in padding, and weights.
        """
        picks = batch.picks[slot]
        if self._has_kernels:
            from hybridk2.model.triton import routing  # loads Triton

            return routing.pick_experts(
                self._logits(x),
                self._bias,
                batch.in_use,
                picks,
                scaling_factor=self._scaling_factor,
                nobody=HOST_SHARE,
            )
        expert_ids, weights = self(x)
        picks.copy_(expert_ids)
        return torch.where(batch.in_use, expert_ids, HOST_SHARE), weights

    def _logits(self, x: Tensor) -> Tensor:
        if self._weight.is_cpu:
            return F.linear(x.float(), self._weight)
        return torch.mm(x, self._weight.T, out_dtype=torch.float32)

    def identifying_values(self) -> tuple[Tensor, Tensor]:
        """The bias (experts,) and the first expert's row (hidden,), fp32: for fingerprints."""
        return self._bias, self._weight[0].float()


class MixtureOfExperts:
    """The feed-forward block of a MoE layer."""

    def __init__(
        self,
        config: K2Config,
        slot: int,
        router: RouterWeights,
        shared: MlpWeights,
        experts: RoutedExperts,
        device: Device,
        dtype: torch.dtype,
        int8: bool = False,
    ) -> None:
        """slot: index of the layer among the MoE layers. int8: the shared expert's form."""
        self.slot = slot
        self._layer = slot + config.first_k_dense_replace
        self._is_last = slot == config.num_moe_layers - 1
        self._shared = place_mlp(shared, device, dtype, int8)
        self._experts = experts
        self._device = device
        self.router = TopKRouter(config, router, device)
        # Over all calls, how many different experts each needed, and how many of them the host had.
        self.experts_read = 0
        self.host_experts_read = 0
        # Told the slot and the picks (tokens, top_k) of every decoded step; None: nobody asks.
        self.on_decode: Callable[[int, Tensor], None] | None = None

    def forward(self, x: Tensor, timeline: Timeline | None = None) -> Tensor:
        """A prompt's x: (tokens, hidden), normed, to routed sum + shared expert, in x's dtype.

        The shared expert runs on the device while the host computes. timeline: told what ran when.
        """
        expert_ids, weights = self.router(x)
        self._mark(timeline, "router")
        router = self._experts.of_prompts
        pending = router.submit(self.slot, x, expert_ids, weights)
        self._mark(timeline, "handoff")
        shared = self.shared_expert(x)
        self._count(self._device.to_host(expert_ids))
        self._mark(timeline, "shared expert")
        routed = router.collect(pending)
        self._mark(timeline, "waiting")
        self._tell_host_call(timeline, pending, expert_ids)
        return shared.add_(routed.to(x.dtype))

    def decode(
        self, x: Tensor, batch: DecodeBatch, timeline: Timeline | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same for a step of decoding, which is told the picks; nobody works for its padding.

        x: (rows, hidden), normed. Only enqueues work for the device, as far as the router does.
        Returns the shared expert's output in x's dtype, and the routed sum in fp32, to be rounded
        to it before the two are added: whoever adds them to more can do all of it at once.
        """
        expert_ids, weights = self.router.decode(x, batch, self.slot)
        self._mark(timeline, "router")
        resident, router = self._experts.resident, self._experts.decoding
        if resident is not None:
            expert_ids, places = resident.split(self.slot, expert_ids)
        now, later = self._defer(expert_ids, weights)
        pending = router.submit(self.slot, x, now, weights)
        sums = []
        if batch.deferred is not None:
            # Given to the host before `pending`, so waiting for it keeps nothing else waiting.
            sums.append(router.collect(batch.deferred))
        batch.deferred = None if later is None else router.submit(self.slot, x, later, weights)
        self._mark(timeline, "handoff")
        shared = swiglu(x, self._shared, has_kernels=self._device.has_kernels)
        if resident is not None:
            sums.append(resident.compute(self.slot, x, places, weights))
        self._mark(timeline, "shared expert")
        routed = router.collect(pending)
        for more in sums:
            routed = routed + more
        self._mark(timeline, "waiting")
        self._tell_host_call(timeline, pending, now)
        return shared, routed

    def _defer(self, expert_ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Picks to be computed in this layer, and those whose sum the next one may add."""
        if not self._experts.deferred or self._is_last:
            return expert_ids, None
        lowest = weights.topk(self._experts.deferred, dim=-1, largest=False).indices
        waits = torch.zeros_like(expert_ids, dtype=torch.bool).scatter_(1, lowest, True)
        return (
            torch.where(waits, HOST_SHARE, expert_ids),
            torch.where(waits, expert_ids, HOST_SHARE),
        )

    def note_decoded(self, expert_ids: Tensor) -> None:
        """Once a step of decoding is done: what it picked here, (tokens, top_k) on the host."""
        self._count(expert_ids)
        if self.on_decode is not None:
            self.on_decode(self.slot, expert_ids)

    def shared_expert(self, x: Tensor) -> Tensor:
        """The SwiGLU that every token passes. x: (tokens, hidden), normed."""
        return swiglu(x, self._shared)

    def _count(self, expert_ids: Tensor) -> None:
        picked = _different(expert_ids)
        self.experts_read += len(picked)
        resident = self._experts.resident
        self.host_experts_read += sum(
            resident is None or not resident.is_resident(self.slot, expert) for expert in picked
        )

    def _mark(self, timeline: Timeline | None, phase: Phase) -> None:
        if timeline is not None:
            timeline.mark(phase, self._layer)

    def _tell_host_call(
        self, timeline: Timeline | None, pending: PendingExperts, expert_ids: Tensor
    ) -> None:
        if timeline is not None and (times := pending.times()) is not None:
            experts = len(_different(self._device.to_host(expert_ids)))
            timeline.add_host_call(self._layer, experts, *times)


def _different(expert_ids: Tensor) -> set[int]:
    """The experts that picks on the host need."""
    return set(expert_ids.flatten().tolist()) - {HOST_SHARE}

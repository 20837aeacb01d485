"""Mixture of experts: the router, the routed experts through AsyncRouter, the shared expert.

The routing decision is taken here in fp32; who computes an expert and where is not known here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridk2.checkpoint import MlpWeights, RouterWeights
from hybridk2.config import K2Config
from hybridk2.device import Device
from hybridk2.experts.router import HOST_SHARE, AsyncRouter
from hybridk2.model.decode_batch import DecodeBatch
from hybridk2.model.layers import place_mlp, swiglu
from hybridk2.timeline import Timeline


class TopKRouter:
    """Picks the experts of each token and their weights, in fp32 as the model was trained."""

    def __init__(self, config: K2Config, weights: RouterWeights, device: Device) -> None:
        self._top_k = config.num_experts_per_tok
        self._scaling_factor = config.routed_scaling_factor
        self._weight = device.place(weights.weight.float())
        self._bias = device.place(weights.bias)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (tokens, hidden). Returns expert_ids (tokens, top_k) int32 and weights fp32.

        The bias moves the choice only; weights come from the sigmoid without it and are never
        recovered by subtraction, which cancels. A NaN score counts as the lowest, so the ids are
        always in range; the NaN itself stays in that token's weights.
        """
        scores = F.linear(x.float(), self._weight).sigmoid()
        choice = torch.nan_to_num(scores + self._bias, nan=float("-inf"))
        expert_ids = choice.topk(self._top_k, dim=-1).indices
        weights = scores.gather(-1, expert_ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self._scaling_factor
        return expert_ids.int(), weights

    def identifying_values(self) -> tuple[Tensor, Tensor]:
        """The bias (experts,) and the first expert's row (hidden,), fp32: no two models share
        them, and unlike the whole matrix they are hashed in no time."""
        return self._bias, self._weight[0]


class MixtureOfExperts:
    """The feed-forward block of a MoE layer."""

    def __init__(
        self,
        config: K2Config,
        slot: int,
        router: RouterWeights,
        shared: MlpWeights,
        experts: AsyncRouter,
        device: Device,
        dtype: torch.dtype,
    ) -> None:
        """slot: index of the layer among the MoE layers."""
        self.slot = slot
        self._layer = slot + config.first_k_dense_replace
        self._shared = place_mlp(shared, device, dtype)
        self._experts = experts
        self._device = device
        self.router = TopKRouter(config, router, device)
        self.experts_read = 0  # over all calls, how many different experts each needed
        # Told the slot and the picks (tokens, top_k) of every decoded step; None: nobody asks.
        self.on_decode: Callable[[int, Tensor], None] | None = None

    def forward(
        self, x: Tensor, batch: DecodeBatch | None = None, timeline: Timeline | None = None
    ) -> Tensor:
        """x: (rows, hidden), normed. Returns routed sum + shared expert, in x's dtype.

        The shared expert runs on the device while the host computes the routed ones. batch: of a
        step of decoding, which is told the picks; no expert works for its padding. None: all rows
        are tokens of a prompt. timeline: told what ran when.
        """
        expert_ids, weights = self.router(x)
        if batch is not None:
            batch.picks[self.slot].copy_(expert_ids)
            expert_ids = torch.where(batch.in_use, expert_ids, HOST_SHARE)
        if timeline is not None:
            timeline.mark("router", self._layer)
        pending = self._experts.submit(self.slot, x, expert_ids, weights)
        if timeline is not None:
            timeline.mark("handoff", self._layer)
        shared = self.shared_expert(x)
        if batch is None:
            self.experts_read += _different(self._device.to_host(expert_ids))
        if timeline is not None:
            timeline.mark("shared expert", self._layer)
        routed = self._experts.collect(pending)
        if timeline is not None:
            timeline.mark("waiting", self._layer)
            experts_read = _different(self._device.to_host(expert_ids))
            timeline.add_host_call(self._layer, experts_read, *pending.ticket.times())
        return shared.add_(routed.to(x.dtype))

    def note_decoded(self, expert_ids: Tensor) -> None:
        """Once a step of decoding is done: what it picked here, (tokens, top_k) on the host."""
        self.experts_read += _different(expert_ids)
        if self.on_decode is not None:
            self.on_decode(self.slot, expert_ids)

    def shared_expert(self, x: Tensor) -> Tensor:
        """The SwiGLU that every token passes. x: (tokens, hidden), normed."""
        return swiglu(x, self._shared)


def _different(expert_ids: Tensor) -> int:
    """How many experts have to be read for picks on the host."""
    return len(set(expert_ids.flatten().tolist()) - {HOST_SHARE})

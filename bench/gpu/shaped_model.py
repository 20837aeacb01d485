"""A model of K2's shape at full depth, with the experts of a few layers behind all of them.

Dense weights are random, and each layer has its own. Routed experts of `real_layers` layers lie in
host memory; MoE layer s reads those of layer s mod real_layers, its picks shifted by _SHIFT for
every time round. So a token reads as many bytes as of the whole model, from places that it has not
read lately, on a host that holds a fraction of it. What such a model says means nothing; what it
takes does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridk2.checkpoint import (
    AttentionWeights,
    LayerWeights,
    Layout,
    MlpWeights,
    QuantizedLinear,
    RouterWeights,
    TensorSpec,
)
from hybridk2.config import GROUP_SIZE, K2Config
from hybridk2.device import Device
from hybridk2.experts.host import HostExperts
from hybridk2.experts.router import HOST_SHARE
from hybridk2.model.attention import PagedMix
from hybridk2.model.k2 import DecoderLayer, K2Model
from hybridk2.model.moe import RoutedExperts

# Odd and no divisor of 384: the same experts are not read again for many rounds.
_SHIFT = 37
_LOADERS = 8


@dataclass(frozen=True)
class Alias:
    """Where a MoE layer's experts really lie."""

    real_layers: int
    experts: int

    def slot(self, slot: int) -> int:
        return slot % self.real_layers

    def expert_ids(self, slot: int, expert_ids: Tensor) -> Tensor:
        """Picks as the real layer knows them; by operations of the device alone."""
        shifted = (expert_ids + _SHIFT * (slot // self.real_layers)) % self.experts
        return torch.where(expert_ids == HOST_SHARE, HOST_SHARE, shifted)


class AliasedRouter:
    """An AsyncRouter for all layers over one for the real ones."""

    def __init__(self, inner: Any, alias: Alias) -> None:
        self._inner = inner
        self._alias = alias

    def submit(self, slot: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Any:
        ids = self._alias.expert_ids(slot, expert_ids)
        return self._inner.submit(self._alias.slot(slot), x, ids, weights)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def random_experts(config: K2Config, real_layers: int, threads: int | None = None) -> HostExperts:
    """Every expert in memory of its own, with the values of one of a few: speed does not depend on
    them, and making others up would take minutes."""
    experts = HostExperts(
        real_layers,
        config.n_routed_experts,
        config.hidden_size,
        config.moe_intermediate_size,
        threads=threads,
    )
    generator = torch.Generator().manual_seed(0)
    hidden, width = config.hidden_size, config.moe_intermediate_size
    patterns = [
        (
            _random_int4(width, hidden, generator),
            _random_int4(width, hidden, generator),
            _random_int4(hidden, width, generator),
        )
        for _ in range(3)
    ]

    def load(number: int) -> None:
        slot, expert = divmod(number, config.n_routed_experts)
        experts.load_expert(slot, expert, *patterns[number % len(patterns)])

    with ThreadPoolExecutor(_LOADERS) as pool:
        list(pool.map(load, range(real_layers * config.n_routed_experts)))
    return experts


def _random_int4(rows: int, columns: int, generator: torch.Generator) -> QuantizedLinear:
    shape = (rows, columns // 8)
    packed = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator).int()
    # Codes have a mean square of 21: rows of unit variance, as synthetic checkpoints have.
    scale = torch.full((rows, columns // GROUP_SIZE), 1 / math.sqrt(21 * columns)).bfloat16()
    return QuantizedLinear(packed, scale)


def random_model(
    config: K2Config,
    device: Device,
    routed: Callable[[], RoutedExperts],
    paged_mix: PagedMix | None,
    dtype: torch.dtype = torch.bfloat16,
) -> K2Model:
    """All layers with weights made on the device. routed: asked for each layer's experts."""
    layout = Layout(config)
    torch.manual_seed(0)

    def tensor(spec: TensorSpec) -> Tensor:
        at = device.torch_device
        if len(spec.shape) == 1:
            values = torch.ones(spec.shape, device=at)
            if spec.dtypes[0] == "F32":
                return torch.randn(spec.shape, device=at) * 0.05
            return values.bfloat16()
        made = torch.empty(spec.shape, dtype=torch.bfloat16, device=at)
        return made.normal_(std=spec.shape[-1] ** -0.5)

    def tensors(specs: dict[str, TensorSpec]) -> dict[str, Tensor]:
        return {name: tensor(spec) for name, spec in specs.items()}

    shared = routed()
    layers = []
    for layer in range(config.num_hidden_layers):
        is_moe = config.is_moe(layer)
        weights = LayerWeights(
            **tensors(layout.norms(layer)),
            attention=AttentionWeights(**tensors(layout.attention(layer))),
            mlp=None if is_moe else MlpWeights(**tensors(layout.dense_mlp(layer))),
            router=RouterWeights(**tensors(layout.router(layer))) if is_moe else None,
            shared=MlpWeights(**tensors(layout.shared_expert(layer))) if is_moe else None,
        )
        layers.append(DecoderLayer(config, weights, layer, shared, device, dtype, paged_mix))
    head = tensor(layout.lm_head())
    return K2Model(
        config, head.cpu(), layers, tensor(layout.final_norm()), head, device, dtype, shared
    )

"""One decoder layer as the engine computes it: production modules, C++ experts included.

Loads what a layer needs and no more: of the routed experts only those that the tokens at hand
picked, into a HostExperts of their own, because all of a K2 layer's take 9.5 GB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridk2.checkpoint import Checkpoint, LayerWeights
from hybridk2.device import CpuDevice
from hybridk2.experts.host import HostExperts
from hybridk2.experts.router import PendingExperts, ThreadRouter
from hybridk2.kv_cache import PAGE_TOKENS, CacheSequence, PagedLatentCache
from hybridk2.model.k2 import DecoderLayer
from hybridk2.model.layers import RotaryTable
from hybridk2.model.moe import RoutedExperts


class PickedExperts(ThreadRouter):
    """A router whose experts are loaded when a token first picks them.

    Expert ids are renumbered on the way to HostExperts, which therefore holds few. Remembers the
    last submitted ids, so that a whole layer's picks can be compared.
    """

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        self._checkpoint = checkpoint
        self._layer = layer
        self._held = torch.empty(0, dtype=torch.int32)  # ids of the loaded experts, ascending
        self.last_expert_ids = torch.empty(0)
        super().__init__(self._load(), CpuDevice())

    @property
    def isa(self) -> str:
        return self._experts.isa

    @property
    def num_held(self) -> int:
        return len(self._held)

    def submit(self, slot: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> PendingExperts:
        """As ThreadRouter.submit; slot is that of the layer in the whole model."""
        self.last_expert_ids = expert_ids
        picked = expert_ids.unique()
        if not bool(torch.isin(picked, self._held).all()):
            self._held = torch.cat((self._held, picked)).unique()
            self._experts.close()
            self._experts = self._load()
        renumbered = torch.searchsorted(self._held, expert_ids).int()
        return super().submit(0, x, renumbered, weights)

    def __enter__(self) -> PickedExperts:
        return self

    def __exit__(self, *error: object) -> None:
        self._experts.close()

    def _load(self) -> HostExperts:
        config = self._checkpoint.config
        experts = HostExperts(
            1,
            max(len(self._held), 1),
            config.hidden_size,
            config.moe_intermediate_size,
            huge_pages=False,
        )
        for index, expert in enumerate(self._held.tolist()):
            weights = self._checkpoint.expert(self._layer, expert)
            experts.load_expert(0, index, weights.gate, weights.up, weights.down)
        return experts


class EngineLayer:
    """The engine's layer in one activation dtype, its parts callable one by one."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: LayerWeights,
        layer: int,
        experts: PickedExperts | None,
        dtype: torch.dtype,
    ) -> None:
        self._config = checkpoint.config
        self._experts = experts
        self._device = CpuDevice()
        self._dtype = dtype
        self._slot = layer - self._config.first_k_dense_replace
        routed = None if experts is None else RoutedExperts(experts)
        self.module = DecoderLayer(self._config, weights, layer, routed, self._device, dtype)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, *, absorbed: bool) -> Tensor:
        """x: (tokens, hidden), normed: a prompt of its own, nothing cached before it."""
        return self.module.attention.forward(x, cos, sin, self._sequence(len(x)), absorbed)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.module.forward(hidden, cos, sin, self._sequence(len(hidden)))

    def dense_or_shared(self, x: Tensor) -> Tensor:
        """The SwiGLU that every token passes: a dense layer's whole, or the shared expert."""
        moe = self.module.moe
        return self.module.feed_forward(x) if moe is None else moe.shared_expert(x)

    def positions(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each (tokens, rope_dim / 2) fp32."""
        return RotaryTable(self._config, self._device)(positions)

    def routed_experts(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """(tokens, hidden) fp32, for picks that were made elsewhere."""
        assert self._experts is not None
        pending = self._experts.submit(self._slot, x, expert_ids.int(), weights.float())
        return self._experts.collect(pending)

    def _sequence(self, tokens: int) -> CacheSequence:
        cache = PagedLatentCache(self._config, tokens, PAGE_TOKENS, self._device, self._dtype)
        sequence = cache.open(range(tokens), repeatable=True)
        sequence.reserve(tokens)
        return sequence

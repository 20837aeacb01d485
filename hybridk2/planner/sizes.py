"""How many bytes each part of a model has, from its config alone.

Names and shapes come from `checkpoint.Layout`; nothing here knows a machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hybridk2.checkpoint import Layout, TensorSpec, describe_folder
from hybridk2.config import KIMI_K2_THINKING, DenseDtype, K2Config, KvDtype

BUILT_IN = {"kimi-k2-thinking": KIMI_K2_THINKING}

_BF16_BYTES = 2
_FP32_BYTES = 4
_ELEMENT_BYTES = {"BF16": _BF16_BYTES, "F32": _FP32_BYTES, "I32": 4}
# INT8 in groups of 128 columns with a bf16 scale each, beside two bytes for a bf16 weight.
_INT8_SHARE = (8 + 16 / 128) / 16
# FP8 latents as DeepSeek's FlashMLA keeps them: 8 bits a value and an fp32 scale for every 128 of
# the normed latent, the rotated key in bf16. 656 bytes per token and layer of K2.
_FP8_GROUP = 128


@dataclass(frozen=True)
class ModelSizes:
    """A model's parts in bytes, over all layers unless it says otherwise. Weights as published.

    expert_bytes, expert_parameters: of one routed expert. attention_bytes: its matrices and the
    norms of all layers; kv_b_bytes: the part of them that stays bf16 where the rest is INT8.
    pair_flops: of one query and one key, in all heads of all layers. prompt_token_bytes: what a
    token of a prompt's chunk takes on a card while it passes a layer.
    """

    layers: int
    moe_layers: int
    experts_per_layer: int
    experts_per_token: int
    expert_bytes: int
    expert_parameters: int
    attention_bytes: int
    kv_b_bytes: int
    shared_bytes: int
    dense_mlp_bytes: int
    router_bytes: int
    embedding_bytes: int
    head_bytes: int
    latent_rank: int
    rotated_dim: int
    pair_flops: int
    prompt_token_bytes: int
    max_context_tokens: int

    @classmethod
    def from_config(cls, config: K2Config) -> ModelSizes:
        """The sizes of a model with these facts."""
        layout = Layout(config)
        moe = range(config.first_k_dense_replace, config.num_hidden_layers)
        expert = layout.expert(config.first_k_dense_replace, 0).values() if moe else ()
        attention = [
            spec
            for layer in range(config.num_hidden_layers)
            for spec in (*layout.attention(layer).values(), *layout.norms(layer).values())
        ]
        kv_b = [layout.attention(layer)["kv_b_proj"] for layer in range(config.num_hidden_layers)]
        dense = [
            spec
            for layer in range(config.first_k_dense_replace)
            for spec in layout.dense_mlp(layer).values()
        ]
        head_width = config.qk_head_dim + config.v_head_dim
        return cls(
            layers=config.num_hidden_layers,
            moe_layers=config.num_moe_layers,
            experts_per_layer=config.n_routed_experts,
            experts_per_token=config.num_experts_per_tok,
            expert_bytes=sum(_bytes((linear.packed, linear.scale)) for linear in expert),
            expert_parameters=3 * config.hidden_size * config.moe_intermediate_size,
            attention_bytes=_bytes((*attention, layout.final_norm())),
            kv_b_bytes=_bytes(kv_b),
            shared_bytes=sum(_bytes(layout.shared_expert(layer).values()) for layer in moe),
            dense_mlp_bytes=_bytes(dense),
            router_bytes=sum(_bytes(layout.router(layer).values()) for layer in moe),
            embedding_bytes=_bytes([layout.embedding()]),
            head_bytes=_bytes([layout.lm_head()]),
            latent_rank=config.kv_lora_rank,
            rotated_dim=config.qk_rope_head_dim,
            pair_flops=2 * config.num_attention_heads * head_width * config.num_hidden_layers,
            # Queries, keys and values in bf16, as the projections make them and once more as the
            # attention kernel takes them; its result, in bf16 and fp32. Rows of the hidden state.
            prompt_token_bytes=12 * config.num_attention_heads * head_width
            + 16 * config.hidden_size,
            max_context_tokens=config.max_position_embeddings,
        )

    @classmethod
    def from_checkpoint(cls, folder: Path) -> ModelSizes:
        """The sizes of a checkpoint folder, whether or not its shards are there.

        Raises CheckpointError or ConfigError for a folder that is none or contradicts itself.
        """
        return cls.from_config(describe_folder(folder).config)

    @property
    def num_experts(self) -> int:
        """All routed experts of all layers."""
        return self.moe_layers * self.experts_per_layer

    @property
    def routed_layer_bytes(self) -> int:
        """All routed experts of one layer."""
        return self.experts_per_layer * self.expert_bytes

    @property
    def routed_bytes(self) -> int:
        return self.moe_layers * self.routed_layer_bytes

    @property
    def layer_bytes(self) -> int:
        """Dense weights of all layers, bf16: what one token reads beside experts and lm_head."""
        return self.attention_bytes + self.shared_bytes + self.dense_mlp_bytes + self.router_bytes

    @property
    def widened_router_bytes(self) -> int:
        """What routers take in memory: the engine keeps them in fp32, as it computes them."""
        return self.router_bytes * _FP32_BYTES // _BF16_BYTES

    @property
    def host_dense_bytes(self) -> int:
        """What all layers' dense weights take in host memory."""
        return self.layer_bytes - self.router_bytes + self.widened_router_bytes

    @property
    def host_weight_bytes(self) -> int:
        """What all weights take in host memory, activations being bf16."""
        ends = self.embedding_bytes + self.head_bytes
        return self.routed_bytes + self.host_dense_bytes + ends

    def gpu_share(self, dense: DenseDtype) -> float:
        """Bytes of a bf16 matrix on a card, kv_b and routers excepted, over its bytes in bf16."""
        return _INT8_SHARE if dense == "int8" else 1.0

    def gpu_weight_bytes(self, dense: DenseDtype) -> int:
        """All weights on a card but routed experts: every dense one but the embedding."""
        kept = self.kv_b_bytes + self.router_bytes
        rest = self.layer_bytes + self.head_bytes - kept
        return kept + math.ceil(rest * self.gpu_share(dense))

    def latent_bytes(self, kv_dtype: KvDtype) -> int:
        """Cached bytes per token."""
        rotated = self.rotated_dim * _BF16_BYTES
        if kv_dtype == "bf16":
            return self.layers * (self.latent_rank * _BF16_BYTES + rotated)
        scales = -(-self.latent_rank // _FP8_GROUP) * _FP32_BYTES
        return self.layers * (self.latent_rank + scales + rotated)


def _bytes(specs: Iterable[TensorSpec]) -> int:
    return sum(math.prod(spec.shape) * _ELEMENT_BYTES[spec.dtypes[0]] for spec in specs)

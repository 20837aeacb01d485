"""What a checkpoint hands out: named weights, as plain torch tensors in host memory.

Owns the shapes of the containers and no behaviour. Rows are outputs, columns are inputs: y = W x.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class QuantizedLinear:
    """One INT4 matrix of a routed expert, as published.

    packed: int32 (outputs, inputs / 8); nibble k of word j, counted from the lowest, is column
    8 j + k, stored as value + 8.
    scale: bfloat16 (outputs, inputs / 32); column c of row r is (nibble - 8) * scale[r, c // 32].
    """

    packed: Tensor
    scale: Tensor


@dataclass(frozen=True)
class ExpertWeights:
    """A routed expert: down(silu(gate x) * up x)."""

    gate: QuantizedLinear
    up: QuantizedLinear
    down: QuantizedLinear


@dataclass(frozen=True)
class MlpWeights:
    """A bfloat16 SwiGLU: the dense first layers and the shared experts.

    gate, up: (intermediate, hidden). down: (hidden, intermediate).
    """

    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class AttentionWeights:
    """Multi-head latent attention of one layer, bfloat16.

    q_a_proj (q_lora_rank, hidden), q_a_norm (q_lora_rank,),
    q_b_proj (heads * qk_head_dim, q_lora_rank),
    kv_a_proj (kv_lora_rank + qk_rope_head_dim, hidden), kv_a_norm (kv_lora_rank,),
    kv_b_proj (heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank),
    o_proj (hidden, heads * v_head_dim).
    """

    q_a_proj: Tensor
    q_a_norm: Tensor
    q_b_proj: Tensor
    kv_a_proj: Tensor
    kv_a_norm: Tensor
    kv_b_proj: Tensor
    o_proj: Tensor


@dataclass(frozen=True)
class RouterWeights:
    """The router of a MoE layer.

    weight: bfloat16 (experts, hidden). bias: float32 (experts,), added for the selection only; in
    bfloat16 it would lose the bits that order close experts.
    """

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer without its routed experts.

    A dense layer has `mlp`; a MoE layer has `router` and `shared`.
    """

    input_norm: Tensor
    post_attention_norm: Tensor
    attention: AttentionWeights
    mlp: MlpWeights | None
    router: RouterWeights | None
    shared: MlpWeights | None

"""The whole model in plain torch: the specification that every other path is compared with.

Reads top to bottom in the order in which a token is computed. Nothing is optimised, absorbed, fused
or cached, and nothing of hybridk2 is imported: not its config, not its checkpoint reader, not its
INT4 decoder, so that a mistake there cannot hide here. One sequence at a time, shapes are
(tokens, ...). It owns no tolerance and knows nothing of kernels, pages or devices.

Each step is a method of `Reference`, so that a test may replace one step and see what changes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

INT4_GROUP = 32  # input columns that share one scale


def unpack_int4(packed: Tensor) -> Tensor:
    """(rows, words) int32 -> (rows, 8 * words) int64 in -8..7: lowest nibble first, minus 8."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int64)
    nibbles = (packed.to(torch.int64).unsqueeze(-1) >> shifts) & 0xF
    return nibbles.flatten(-2) - 8


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """w[row, column] = q[row, column] * scale[row, column // 32], exact in `dtype`."""
    q = unpack_int4(packed).to(dtype)
    return q * scale.to(dtype).repeat_interleave(INT4_GROUP, dim=-1)


def yarn_magnitude(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 mscale ln(factor) + 1, and 1 when nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: Mapping[str, Any]) -> float:
    """(qk_nope + qk_rope)^-0.5 times YaRN's magnitude squared."""
    yarn = config["rope_scaling"]
    head_dim = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    return head_dim**-0.5 * yarn_magnitude(yarn["factor"], yarn["mscale_all_dim"]) ** 2


def yarn_range(config: Mapping[str, Any]) -> tuple[float, float]:
    """Indices of the pairs between which YaRN goes from unscaled to divided by the factor.

    corr(n) is the pair whose wave turns n times in the original context.
    """
    yarn, dim, theta = config["rope_scaling"], config["qk_rope_head_dim"], config["rope_theta"]

    def corr(rotations: float) -> float:
        wavelength = yarn["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(corr(yarn["beta_fast"])), 0)
    high = min(math.ceil(corr(yarn["beta_slow"])), dim - 1)
    return low, high + 0.001 if low == high else high


def yarn_inverse_frequencies(config: Mapping[str, Any]) -> Tensor:
    """(qk_rope_head_dim / 2,) fp32: angle per position of each pair, the same at any length."""
    dim = config["qk_rope_head_dim"]
    pair = torch.arange(dim // 2, dtype=torch.float64)
    frequency = config["rope_theta"] ** (-2 * pair / dim)
    low, high = yarn_range(config)
    ramp = ((pair - low) / (high - low)).clamp(0, 1)
    stretched = frequency / config["rope_scaling"]["factor"]
    return (frequency * (1 - ramp) + stretched * ramp).to(torch.float32)


@dataclass
class Trace:
    """What one pass computed. Lists and dicts are by layer; first dimensions are tokens."""

    logits: Tensor  # (tokens, vocab)
    layer_outputs: list[Tensor] = field(default_factory=list)  # (tokens, hidden)
    attention_outputs: list[Tensor] = field(default_factory=list)  # before the residual addition
    picks: dict[int, Tensor] = field(default_factory=dict)  # (tokens, top_k) int64
    pick_weights: dict[int, Tensor] = field(default_factory=dict)  # (tokens, top_k)


class Reference:
    """A checkpoint folder in K2's published form, computed in `dtype` throughout.

    latent_norm_eps: eps of the norms inside attention (q_a, kv_a). None takes the config's, as the
    engines that serve K2 do; 1e-6 is what transformers' DeepseekV3 does.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        latent_norm_eps: float | None = None,
    ) -> None:
        raw = json.loads((folder / "config.json").read_text())
        nested = "text_config" in raw  # K2.5: the language model is a part of a larger one
        self.config: dict[str, Any] = raw["text_config"] if nested else raw
        self.dtype = dtype
        self.tensors: dict[str, Tensor] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    self.tensors[name.removeprefix("language_model.")] = file.get_tensor(name)

        self.eps: float = self.config["rms_norm_eps"]
        self.latent_norm_eps = self.eps if latent_norm_eps is None else latent_norm_eps
        self.inverse_frequencies = yarn_inverse_frequencies(self.config)
        self.softmax_scale = softmax_scale(self.config)
        yarn = self.config["rope_scaling"]
        self.rope_multiplier = yarn_magnitude(yarn["factor"], yarn["mscale"]) / yarn_magnitude(
            yarn["factor"], yarn["mscale_all_dim"]
        )

    def forward(self, ids: Sequence[int], positions: Sequence[int] | None = None) -> Trace:
        """Logits and intermediate results of one sequence; token i sees tokens 0..i.

        positions: the position id of each token, which only RoPE sees; 0, 1, 2, ... when None.
        """
        at = torch.arange(len(ids)) if positions is None else torch.tensor(positions)
        trace = Trace(logits=torch.empty(0))
        hidden = self.weight("model.embed_tokens.weight")[torch.tensor(ids)]
        for layer in range(self.config["num_hidden_layers"]):
            hidden = self.decoder_layer(layer, hidden, at, trace)
        hidden = self.rms_norm(hidden, "model.norm.weight", self.eps)
        trace.logits = self.linear(hidden, "lm_head.weight")
        return trace

    def decoder_layer(self, layer: int, hidden: Tensor, positions: Tensor, trace: Trace) -> Tensor:
        """Attention, then the feed-forward part, each behind its norm and added to the stream."""
        prefix = f"model.layers.{layer}."
        normed = self.rms_norm(hidden, prefix + "input_layernorm.weight", self.eps)
        attended = self.attention(layer, normed, positions)
        hidden = hidden + attended
        normed = self.rms_norm(hidden, prefix + "post_attention_layernorm.weight", self.eps)
        if layer < self.config["first_k_dense_replace"]:
            hidden = hidden + self.mlp(normed, prefix + "mlp.")
        else:
            picks, weights = self.route(layer, normed)
            trace.picks[layer], trace.pick_weights[layer] = picks, weights
            routed = self.routed_experts(layer, normed, picks, weights)
            hidden = hidden + routed + self.mlp(normed, prefix + "mlp.shared_experts.")
        trace.attention_outputs.append(attended)
        trace.layer_outputs.append(hidden)
        return hidden

    # -- Attention: multi-head latent attention, every head spelled out ------------------------

    def attention(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        """(tokens, hidden) normed -> (tokens, hidden). Keys and values come from one latent."""
        config, prefix = self.config, f"model.layers.{layer}.self_attn."
        tokens, heads = len(x), config["num_attention_heads"]
        nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]

        latent_q = self.linear(x, prefix + "q_a_proj.weight")
        latent_q = self.rms_norm(latent_q, prefix + "q_a_layernorm.weight", self.latent_norm_eps)
        q = self.linear(latent_q, prefix + "q_b_proj.weight").view(tokens, heads, nope + rope)
        q_nope, q_rope = q[..., :nope], q[..., nope:]  # each head: 128 plain, then 64 rotated

        compressed = self.linear(x, prefix + "kv_a_proj_with_mqa.weight")
        latent_kv = compressed[:, : config["kv_lora_rank"]]
        k_rope = compressed[:, config["kv_lora_rank"] :]  # not normed; one for all heads
        latent_kv = self.rms_norm(latent_kv, prefix + "kv_a_layernorm.weight", self.latent_norm_eps)
        kv = self.linear(latent_kv, prefix + "kv_b_proj.weight")
        kv = kv.view(tokens, heads, nope + config["v_head_dim"])
        k_nope, v = kv[..., :nope], kv[..., nope:]

        q_rope = self.rotate(q_rope, positions.unsqueeze(-1))
        k_rope = self.rotate(k_rope, positions)

        scores = torch.einsum("qhd,khd->hqk", q_nope, k_nope)
        scores = scores + torch.einsum("qhd,kd->hqk", q_rope, k_rope)
        scores = scores * self.softmax_scale
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(diagonal=1)
        probabilities = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
        out = torch.einsum("hqk,khd->qhd", probabilities, v).flatten(-2)
        return self.linear(out, prefix + "o_proj.weight")

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """RoPE on the last dimension, pairs interleaved: (x[2i], x[2i+1]) turn by one angle.

        The angle is a product in fp32 whatever the dtype: that rounding is part of the model, at
        position 262143 it moves an angle by up to 0.008 rad.
        """
        angle = positions.to(torch.float32).unsqueeze(-1) * self.inverse_frequencies
        cos = angle.to(self.dtype).cos() * self.rope_multiplier
        sin = angle.to(self.dtype).sin() * self.rope_multiplier
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)

    # -- Feed-forward: one SwiGLU everywhere, and the router that chooses among experts ---------

    def route(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, hidden) -> expert ids, weights, both (tokens, top_k).

        The bias decides who is picked and never how much the pick weighs.
        """
        prefix = f"model.layers.{layer}.mlp.gate."
        scores = self.linear(x, prefix + "weight").sigmoid()
        biased = scores + self.weight(prefix + "e_score_correction_bias")
        picks = biased.topk(self.config["num_experts_per_tok"], dim=-1).indices
        weights = scores.gather(-1, picks)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return picks, weights * self.config["routed_scaling_factor"]

    def routed_experts(self, layer: int, x: Tensor, picks: Tensor, weights: Tensor) -> Tensor:
        """Sum over a token's picks of weight * expert(x), the shared expert not included."""
        out = torch.zeros_like(x)
        for token in range(len(x)):
            for expert, weight in zip(picks[token].tolist(), weights[token], strict=True):
                prefix = f"model.layers.{layer}.mlp.experts.{expert}."
                out[token] += weight * self.mlp(x[token], prefix)
        return out

    def mlp(self, x: Tensor, prefix: str) -> Tensor:
        """down(silu(gate x) * up x)."""
        gate = self.linear(x, prefix + "gate_proj.weight")
        up = self.linear(x, prefix + "up_proj.weight")
        return self.linear(torch.nn.functional.silu(gate) * up, prefix + "down_proj.weight")

    # -- The two primitives ----------------------------------------------------------------------

    def rms_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * self.weight(name)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weight(name).T

    def weight(self, name: str) -> Tensor:
        """A tensor in `dtype`: quantised exactly where the checkpoint holds packed words."""
        if name + "_packed" in self.tensors:
            packed, scale = self.tensors[name + "_packed"], self.tensors[name + "_scale"]
            weight = dequantize(packed, scale, self.dtype)
            assert list(weight.shape) == self.tensors[name + "_shape"].tolist(), name
            return weight
        return self.tensors[name].to(self.dtype)

"""K2-nano as a torch module to be trained: the maths of Kimi K2, the experts as one dense block.

The 32 routed experts of a layer are computed as a single SwiGLU block of width 32 x 64, and the
routing weights (zero for experts not chosen) multiply its activations. That is the same sum as
running the chosen experts alone, and it is what a GPU does fastest at this size.

Quantisation-aware: every forward pass rounds the expert weights to the INT4 codes and bf16 scales
that the checkpoint will store, and all other matrices to bf16; gradients pass straight through.
Knows nothing of text, and nothing of how positions attend: the caller passes that in.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridk2.config import GROUP_SIZE, K2Config, RopeScaling
from hybridk2.model.layers import yarn_inverse_frequencies

# (query, key, value) -> output; (tokens, heads, width) each. Called once per layer, in order.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

MAX_CODE = 7  # K2 was trained with codes -7..7: the sixteenth, -8, is never used


def nano_config(base_vocabulary: int) -> K2Config:
    """K2-nano's dimensions: every structural feature of K2-Thinking in under 12 MB."""
    return K2Config(
        model_type="kimi_k2",
        vocab_size=base_vocabulary + 256,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=8,
        n_routed_experts=32,
        n_shared_experts=1,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        routed_scaling_factor=2.827,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
        rope_scaling=RopeScaling(
            factor=4.0,
            original_max_position_embeddings=1024,
            beta_fast=1.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
        max_position_embeddings=4096,
        bos_token_id=base_vocabulary,
        eos_token_id=base_vocabulary + 2,
        pad_token_id=base_vocabulary + 255,
    )


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric INT4 over groups of 32 input columns, K2's way.

    weight: (..., out, in). Returns codes (..., out, in / 32, 32) in -7..7 and scales
    (..., out, in / 32, 1), both fp32; the scales are absmax / 7 rounded to bf16.
    """
    groups = weight.unflatten(-1, (-1, GROUP_SIZE))
    scales = groups.abs().amax(-1, keepdim=True) / MAX_CODE
    scales = scales.clamp(min=2.0**-60).bfloat16().float()
    return (groups / scales).round().clamp(-MAX_CODE, MAX_CODE), scales


def as_stored(weight: Tensor) -> Tensor:
    """The weight as INT4 will reproduce it, in bf16; its gradient passes straight through."""
    codes, scales = quantize(weight.detach())
    return _straight_through((codes * scales).flatten(-2), weight).bfloat16()


def _straight_through(value: Tensor, weight: Tensor) -> Tensor:
    """`value`, with the gradient of `weight`; the difference added is exactly zero."""
    return value + (weight - weight.detach())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rotation. x: (tokens, heads, width); cos, sin: (tokens, 1, width / 2) fp32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


def _matrix(rows: int, columns: int, spread: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * spread / math.sqrt(columns))


class Attention(nn.Module):
    """Multi-head latent attention, un-absorbed."""

    def __init__(self, config: K2Config) -> None:
        super().__init__()
        self.config = config
        heads = config.num_attention_heads
        self.q_a_proj = _matrix(config.q_lora_rank, config.hidden_size)
        self.q_a_norm = nn.Parameter(torch.ones(config.q_lora_rank))
        self.q_b_proj = _matrix(heads * config.qk_head_dim, config.q_lora_rank)
        self.kv_a_proj = _matrix(config.latent_dim, config.hidden_size)
        self.kv_a_norm = nn.Parameter(torch.ones(config.kv_lora_rank))
        self.kv_b_proj = _matrix(
            heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank
        )
        self.o_proj = _matrix(config.hidden_size, heads * config.v_head_dim, 0.1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        config, heads = self.config, self.config.num_attention_heads
        eps = config.rms_norm_eps
        query = _linear(rms_norm(_linear(x, self.q_a_proj), self.q_a_norm, eps), self.q_b_proj)
        query = query.unflatten(-1, (heads, config.qk_head_dim))
        plain, turned = query.split((config.qk_nope_head_dim, config.qk_rope_head_dim), -1)
        query = torch.cat((plain, rotate(turned, cos, sin)), -1)
        latent, shared_key = _linear(x, self.kv_a_proj).split(
            (config.kv_lora_rank, config.qk_rope_head_dim), -1
        )
        both = _linear(rms_norm(latent, self.kv_a_norm, eps), self.kv_b_proj)
        both = both.unflatten(-1, (heads, config.qk_nope_head_dim + config.v_head_dim))
        plain, value = both.split((config.qk_nope_head_dim, config.v_head_dim), -1)
        turned = rotate(shared_key[:, None], cos, sin).expand(-1, heads, -1)
        key = torch.cat((plain, turned), -1)
        return _linear(attend(query, key, value).flatten(-2), self.o_proj)


class SwiGlu(nn.Module):
    """down(silu(gate x) * up x): the dense layer and the shared expert."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = _matrix(width, hidden), _matrix(width, hidden)
        self.down = _matrix(hidden, width, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(F.silu(_linear(x, self.gate)) * _linear(x, self.up), self.down)


class MixtureOfExperts(nn.Module):
    """Sigmoid router with a selection bias, routed experts as one dense block, shared expert."""

    bias: Tensor
    load: Tensor
    unevenness: Tensor

    def __init__(self, config: K2Config) -> None:
        super().__init__()
        self.config = config
        experts, hidden = config.n_routed_experts, config.hidden_size
        width = config.moe_intermediate_size
        self.router = _matrix(experts, hidden)
        self.gate = nn.Parameter(torch.randn(experts, width, hidden) / math.sqrt(hidden))
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / math.sqrt(hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, width) * 0.1 / math.sqrt(width))
        self.shared = SwiGlu(hidden, width)
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts))
        self.register_buffer("unevenness", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        # Stored as bf16, computed in fp32, as the engine does.
        router = _straight_through(self.router.detach().bfloat16().float(), self.router)
        scores = F.linear(x.float(), router).sigmoid()
        chosen = (scores.detach() + self.bias).topk(config.num_experts_per_tok, -1).indices
        mask = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        if self.training:
            self.load.add_(mask.detach().sum(0))
        weights = scores * mask
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor
        inner = F.silu(F.linear(x, as_stored(self.gate).flatten(0, 1)))
        inner = inner * F.linear(x, as_stored(self.up).flatten(0, 1))
        inner = inner.unflatten(-1, (config.n_routed_experts, -1)) * weights.to(x.dtype)[..., None]
        down = as_stored(self.down).transpose(0, 1).flatten(1)  # (hidden, experts x width)
        return F.linear(inner.flatten(-2), down) + self.shared(x)

    @torch.no_grad()
    def balance(self, step: float) -> None:
        """Move the selection bias towards equal loads (DeepSeek-V3, section 2.1.2)."""
        self.unevenness.lerp_(self.load.max() / self.load.mean(), 0.01)
        self.bias.add_(torch.sign(self.load.mean() - self.load), alpha=step)
        self.load.zero_()


class Layer(nn.Module):
    """One decoder layer, pre-norm, residual stream in bf16."""

    def __init__(self, config: K2Config, layer: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.attention = Attention(config)
        self.post_attention_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp: MixtureOfExperts | SwiGlu = (
            MixtureOfExperts(config)
            if config.is_moe(layer)
            else SwiGlu(config.hidden_size, config.intermediate_size)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(rms_norm(x, self.input_norm, self.eps), cos, sin, attend)
        return x + self.mlp(rms_norm(x, self.post_attention_norm, self.eps))


class Network(nn.Module):
    """The whole model over a flat run of tokens."""

    inverse_frequencies: Tensor

    def __init__(self, config: K2Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size) * 0.3)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_hidden_layers))
        self.final_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.head = _matrix(config.vocab_size, config.hidden_size, 0.1)
        self.register_buffer("inverse_frequencies", yarn_inverse_frequencies(config))

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens, positions: (tokens,) int64. Returns hidden states before the head, bf16."""
        angles = positions.float()[:, None, None] * self.inverse_frequencies
        cos, sin = angles.cos(), angles.sin()
        x = F.embedding(tokens, self.embedding).bfloat16()
        for layer in self.layers:
            # Generation has shapes of every size: it never enters what training compiled.
            x = (layer if self.training else layer.forward)(x, cos, sin, attend)
        return rms_norm(x, self.final_norm, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        return _linear(hidden, self.head).float()

    def mixtures(self) -> list[MixtureOfExperts]:
        """The MoE blocks, in layer order."""
        blocks = (layer.mlp for layer in self.layers)
        return [block for block in blocks if isinstance(block, MixtureOfExperts)]

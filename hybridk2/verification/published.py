"""One decoder layer as transformers computes it, on weights that this file reads by itself.

The modules are transformers' own (models/deepseek_v3), filled by their own parameter names through
the safetensors library; INT4 is decoded here. HybridK2's checkpoint reader and kernels have no part
in it, so that a mistake in them is a difference and not a common error. Routed experts are
dequantised one at a time: all of a K2 layer's would take 68 GB in fp32.

One deliberate deviation: transformers gives the norms inside attention (q_a, kv_a) an eps of 1e-6
that no config can change. They are set to the config's rms_norm_eps, as the engines that serve K2
in production have it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

TRANSFORMERS_VERSION: str = transformers.__version__

# What DeepseekV3Config takes over from config.json. The file's other entries concern generation,
# training and quantisation.
_CONFIG_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"),
    *("intermediate_size", "moe_intermediate_size", "hidden_act", "rms_norm_eps"),
    *("num_attention_heads", "q_lora_rank", "kv_lora_rank", "v_head_dim"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "rope_theta", "rope_scaling", "attention_bias"),
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "first_k_dense_replace"),
    *("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"),
)
# In effect wherever config.json leaves them out; transformers' own defaults are DeepSeek-V3's.
_CONFIG_DEFAULTS = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True}

_GROUP_COLUMNS = 32  # input columns that share one INT4 scale


class PublishedWeights:
    """The tensors of a checkpoint folder by name, read through the safetensors library."""

    def __init__(self, folder: Path) -> None:
        self._open_files = ExitStack()
        self._file_of: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = self._open_files.enter_context(safe_open(path, framework="pt"))
            self._file_of.update(dict.fromkeys(file.keys(), file))
        text_model = "language_model.model.embed_tokens.weight"  # K2.5: part of a larger model
        self.prefix = "language_model." if text_model in self._file_of else ""

    def close(self) -> None:
        self._open_files.close()

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[self.prefix + name].get_tensor(self.prefix + name)
        return tensor

    def embedding_rows(self, token_ids: Iterable[int]) -> Tensor:
        """(tokens, hidden) bf16, without reading the whole table."""
        name = self.prefix + "model.embed_tokens.weight"
        table = self._file_of[name].get_slice(name)
        return torch.cat([table[token_id : token_id + 1] for token_id in token_ids])

    def expert_matrix(self, layer: int, expert: int, projection: str) -> Tensor:
        """(outputs, inputs) fp32, exact: an INT4 code times a bf16 scale has 12 significant bits.

        Nibble k of word j, lowest first, holds column 8 j + k as code + 8 (compressed-tensors'
        pack-quantized format); a scale covers 32 columns.
        """
        where = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
        packed, scale = self.tensor(f"{where}.weight_packed"), self.tensor(f"{where}.weight_scale")
        # Words are little-endian: byte b of a row holds columns 2 b (low nibble) and 2 b + 1.
        pairs = packed.view(torch.uint8)
        codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).float().sub_(8)
        groups = codes.view(len(packed), -1, _GROUP_COLUMNS)
        return groups.mul_(scale.float().unsqueeze(-1)).view(len(packed), -1)


def published_config(folder: Path) -> DeepseekV3Config:
    """transformers' config of the checkpoint's text model, straight from config.json."""
    raw = json.loads((folder / "config.json").read_bytes())
    text = raw.get("text_config", raw)
    fields = {**_CONFIG_DEFAULTS, **{name: text[name] for name in _CONFIG_FIELDS if name in text}}
    config = DeepseekV3Config(**fields, num_key_value_heads=text["num_attention_heads"])
    config._attn_implementation = "eager"
    return config


@dataclass(frozen=True)
class Routing:
    """What the router decided: expert_ids (tokens, top_k) int64, weights (tokens, top_k) fp32."""

    expert_ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class ExpertJob:
    """Inputs of the routed experts of one run: x (tokens, hidden) in the run's dtype."""

    x: Tensor
    routing: Routing


class PublishedLayer:
    """transformers' DeepseekV3DecoderLayer in one activation dtype, without its routed experts."""

    def __init__(
        self, config: DeepseekV3Config, weights: PublishedWeights, layer: int, dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        self.is_moe = layer >= (config.first_k_dense_replace or 0)
        with torch.device("meta"):
            self._module: Any = deepseek.DeepseekV3DecoderLayer(config, layer)
        tensors = {
            name: self._own(name, weights.tensor(f"model.layers.{layer}.{name}"))
            for name in self._module.state_dict()
            if not name.startswith("mlp.experts.")
        }
        self._module.load_state_dict(tensors, strict=False, assign=True)
        self._module.eval()
        attention: Any = self._module.self_attn
        attention.q_a_layernorm.variance_epsilon = config.rms_norm_eps
        attention.kv_a_layernorm.variance_epsilon = config.rms_norm_eps

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        # The file's memory is mapped; a copy keeps the layer usable after it is closed. The
        # router's bias is fp32 in every mode.
        keep = name.endswith("e_score_correction_bias")
        return tensor.to(tensor.dtype if keep else self.dtype, copy=True)

    def attention_input(self, hidden: Tensor) -> Tensor:
        return self._module.input_layernorm(hidden)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (tokens, hidden), normed. cos, sin: (1, tokens, rope_dim) as transformers has them."""
        tokens = x.shape[0]
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(diagonal=1)
        mask = torch.zeros(tokens, tokens, dtype=self.dtype)
        mask.masked_fill_(later, torch.finfo(self.dtype).min)
        out = self._module.self_attn(
            hidden_states=x.unsqueeze(0),
            position_embeddings=(cos.to(self.dtype), sin.to(self.dtype)),
            attention_mask=mask[None, None],
        )
        return out[0].squeeze(0)

    def feed_forward_input(self, hidden: Tensor) -> Tensor:
        return self._module.post_attention_layernorm(hidden)

    def dense_or_shared(self, x: Tensor) -> Tensor:
        """The SwiGLU that every token passes: a dense layer's whole, or the shared expert."""
        mlp = self._module.mlp
        return mlp.shared_experts(x) if self.is_moe else mlp(x)

    def route(self, x: Tensor) -> Routing:
        # transformers has returned (ids, weights), logits alone, and (logits, weights, ids).
        result = self._module.mlp.gate(x)
        if isinstance(result, Tensor):
            result = self._module.mlp.route_tokens_to_experts(result)
        (expert_ids,) = (part for part in result if not part.is_floating_point())
        weights = [part for part in result if part.is_floating_point()]
        return Routing(expert_ids, [part for part in weights if part.shape == expert_ids.shape][-1])

    def selection_scores(self, x: Tensor) -> Tensor:
        """(tokens, experts) fp64: what the router chooses by, sigmoid plus bias."""
        gate = self._module.mlp.gate
        logits = x.double() @ gate.weight.double().T
        return logits.sigmoid() + gate.e_score_correction_bias.double()

    def logit_spread(self, x: Tensor) -> float:
        """The largest root of sum (w x)^2 over logits: what their rounding is relative to."""
        gate = self._module.mlp.gate
        return float((x.double().square() @ gate.weight.double().square().T).max().sqrt())


@dataclass(frozen=True)
class RotaryTables:
    """transformers' positions in fp32: cos, sin (1, tokens, rope_dim), each frequency twice."""

    cos: Tensor
    sin: Tensor
    inverse_frequencies: Tensor  # (rope_dim / 2,)


def rotary_tables(config: DeepseekV3Config, positions: Tensor) -> RotaryTables:
    """positions: (tokens,) integers."""
    rotary: Any = deepseek.DeepseekV3RotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), positions.unsqueeze(0))
    return RotaryTables(cos, sin, rotary.inv_freq)


def routed_experts(
    config: DeepseekV3Config, weights: PublishedWeights, layer: int, jobs: Sequence[ExpertJob]
) -> list[Tensor]:
    """Sum over a token's experts of weight * expert(x) for each job: (tokens, hidden), x's dtype.

    As DeepseekV3MoE computes it, one expert at a time in ascending order, each weight taken from
    disk once for all jobs.
    """
    sums = [torch.zeros_like(job.x) for job in jobs]
    hit = torch.unique(torch.cat([job.routing.expert_ids.flatten() for job in jobs])).tolist()
    dtypes = {job.x.dtype for job in jobs}
    for expert in hit:
        matrices = {
            name: weights.expert_matrix(layer, expert, name)
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        for dtype in dtypes:
            mlp = _expert_module(config, matrices, dtype)
            for job, total in zip(jobs, sums, strict=True):
                if job.x.dtype == dtype:
                    tokens, choice = torch.where(job.routing.expert_ids == expert)
                    weight = job.routing.weights[tokens, choice, None]
                    total.index_add_(0, tokens, (mlp(job.x[tokens]) * weight).to(dtype))
    return sums


def _expert_module(
    config: DeepseekV3Config, matrices: dict[str, Tensor], dtype: torch.dtype
) -> torch.nn.Module:
    with torch.device("meta"):
        mlp = deepseek.DeepseekV3MLP(config, intermediate_size=config.moe_intermediate_size)
    state = {f"{name}.weight": matrix.to(dtype) for name, matrix in matrices.items()}
    mlp.load_state_dict(state, assign=True)
    return mlp

"""The tensors of a published Kimi K2 checkpoint: names, shapes, dtypes.

The only file of HybridK2 that knows Hugging Face's tensor names. It knows neither files nor bytes:
`Layout` says what must be there, `checkpoint.folder` compares, `synthesis` writes it.

Source: the published index of Kimi-K2-Thinking and compressed-tensors' pack-quantized format. In
K2.5, K2.6 and K2.7 the same tensors carry the prefix `language_model.`, beside a vision part.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from hybridk2.config import GROUP_SIZE, K2Config

NIBBLES_PER_WORD = 8  # INT4 values in one int32 of weight_packed

_BF16 = ("BF16",)
_F32 = ("F32",)
_I32 = ("I32",)
# K2 stores weight_shape as int32; today's compressed-tensors writes int64.
_INTEGER = ("I32", "I64")

_VISION_PREFIXES = ("vision_tower.", "mm_projector.")


class Role(Enum):
    """What a tensor is for, as far as its values are concerned."""

    EMBEDDING = "embedding"
    MATRIX = "matrix"
    NORM = "norm"
    ROUTER_BIAS = "router bias"
    PACKED = "INT4 codes"
    SCALE = "INT4 scales"
    WEIGHT_SHAPE = "shape of an INT4 matrix"


class TensorSpec(NamedTuple):
    """One tensor that the checkpoint must hold. The first of `dtypes` is the one K2 uses.

    values: what it contains, where that follows from the config.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    role: Role
    values: tuple[int, ...] | None = None


class QuantizedSpec(NamedTuple):
    """The three tensors that store one INT4 matrix."""

    packed: TensorSpec
    scale: TensorSpec
    weight_shape: TensorSpec


class Layout:
    """All tensors that a checkpoint with this config has, by the part of the model they serve.

    The dictionaries are keyed by the field names of the containers in `checkpoint.weights`.
    """

    def __init__(self, config: K2Config) -> None:
        self._config = config
        self._prefix = "language_model." if config.model_type == "kimi_k25" else ""

    def embedding(self) -> TensorSpec:
        shape = (self._config.vocab_size, self._config.hidden_size)
        return self._spec("model.embed_tokens.weight", shape, role=Role.EMBEDDING)

    def final_norm(self) -> TensorSpec:
        return self._spec("model.norm.weight", (self._config.hidden_size,), role=Role.NORM)

    def lm_head(self) -> TensorSpec:
        return self._spec("lm_head.weight", (self._config.vocab_size, self._config.hidden_size))

    def norms(self, layer: int) -> dict[str, TensorSpec]:
        """Keys input_norm, post_attention_norm."""
        shape = (self._config.hidden_size,)
        return {
            "input_norm": self._in_layer(layer, "input_layernorm", shape, Role.NORM),
            "post_attention_norm": self._in_layer(
                layer, "post_attention_layernorm", shape, Role.NORM
            ),
        }

    def attention(self, layer: int) -> dict[str, TensorSpec]:
        """Keyed as AttentionWeights."""
        config = self._config
        heads = config.num_attention_heads
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "q_a_proj": ("q_a_proj", (config.q_lora_rank, config.hidden_size)),
            "q_a_norm": ("q_a_layernorm", (config.q_lora_rank,)),
            "q_b_proj": ("q_b_proj", (heads * config.qk_head_dim, config.q_lora_rank)),
            "kv_a_proj": ("kv_a_proj_with_mqa", (config.latent_dim, config.hidden_size)),
            "kv_a_norm": ("kv_a_layernorm", (config.kv_lora_rank,)),
            "kv_b_proj": (
                "kv_b_proj",
                (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
            ),
            "o_proj": ("o_proj", (config.hidden_size, heads * config.v_head_dim)),
        }
        return {
            field: self._in_layer(
                layer,
                f"self_attn.{name}",
                shape,
                Role.NORM if len(shape) == 1 else Role.MATRIX,
            )
            for field, (name, shape) in shapes.items()
        }

    def dense_mlp(self, layer: int) -> dict[str, TensorSpec]:
        """Keyed as MlpWeights; layers before first_k_dense_replace only."""
        return self._mlp(layer, "mlp", self._config.intermediate_size)

    def shared_expert(self, layer: int) -> dict[str, TensorSpec]:
        """Keyed as MlpWeights. Several shared experts are stored as one wider one."""
        width = self._config.moe_intermediate_size * self._config.n_shared_experts
        return self._mlp(layer, "mlp.shared_experts", width)

    def router(self, layer: int) -> dict[str, TensorSpec]:
        """Keyed as RouterWeights."""
        experts = self._config.n_routed_experts
        name = f"{self._prefix}model.layers.{layer}.mlp.gate.e_score_correction_bias"
        return {
            "weight": self._in_layer(
                layer, "mlp.gate", (experts, self._config.hidden_size), Role.MATRIX
            ),
            "bias": TensorSpec(name, _F32, (experts,), Role.ROUTER_BIAS),
        }

    def expert(self, layer: int, expert: int) -> dict[str, QuantizedSpec]:
        """Keyed as ExpertWeights."""
        hidden, width = self._config.hidden_size, self._config.moe_intermediate_size
        where = f"{self._prefix}model.layers.{layer}.mlp.experts.{expert}"
        return {
            "gate": _quantized(f"{where}.gate_proj", width, hidden),
            "up": _quantized(f"{where}.up_proj", width, hidden),
            "down": _quantized(f"{where}.down_proj", hidden, width),
        }

    def dense_tensors(self, layer: int) -> Iterator[TensorSpec]:
        """Every tensor of one layer but its routed experts."""
        yield from self.norms(layer).values()
        yield from self.attention(layer).values()
        if self._config.is_moe(layer):
            yield from self.router(layer).values()
            yield from self.shared_expert(layer).values()
        else:
            yield from self.dense_mlp(layer).values()

    def layer_tensors(self, layer: int) -> Iterator[TensorSpec]:
        """Every tensor of one layer."""
        yield from self.dense_tensors(layer)
        if self._config.is_moe(layer):
            for expert in range(self._config.n_routed_experts):
                for linear in self.expert(layer, expert).values():
                    yield from (linear.packed, linear.scale, linear.weight_shape)

    def outer_tensors(self) -> Iterator[TensorSpec]:
        """The tensors that belong to no layer."""
        yield from (self.embedding(), self.final_norm(), self.lm_head())

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor, one at a time: a damaged config.json may promise millions."""
        yield from self.outer_tensors()
        for layer in range(self._config.num_hidden_layers):
            yield from self.layer_tensors(layer)

    def is_beside_the_text_model(self, name: str) -> bool:
        """Whether this tensor belongs to the vision part of K2.5, which HybridK2 passes over."""
        return self._config.model_type == "kimi_k25" and name.startswith(_VISION_PREFIXES)

    def vision_stand_ins(self) -> Iterator[TensorSpec]:
        """A few tensors in the place of K2.5's vision part, for checkpoints that are made up."""
        if self._config.model_type == "kimi_k25":
            for prefix in _VISION_PREFIXES:
                shape = (self._config.hidden_size, GROUP_SIZE)
                yield TensorSpec(f"{prefix}stand_in.weight", _BF16, shape, Role.MATRIX)

    def _mlp(self, layer: int, where: str, width: int) -> dict[str, TensorSpec]:
        hidden = self._config.hidden_size
        return {
            "gate": self._in_layer(layer, f"{where}.gate_proj", (width, hidden), Role.MATRIX),
            "up": self._in_layer(layer, f"{where}.up_proj", (width, hidden), Role.MATRIX),
            "down": self._in_layer(layer, f"{where}.down_proj", (hidden, width), Role.MATRIX),
        }

    def _in_layer(self, layer: int, name: str, shape: tuple[int, ...], role: Role) -> TensorSpec:
        return self._spec(f"model.layers.{layer}.{name}.weight", shape, role=role)

    def _spec(self, name: str, shape: tuple[int, ...], role: Role = Role.MATRIX) -> TensorSpec:
        return TensorSpec(self._prefix + name, _BF16, shape, role)


def _quantized(where: str, rows: int, columns: int) -> QuantizedSpec:
    words, groups = columns // NIBBLES_PER_WORD, columns // GROUP_SIZE
    return QuantizedSpec(
        TensorSpec(f"{where}.weight_packed", _I32, (rows, words), Role.PACKED),
        TensorSpec(f"{where}.weight_scale", _BF16, (rows, groups), Role.SCALE),
        TensorSpec(f"{where}.weight_shape", _INTEGER, (2,), Role.WEIGHT_SHAPE, (rows, columns)),
    )

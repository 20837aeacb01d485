"""What the model is and what the user chose, as frozen, checked values.

`K2Config` owns the facts of config.json: dimensions, router, RoPE, token ids. It refuses whatever
HybridK2 does not compute exactly, because a model that loads and answers wrongly is worse than one
that does not load. `EngineConfig` owns the user's choices. Neither knows tensors, files other than
config.json, or hardware.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hybridk2.errors import ConfigError

GROUP_SIZE = 32  # input columns that share one INT4 scale, in every published K2 checkpoint

# Far above any published model, far below what would cost memory or hours to look at.
_MAX_LAYERS = 1_000
_MAX_EXPERTS = 4_096
_MAX_DIMENSION = 1 << 24

# Properties that this engine computes in one way only, and the value that config.json may state.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "moe_layer_freq": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
_FIXED_QUANTIZATION: dict[str, Any] = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": GROUP_SIZE,
    "actorder": None,
    "dynamic": False,
}


@dataclass(frozen=True)
class RopeScaling:
    """YaRN parameters, none with a default: `beta_fast` is 1 in K2-Thinking and 32 in K2.5."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float

    @property
    def cos_sin_multiplier(self) -> float:
        """Factor on cos and sin: 1.0 whenever mscale equals mscale_all_dim, as in every K2."""
        return _yarn_magnitude(self.factor, self.mscale) / _yarn_magnitude(
            self.factor, self.mscale_all_dim
        )


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class K2Config:
    """The model's facts, under the names that Hugging Face's config.json gives them."""

    model_type: Literal["kimi_k2", "kimi_k25"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    routed_scaling_factor: float
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    max_position_embeddings: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the part without position, then the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Cached values per token and layer: the normed latent, then the rotated shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def softmax_scale(self) -> float:
        """Attention scale with YaRN's magnitude squared: 0.14467962580268923 for K2-Thinking."""
        magnitude = _yarn_magnitude(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim)
        return self.qk_head_dim**-0.5 * magnitude**2

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace

    @classmethod
    def from_file(cls, path: Path) -> K2Config:
        """Read and check config.json.

        Raises ConfigError when it is not readable, not JSON, or describes a model that HybridK2
        does not compute.
        """
        try:
            raw = json.loads(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> K2Config:
        """Check a parsed config.json: K2-Thinking's flat form, or K2.5's with its text_config.

        source: the name that errors carry. Raises ConfigError.
        """
        model_type = raw.get("model_type")
        text = raw
        if model_type == "kimi_k25":
            text = raw.get("text_config")  # type: ignore[assignment]
            if not isinstance(text, Mapping):
                raise ConfigError(f"{source}: model_type kimi_k25 without a text_config object")
            source = f"{source} text_config"
        if model_type not in ("kimi_k2", "kimi_k25") or text.get("model_type") != "kimi_k2":
            raise ConfigError(
                f"{source}: model_type is {text.get('model_type')!r}; HybridK2 runs Kimi K2 "
                "checkpoints only (kimi_k2, or kimi_k25 around kimi_k2)"
            )
        reader = _Reader(text, source)
        reader.check_architecture()
        reader.check_quantization()
        config = cls(
            model_type=model_type,
            vocab_size=reader.integer("vocab_size"),
            hidden_size=reader.integer("hidden_size", multiple_of=GROUP_SIZE),
            intermediate_size=reader.integer("intermediate_size"),
            moe_intermediate_size=reader.integer("moe_intermediate_size", multiple_of=GROUP_SIZE),
            num_hidden_layers=reader.integer("num_hidden_layers", maximum=_MAX_LAYERS),
            num_attention_heads=reader.integer("num_attention_heads"),
            n_routed_experts=reader.integer("n_routed_experts", maximum=_MAX_EXPERTS),
            n_shared_experts=reader.integer("n_shared_experts", maximum=_MAX_EXPERTS),
            num_experts_per_tok=reader.integer("num_experts_per_tok", maximum=_MAX_EXPERTS),
            first_k_dense_replace=reader.integer("first_k_dense_replace", minimum=0),
            routed_scaling_factor=reader.real("routed_scaling_factor"),
            q_lora_rank=reader.integer("q_lora_rank"),
            kv_lora_rank=reader.integer("kv_lora_rank"),
            qk_nope_head_dim=reader.integer("qk_nope_head_dim"),
            qk_rope_head_dim=reader.integer("qk_rope_head_dim", multiple_of=2),
            v_head_dim=reader.integer("v_head_dim"),
            rms_norm_eps=reader.real("rms_norm_eps"),
            rope_theta=reader.real("rope_theta"),
            rope_scaling=reader.rope_scaling(),
            max_position_embeddings=reader.integer("max_position_embeddings"),
            bos_token_id=reader.integer("bos_token_id", minimum=0),
            eos_token_id=reader.integer("eos_token_id", minimum=0),
            pad_token_id=reader.integer("pad_token_id", minimum=0),
        )
        reader.check_relations(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The config.json of a checkpoint with these facts, in K2's published form."""
        scaling = self.rope_scaling
        text: dict[str, Any] = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "kimi_k2",
            **{
                name: getattr(self, name)
                for name in self.__dataclass_fields__
                if name not in ("model_type", "rope_scaling")
            },
            **_FIXED,
            "num_key_value_heads": self.num_attention_heads,
            "num_nextn_predict_layers": 0,
            "rope_scaling": {"type": "yarn", **vars(scaling)},
            "dtype": "bfloat16",
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "kv_cache_scheme": None,
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "input_activations": None,
                        "output_activations": None,
                        "weights": {
                            **_FIXED_QUANTIZATION,
                            "block_structure": None,
                            "observer": "minmax",
                            "observer_kwargs": {},
                        },
                    }
                },
                "ignore": [
                    "lm_head",
                    "re:.*self_attn.*",
                    "re:.*shared_experts.*",
                    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
                ],
            },
        }
        if self.model_type == "kimi_k2":
            return text
        return {
            "architectures": ["KimiK25ForConditionalGeneration"],
            "model_type": "kimi_k25",
            "text_config": text,
        }


class _Reader:
    """Takes checked values out of one JSON object; every refusal names the file and the field."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self._raw = raw
        self._source = source

    def _value(self, name: str) -> Any:
        if name not in self._raw:
            raise ConfigError(f"{self._source}: {name} is missing")
        return self._raw[name]

    def refuse(self, name: str, found: Any, expected: str) -> ConfigError:
        shown = json.dumps(found, default=str)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return ConfigError(f"{self._source}: {name}: expected {expected}, found {shown}")

    def integer(
        self, name: str, *, minimum: int = 1, maximum: int = _MAX_DIMENSION, multiple_of: int = 1
    ) -> int:
        value = self._value(name)
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.refuse(name, value, f"an integer from {minimum} to {maximum}")
        if value % multiple_of:
            raise self.refuse(name, value, f"a multiple of {multiple_of}")
        return value

    def real(self, name: str, *, minimum: float = 0.0) -> float:
        value = self._value(name)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= minimum:
            raise self.refuse(name, value, f"a finite number above {minimum:g}")
        return float(value)

    def rope_scaling(self) -> RopeScaling:
        raw = self._value("rope_scaling")
        if not isinstance(raw, Mapping):
            raise self.refuse("rope_scaling", raw, "an object with YaRN parameters")
        kind = raw.get("type", raw.get("rope_type"))
        if kind != "yarn":
            raise self.refuse("rope_scaling.type", kind, '"yarn"')
        reader = _Reader(raw, f"{self._source} rope_scaling")
        return RopeScaling(
            factor=reader.real("factor"),
            original_max_position_embeddings=reader.integer("original_max_position_embeddings"),
            beta_fast=reader.real("beta_fast"),
            beta_slow=reader.real("beta_slow"),
            mscale=reader.real("mscale"),
            mscale_all_dim=reader.real("mscale_all_dim"),
        )

    def check_architecture(self) -> None:
        for name, expected in _FIXED.items():
            if name in self._raw:
                self._require(name, self._raw[name], expected)
        architectures = self._raw.get("architectures", ["DeepseekV3ForCausalLM"])
        self._require("architectures", architectures, ["DeepseekV3ForCausalLM"])
        if self._raw.get("num_nextn_predict_layers"):
            raise self.refuse(
                "num_nextn_predict_layers", self._raw["num_nextn_predict_layers"], "0"
            )

    def check_quantization(self) -> None:
        quantization = self._value("quantization_config")
        if not isinstance(quantization, Mapping):
            raise self.refuse("quantization_config", quantization, "an object")
        for name, expected in (
            ("quant_method", "compressed-tensors"),
            ("format", "pack-quantized"),
        ):
            self._require(f"quantization_config.{name}", quantization.get(name), expected)
        groups = quantization.get("config_groups")
        if not isinstance(groups, Mapping) or len(groups) != 1:
            raise self.refuse("quantization_config.config_groups", groups, "exactly one group")
        (group,) = groups.values()
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise self.refuse("quantization_config weights", weights, "an object")
        for name, expected in _FIXED_QUANTIZATION.items():
            found = weights.get(name, expected if name in ("actorder", "dynamic") else None)
            self._require(f"quantization_config weights.{name}", found, expected)
        for name in ("input_activations", "output_activations"):
            self._require(f"quantization_config {name}", group.get(name), None)

    def check_relations(self, config: K2Config) -> None:
        heads = self._raw.get("num_key_value_heads", config.num_attention_heads)
        self._require("num_key_value_heads", heads, config.num_attention_heads)
        relations: tuple[tuple[str, Callable[[int], bool], str], ...] = (
            (
                "num_experts_per_tok",
                lambda value: value <= config.n_routed_experts,
                f"at most n_routed_experts = {config.n_routed_experts}",
            ),
            (
                "first_k_dense_replace",
                lambda value: value <= config.num_hidden_layers,
                f"at most num_hidden_layers = {config.num_hidden_layers}",
            ),
            *(
                (
                    name,
                    lambda value: value < config.vocab_size,
                    f"below vocab_size = {config.vocab_size}",
                )
                for name in ("bos_token_id", "eos_token_id", "pad_token_id")
            ),
        )
        for name, holds, expected in relations:
            value = getattr(config, name)
            if not holds(value):
                raise self.refuse(name, value, expected)

    def _require(self, name: str, found: Any, expected: Any) -> None:
        if found != expected or type(found) is not type(expected):
            raise self.refuse(name, found, json.dumps(expected))


KIMI_K2_THINKING = K2Config(
    model_type="kimi_k2",
    vocab_size=163840,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_attention_heads=64,
    n_routed_experts=384,
    n_shared_experts=1,
    num_experts_per_tok=8,
    first_k_dense_replace=1,
    routed_scaling_factor=2.827,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=50000.0,
    rope_scaling=RopeScaling(
        factor=64.0,
        original_max_position_embeddings=4096,
        beta_fast=1.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
    max_position_embeddings=262144,
    bos_token_id=163584,
    eos_token_id=163586,
    pad_token_id=163839,
)
"""What the published config.json says, for plans without a file and for models made up like it."""


DtypeName = Literal["bfloat16", "float32"]
DeviceName = Literal["auto", "cpu", "cuda"]
KvDtype = Literal["bf16", "fp8"]
DenseDtype = Literal["bf16", "int8"]
HandoffName = Literal["auto", "mailbox", "host-functions", "thread"]


@dataclass(frozen=True)
class EngineConfig:
    """The user's choices. None means: let the engine decide from the model and the machine.

    About a card alone: placement, a file that says which experts live there; keep_host_copy, that
    these lie in host memory too; dynamic_placement, that they change with what is picked; kv_dtype
    and dense, of the latent cache and of the other weights; handoff, how steps of decoding reach
    the host. defer_experts: of each decoded token, so many routed experts of the lowest weights are
    added one layer late. fp8, int8 and deferral change the model's answers; they are off unless
    they are asked for here.
    """

    model: str = "nano"
    dtype: DtypeName = "bfloat16"
    device: DeviceName = "auto"
    isa: str | None = None
    threads: int | None = None
    context_tokens: int | None = None
    kv_cache_tokens: int | None = None
    prefill_chunk_tokens: int | None = None
    huge_pages: bool = True
    placement: str | None = None
    keep_host_copy: bool = False
    dynamic_placement: bool = False
    kv_dtype: KvDtype = "bf16"
    dense: DenseDtype = "bf16"
    handoff: HandoffName = "auto"
    defer_experts: int = 0
    max_running: int = 8  # requests that compute side by side
    max_queued: int = 64  # requests that may wait beyond those

    def __post_init__(self) -> None:
        for name, allowed in (
            *(("dtype", DtypeName), ("device", DeviceName), ("kv_dtype", KvDtype)),
            *(("dense", DenseDtype), ("handoff", HandoffName)),
        ):
            if getattr(self, name) not in get_args(allowed):
                found = getattr(self, name)
                raise ConfigError(f"{name}: expected one of {get_args(allowed)}, found {found!r}")
        if self.dynamic_placement and not self.keep_host_copy:
            raise ConfigError(
                "--dynamic-placement: an expert that leaves the card must be computed on the host. "
                "Add --keep-host-copy"
            )
        if self.defer_experts < 0:
            raise ConfigError(f"defer_experts: expected 0 or more, found {self.defer_experts}")
        for name in (
            *("threads", "context_tokens", "kv_cache_tokens", "prefill_chunk_tokens"),
            *("max_running", "max_queued"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, found {value}")

    @property
    def about_a_card(self) -> tuple[str, ...]:
        """The command line's options for what was chosen here and means nothing without a card."""
        chosen = (
            ("--placement", self.placement is not None),
            ("--keep-host-copy", self.keep_host_copy),
            ("--dynamic-placement", self.dynamic_placement),
            ("--kv-dtype", self.kv_dtype != "bf16"),
            ("--dense", self.dense != "bf16"),
            ("--handoff", self.handoff not in ("auto", "thread")),
        )
        return tuple(option for option, is_chosen in chosen if is_chosen)

    @property
    def approximations(self) -> tuple[str, ...]:
        """What was chosen here that changes the model's answers, in words."""
        chosen = (
            ("the latent cache is kept in fp8 (--kv-dtype fp8)", self.kv_dtype == "fp8"),
            ("weights other than routed experts are int8 (--dense int8)", self.dense == "int8"),
            (
                f"{self.defer_experts} routed experts of each decoded token are added one layer "
                f"late (--defer-experts {self.defer_experts})",
                self.defer_experts > 0,
            ),
        )
        return tuple(words for words, is_chosen in chosen if is_chosen)

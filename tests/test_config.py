"""config.json is read exactly, and refused by name when the engine would compute something else."""

import copy
import json
from pathlib import Path

import pytest

from hybridk2.config import KIMI_K2_THINKING, EngineConfig, K2Config
from hybridk2.errors import ConfigError

K2_THINKING = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 2.827,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 64.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 262144,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "pad_token_id": 163839,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 32,
                },
            }
        },
    },
}


def test_k2_thinking_has_the_published_softmax_scale_and_cache_width() -> None:
    config = K2Config.from_dict(K2_THINKING)
    assert config.softmax_scale == pytest.approx(0.14467962580268923, rel=1e-15)
    assert config.rope_scaling.cos_sin_multiplier == 1.0
    assert config.latent_dim == 576
    assert config.num_moe_layers == 60
    assert not config.is_moe(0)
    assert config.is_moe(1)


def test_the_softmax_scales_equal_the_published_tables(shared_dir: Path) -> None:
    tables = json.loads((shared_dir / "k2/vectors/rope.json").read_text())
    for name, factor in (("K2-Thinking", 64.0), ("K2-Instruct", 32.0), ("K2.5/2.6", 64.0)):
        raw = copy.deepcopy(K2_THINKING)
        raw["rope_scaling"]["factor"] = factor  # type: ignore[index]
        expected = tables[name]["softmax_scale"]
        assert K2Config.from_dict(raw).softmax_scale == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("model_type", ["kimi_k2", "kimi_k25"])
def test_a_written_config_reads_back_equal(model_type: str) -> None:
    raw: dict = K2_THINKING
    if model_type == "kimi_k25":
        raw = {"model_type": "kimi_k25", "text_config": K2_THINKING}
    config = K2Config.from_dict(raw)
    assert config.model_type == model_type
    assert K2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "llama", "model_type"),
        ("architectures", ["LlamaForCausalLM"], "architectures"),
        ("hidden_size", 7168.0, "hidden_size"),
        ("hidden_size", 7100, "multiple of 32"),
        ("hidden_size", True, "hidden_size"),
        ("num_hidden_layers", 10**9, "num_hidden_layers"),
        ("num_experts_per_tok", 385, "n_routed_experts"),
        ("first_k_dense_replace", 62, "num_hidden_layers"),
        ("eos_token_id", 163840, "vocab_size"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps"),
        ("routed_scaling_factor", "2.8", "routed_scaling_factor"),
        ("scoring_func", "softmax", "scoring_func"),
        ("n_group", 8, "n_group"),
        ("num_key_value_heads", 8, "num_key_value_heads"),
        ("num_nextn_predict_layers", 1, "num_nextn_predict_layers"),
        ("rope_scaling", None, "rope_scaling"),
        ("rope_scaling.type", "linear", "rope_scaling.type"),
        ("rope_scaling.beta_fast", None, "beta_fast"),
        ("quantization_config", None, "quantization_config"),
        ("quantization_config.quant_method", "gptq", "quant_method"),
        ("quantization_config.config_groups", {}, "config_groups"),
        ("quantization_config.config_groups.group_0.weights.num_bits", 8, "num_bits"),
        ("quantization_config.config_groups.group_0.weights.group_size", 128, "group_size"),
        ("quantization_config.config_groups.group_0.weights.symmetric", False, "symmetric"),
        ("quantization_config.config_groups.group_0.weights.actorder", "group", "actorder"),
    ],
)
def test_a_deviation_is_refused_by_name(path: str, value: object, message: str) -> None:
    raw = copy.deepcopy(K2_THINKING)
    *parents, last = path.split(".")
    target: dict = raw
    for parent in parents:
        target = target[parent]
    target[last] = value
    with pytest.raises(ConfigError, match=message):
        K2Config.from_dict(raw, "config.json")


@pytest.mark.parametrize(
    "name", ["vocab_size", "rope_scaling", "quantization_config", "pad_token_id"]
)
def test_a_missing_field_is_refused_by_name(name: str) -> None:
    raw = {key: value for key, value in K2_THINKING.items() if key != name}
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        K2Config.from_dict(raw)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": ' * 100_000])
def test_a_file_that_is_not_a_json_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        K2Config.from_file(path)


def test_engine_choices_are_checked() -> None:
    with pytest.raises(ConfigError, match="threads"):
        EngineConfig(threads=0)
    with pytest.raises(ConfigError, match="max_running"):
        EngineConfig(max_running=0)
    with pytest.raises(ConfigError, match="max_queued"):
        EngineConfig(max_queued=0)
    with pytest.raises(ConfigError, match="dtype"):
        EngineConfig(dtype="float16")  # type: ignore[arg-type]


def test_the_built_in_configuration_is_the_published_one() -> None:
    assert K2Config.from_dict(K2_THINKING) == KIMI_K2_THINKING

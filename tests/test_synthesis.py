"""Made-up checkpoints have the published format to the byte, sane values, and respect the disk."""

import json
import math
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hybridk2 import synthesis
from hybridk2.checkpoint import Checkpoint, LoadProgress
from hybridk2.cli import main
from hybridk2.errors import CheckpointError
from hybridk2.synthesis import checkpoint_bytes, synthesize, synthetic_config
from tests.reference import Reference


def test_all_61_layers_of_k2_thinking_have_the_published_files_tensors_and_bytes():
    shards = synthesis._plan(synthetic_config("full", layers=61))
    assert len(shards) == 62
    assert shards[0].name == "model-00001-of-000062.safetensors"
    assert sum(len(shard.tensors) for shard in shards) == 208_215
    # The published shards: layer 0, a MoE layer, embedding with norm and head.
    payloads = {shard.data_bytes for shard in shards}
    assert payloads == {995_000_320, 9_808_554_496, 4_697_634_816}
    assert sum(shard.data_bytes for shard in shards) == 594_205_904_896


def test_the_config_written_is_k2_thinking_s_and_reads_back(small_checkpoint):
    config = synthetic_config("full", layers=61)
    assert config.softmax_scale == pytest.approx(0.14467962580268923, rel=1e-15)
    assert (config.n_routed_experts, config.num_experts_per_tok) == (384, 8)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        163584,
        163586,
        163839,
    )
    raw = json.loads((small_checkpoint / "config.json").read_text())
    assert raw["quantization_config"]["quant_method"] == "compressed-tensors"
    assert Checkpoint.open(small_checkpoint).config == synthetic_config("tiny")
    assert json.loads((small_checkpoint / "generation_config.json").read_text()) == {
        "max_length": 262144,
        "eos_token_id": synthetic_config("tiny").eos_token_id,
    }


def test_shards_are_byte_for_byte_what_the_safetensors_library_would_write(
    small_checkpoint, tmp_path
):
    for shard in small_checkpoint.glob("*.safetensors"):
        save_file(load_file(shard), tmp_path / shard.name, metadata={"format": "pt"})
        assert (tmp_path / shard.name).read_bytes() == shard.read_bytes(), shard.name


def test_int4_codes_are_minus_7_to_7_all_of_them_and_no_minus_8(small_checkpoint):
    counts = np.zeros(16, np.int64)
    for shard in small_checkpoint.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            if name.endswith("weight_packed"):
                nibbles = tensor.view(torch.uint8).numpy()
                counts += np.bincount((nibbles & 15).ravel(), minlength=16)
                counts += np.bincount((nibbles >> 4).ravel(), minlength=16)
    assert counts[0] == 0
    # Code 0 has the share 2/16, the others 1/16; five standard deviations of a binomial count.
    total = counts.sum()
    for nibble in range(1, 16):
        share = (2 if nibble == 8 else 1) / 16
        spread = math.sqrt(total * share * (1 - share))
        assert abs(counts[nibble] - total * share) < 5 * spread, nibble


def test_every_linear_keeps_the_variance_of_its_input():
    config = synthetic_config("small", layers=2, experts=2)
    layout = synthesis.Layout(config)
    torch.manual_seed(0)

    def values(spec: synthesis.TensorSpec, dtype: torch.dtype) -> torch.Tensor:
        raw = np.concatenate(list(synthesis._values(spec, seed=7))).tobytes()
        return torch.frombuffer(bytearray(raw), dtype=dtype).view(spec.shape)

    def gain(weight: torch.Tensor) -> float:
        return float((weight @ torch.randn(weight.shape[1], 64)).std())

    for spec in [*layout.attention(1).values(), *layout.shared_expert(1).values()]:
        if len(spec.shape) == 2:
            assert gain(values(spec, torch.bfloat16).float()) == pytest.approx(1.0, abs=0.1), spec
    for linear in layout.expert(1, 0).values():
        packed = values(linear.packed, torch.int32)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        codes = (packed.unsqueeze(-1) >> shifts & 15).flatten(1) - 8
        scale = values(linear.scale, torch.bfloat16).float().repeat_interleave(32, dim=1)
        assert gain(codes * scale) == pytest.approx(1.0, abs=0.1), linear


def test_activations_and_logits_keep_a_sane_size_through_many_layers(tmp_path):
    config = synthetic_config("tiny", layers=24)
    synthesize(tmp_path / "deep", config, seed=0)
    trace = Reference(tmp_path / "deep").forward(list(range(0, 512, 16)))
    sizes = [float(output.std()) for output in trace.layer_outputs]
    # Variances add: 1 from the embedding; in each layer at most 1 from attention (a mean of values)
    # and E[silu(g)^2] = 0.356, g normal, from the shared expert and from routed experts whose
    # weights, 2.827 in sum, all fall on one of them.
    added = 1 + 0.356 * (1 + config.routed_scaling_factor**2)
    assert sizes == sorted(sizes)
    assert 1.0 <= sizes[0] <= sizes[-1] <= math.sqrt(1 + 24 * added)
    assert float(trace.logits.std()) == pytest.approx(1.0, abs=0.25)
    assert torch.isfinite(trace.logits).all()
    picked = torch.cat([picks.flatten() for picks in trace.picks.values()]).unique()
    assert len(picked) == config.n_routed_experts


def test_a_tensor_depends_on_the_seed_and_its_name_alone(tmp_path):
    few = synthetic_config("tiny", layers=2, experts=2)
    more = synthetic_config("tiny", layers=3, experts=4)
    synthesize(tmp_path / "few", few, seed=5)
    synthesize(tmp_path / "more", more, seed=5)
    synthesize(tmp_path / "other", few, seed=6)
    experts = [Checkpoint.open(tmp_path / name).expert(1, 1) for name in ("few", "more", "other")]
    assert torch.equal(experts[0].up.packed, experts[1].up.packed)
    assert torch.equal(experts[0].down.scale, experts[1].down.scale)
    assert not torch.equal(experts[0].up.packed, experts[2].up.packed)


def test_progress_ends_at_the_bytes_that_were_announced(tmp_path):
    config, reports = synthetic_config("tiny"), list[LoadProgress]()
    written = synthesize(tmp_path / "out", config, seed=0, on_progress=reports.append)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert written == on_disk == checkpoint_bytes(config)
    assert reports[-1].done_bytes == reports[-1].total_bytes == written


def test_an_empty_folder_is_filled_and_one_with_something_in_it_is_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    synthesize(out, synthetic_config("tiny"), seed=0)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        synthesize(out, synthetic_config("tiny"), seed=1)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        synthesize(out / "config.json", synthetic_config("tiny"), seed=1)


def test_what_an_interrupted_run_left_is_named_and_kept(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").touch()
    with pytest.raises(CheckpointError, match=r"out\.partial: left over"):
        synthesize(tmp_path / "out", synthetic_config("tiny"), seed=0)
    assert (tmp_path / "out.partial" / "precious").exists()


def test_a_disk_too_small_is_refused_with_both_numbers_before_anything_is_written(
    tmp_path, monkeypatch
):
    config = synthetic_config("tiny")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 12_345))
    with pytest.raises(CheckpointError) as error:
        synthesize(tmp_path / "out", config, seed=0)
    assert f"takes {checkpoint_bytes(config):,} bytes, the disk has 12,345 free" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_run_that_is_stopped_leaves_nothing_behind(tmp_path, stop):
    def stop_it(progress: LoadProgress) -> None:
        raise stop

    expected = CheckpointError if isinstance(stop, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        synthesize(tmp_path / "out", synthetic_config("tiny"), seed=0, on_progress=stop_it)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_can_be_copied_and_the_model_fits_it(tmp_path, shared_dir):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copyfile(shared_dir / "k2" / "tiktoken.model", source / "tiktoken.model")
    (source / "tokenizer_config.json").write_text('{"added_tokens_decoder": {}}')
    config = synthesis.config_for_tokenizer(synthetic_config("tiny"), source)
    assert config == replace(
        synthetic_config("tiny"),
        vocab_size=163840,
        bos_token_id=163584,
        eos_token_id=163586,
        pad_token_id=163839,
    )
    synthesize(
        tmp_path / "out",
        synthetic_config("tiny", layers=2, experts=1),
        seed=0,
        tokenizer_folder=source,
    )
    for name in ("tiktoken.model", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_the_command_writes_what_it_says(tmp_path):
    result = CliRunner().invoke(
        main,
        ["synth", str(tmp_path / "out"), "--scale", "tiny", "--layers", "2", "--experts", "3"],
    )
    assert result.exit_code == 0, result.output
    assert "2 layers, 3 experts in each of 1, seed 0" in result.output.replace("\n", "")
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.config == synthetic_config("tiny", layers=2, experts=3)
    with safe_open(tmp_path / "out" / "model-00001-of-000003.safetensors", "pt") as shard:
        assert "model.layers.0.mlp.gate_proj.weight" in shard.keys()  # noqa: SIM118
    again = CliRunner().invoke(main, ["synth", str(tmp_path / "out"), "--scale", "tiny"])
    assert again.exit_code == 1
    assert "Error: " in again.output


def test_the_command_refuses_a_model_without_moe_layer(tmp_path):
    result = CliRunner().invoke(main, ["synth", str(tmp_path / "out"), "--layers", "1"])
    assert result.exit_code == 2
    assert not Path(tmp_path / "out").exists()

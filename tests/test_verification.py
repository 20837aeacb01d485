"""`verify` finds nothing where nothing is wrong, and the right part of the right layer where it is.

The faults are put into the engine's side only: into what its checkpoint reader hands out, into its
config, into its modules. transformers' side reads the files by itself and does not see them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from hybridk2.checkpoint import Checkpoint, ExpertWeights, LayerWeights, LoadProgress
from hybridk2.cli import main
from hybridk2.config import K2Config
from hybridk2.errors import CheckpointError, RequestError
from hybridk2.experts.router import PendingExperts, ThreadRouter
from hybridk2.model import attention, layers
from hybridk2.model.attention import LatentAttention
from hybridk2.model.moe import MixtureOfExperts
from hybridk2.synthesis import synthesize, synthetic_config
from hybridk2.verification import checksums
from hybridk2.verification.comparison import (
    BF16_UNIT,
    FP32_UNIT,
    compare,
    difference,
    equal_picks,
    tolerance,
)
from hybridk2.verification.engine_side import PickedExperts
from hybridk2.verification.layers import LayerReport, verify_layers
from hybridk2.verification.probe import choose_positions, default_layers
from hybridk2.verification.published import (
    PublishedLayer,
    PublishedWeights,
    published_config,
    rotary_tables,
)
from tests.reference import Reference, Trace

LAYERS = [0, 1, 2]  # of the small checkpoint: dense, MoE, MoE


def failures(reports: list[LayerReport]) -> dict[int, set[str]]:
    """By layer, the parts that failed in either mode, whole layers aside."""
    return {
        report.layer: failed
        for report in reports
        if (failed := {part.part for part in report.parts if not part.passed} - {"layer output"})
    }


# -- Nothing wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_sound_checkpoint_passes_in_every_part(small_checkpoint: Path, seed: int) -> None:
    with Checkpoint.open(small_checkpoint) as checkpoint:
        reports = verify_layers(checkpoint, LAYERS, seed=seed)
    assert [report.kind for report in reports] == ["dense", "MoE", "MoE"]
    for report in reports:
        assert report.passed, [part for part in report.parts if not part.passed]
        assert {part.mode for part in report.parts} == {"float32", "bfloat16"}


def test_the_published_vectors_pass_in_every_part(shared_dir: Path) -> None:
    with Checkpoint.open(shared_dir / "k2" / "vectors" / "tiny") as checkpoint:
        reports = verify_layers(checkpoint, LAYERS, tokens=24)
    assert all(report.passed for report in reports), failures(reports)


def test_a_k25_checkpoint_passes_in_every_part(tmp_path: Path) -> None:
    folder = tmp_path / "k25"
    synthesize(folder, synthetic_config("tiny", variant="k2.5"), seed=1)
    with Checkpoint.open(folder) as checkpoint:
        reports = verify_layers(checkpoint, LAYERS)
    assert all(report.passed for report in reports), failures(reports)


def test_transformers_side_equals_the_specification(small_checkpoint: Path) -> None:
    """The side that is trusted, held against the reference, which shares no code with it."""
    config = published_config(small_checkpoint)
    reference = Reference(small_checkpoint, torch.float64)
    positions = choose_positions(9, config.max_position_embeddings)
    hidden = torch.randn(9, config.hidden_size, generator=torch.Generator().manual_seed(2))
    trace = Trace(logits=torch.empty(0))
    reference.decoder_layer(0, hidden.double(), positions, trace)
    weights = PublishedWeights(small_checkpoint)
    layer = PublishedLayer(config, weights, 0, torch.float32)
    tables = rotary_tables(config, positions)
    with torch.inference_mode():
        found = layer.attention(layer.attention_input(hidden), tables.cos, tables.sin)
        matrix = weights.expert_matrix(1, 3, "down_proj")
    weights.close()
    # Frequencies differ by an ulp, which the last positions amplify: as the published vectors.
    assert difference(found, trace.attention_outputs[0]).relative < 3e-2
    early = slice(0, 3)
    assert difference(found[early], trace.attention_outputs[0][early]).relative < 1e-5
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert torch.equal(matrix.double(), reference.weight(name))


# -- Something wrong -------------------------------------------------------------------------------

Fault = Callable[[pytest.MonkeyPatch, Checkpoint], None]
ATTENTION = {"attention (expanded)", "attention (absorbed)"}


def patch_expert(
    patch: pytest.MonkeyPatch, change: Callable[[ExpertWeights], ExpertWeights]
) -> None:
    """Change every expert of layer 1 as the engine reads it."""
    sound = Checkpoint.expert

    def faulty(self: Checkpoint, layer: int, expert: int) -> ExpertWeights:
        weights = sound(self, layer, expert)
        return change(weights) if layer == 1 else weights

    patch.setattr(Checkpoint, "expert", faulty)


def patch_layer(
    patch: pytest.MonkeyPatch, layer: int, change: Callable[[LayerWeights], LayerWeights]
) -> None:
    sound = Checkpoint.layer

    def faulty(self: Checkpoint, number: int) -> LayerWeights:
        weights = sound(self, number)
        return change(weights) if number == layer else weights

    patch.setattr(Checkpoint, "layer", faulty)


def one_wrong_scale(patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    def change(weights: ExpertWeights) -> ExpertWeights:
        weights.up.scale[5, 1] *= 1.25
        return weights

    patch_expert(patch, change)


def one_code_off_by_one(patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    def change(weights: ExpertWeights) -> ExpertWeights:
        weights.down.packed[7, 2] ^= 1 << 12
        return weights

    patch_expert(patch, change)


def swapped_expert_gate_and_up(patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    patch_expert(patch, lambda weights: replace(weights, gate=weights.up, up=weights.gate))


def swapped_shared_gate_and_up(patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    def change(weights: LayerWeights) -> LayerWeights:
        assert weights.shared is not None
        shared = replace(weights.shared, gate=weights.shared.up, up=weights.shared.gate)
        return replace(weights, shared=shared)

    patch_layer(patch, 1, change)


def one_wrong_row_in_the_dense_layer(patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    def change(weights: LayerWeights) -> LayerWeights:
        assert weights.mlp is not None
        weights.mlp.down[3] *= 1.01
        return weights

    patch_layer(patch, 0, change)


def wrong_correction_bias(patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    def change(weights: LayerWeights) -> LayerWeights:
        assert weights.router is not None
        return replace(weights, router=replace(weights.router, bias=weights.router.bias.flip(0)))

    patch_layer(patch, 2, change)


def one_wrong_norm_weight(patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    def change(weights: LayerWeights) -> LayerWeights:
        weights.post_attention_norm[11] += 0.125
        return weights

    patch_layer(patch, 2, change)


def no_routed_scaling(patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    checkpoint.config = replace(checkpoint.config, routed_scaling_factor=1.0)


def wrong_eps_in_the_latent_norms(patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    sound = attention.rms_norm
    patch.setattr(attention, "rms_norm", lambda x, weight, eps: sound(x, weight, 1e-4))


def half_split_rope(patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    sound = attention.rotate

    def faulty(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return sound(torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2), cos, sin)

    patch.setattr(attention, "rotate", faulty)


def no_yarn(patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    def faulty(config: K2Config) -> Tensor:
        pairs = torch.arange(config.qk_rope_head_dim // 2)
        return config.rope_theta ** (-2 * pairs / config.qk_rope_head_dim)

    patch.setattr(layers, "yarn_inverse_frequencies", faulty)


def no_magnitude_in_the_softmax_scale(patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    patch.setattr(K2Config, "softmax_scale", property(lambda config: config.qk_head_dim**-0.5))


def wrong_absorbed_form_alone(patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    sound = LatentAttention._absorbed

    def faulty(self: LatentAttention, *arguments: Any) -> Tensor:
        return sound(self, *arguments) * (1 + 1e-3)

    patch.setattr(LatentAttention, "_absorbed", faulty)


def activations_rounded_to_eight_bits(patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    sound = ThreadRouter.submit

    def faulty(
        self: ThreadRouter, slot: int, x: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> PendingExperts:
        step = x.abs().amax(dim=-1, keepdim=True) / 127
        return sound(self, slot, (x / step).round() * step, expert_ids, weights)

    patch.setattr(ThreadRouter, "submit", faulty)


def everywhere(*parts: str) -> dict[int, set[str]]:
    return {layer: set(parts) for layer in LAYERS}


ALL_ATTENTION = everywhere(*ATTENTION)
ROUTED = {"routed experts"}
FAULTS: list[tuple[Fault, dict[int, set[str]]]] = [
    (one_wrong_scale, {1: ROUTED}),
    (one_code_off_by_one, {1: ROUTED}),
    (swapped_expert_gate_and_up, {1: ROUTED}),
    (swapped_shared_gate_and_up, {1: {"shared expert"}}),
    (one_wrong_row_in_the_dense_layer, {0: {"dense MLP"}}),
    (wrong_correction_bias, {2: {"router picks"}}),
    (one_wrong_norm_weight, {2: {"post-attention norm"}}),
    (no_routed_scaling, {1: {"router weights"}, 2: {"router weights"}}),
    (wrong_eps_in_the_latent_norms, ALL_ATTENTION),
    (half_split_rope, ALL_ATTENTION),
    (no_yarn, everywhere("positions (cos, sin)")),
    (no_magnitude_in_the_softmax_scale, ALL_ATTENTION),
    (wrong_absorbed_form_alone, everywhere("attention (absorbed)")),
    (activations_rounded_to_eight_bits, {1: ROUTED, 2: ROUTED}),
]


@pytest.mark.parametrize(("fault", "expected"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_fault_is_named_by_layer_and_part(
    small_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    expected: dict[int, set[str]],
) -> None:
    with Checkpoint.open(small_checkpoint) as checkpoint:
        fault(monkeypatch, checkpoint)
        reports = verify_layers(checkpoint, LAYERS)
    assert failures(reports) == expected


def test_a_fault_between_the_parts_shows_in_the_layer_output(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_shared_expert(self: MixtureOfExperts, x: Tensor, *_: object) -> Tensor:
        router = self._experts.of_prompts
        pending = router.submit(self.slot, x, *self.router(x))
        return router.collect(pending).to(x.dtype)

    monkeypatch.setattr(MixtureOfExperts, "forward", without_shared_expert)
    with Checkpoint.open(small_checkpoint) as checkpoint:
        reports = verify_layers(checkpoint, LAYERS)
    assert failures(reports) == {}
    assert [report.passed for report in reports] == [True, False, False]


def test_experts_are_loaded_when_they_are_first_picked(small_checkpoint: Path) -> None:
    reference = Reference(small_checkpoint)
    x = torch.randn(2, reference.config["hidden_size"], generator=torch.Generator().manual_seed(4))
    with Checkpoint.open(small_checkpoint) as checkpoint, PickedExperts(checkpoint, 2) as experts:
        for ids, held in (([[6, 1], [1, 6]], 2), ([[1, 3], [0, 6]], 4), ([[3, 6], [6, 3]], 4)):
            picks, weights = torch.tensor(ids, dtype=torch.int32), torch.tensor([[0.5, 2.0]] * 2)
            found = experts.collect(experts.submit(1, x, picks, weights))
            expected = reference.routed_experts(2, x, picks, weights)
            # fp32 sums of at most 128 terms in another order.
            assert difference(found, expected).relative < 1e-5
            assert experts.num_held == held


def test_a_value_that_is_not_a_number_is_found_with_its_token() -> None:
    found = torch.ones(4, 8)
    found[2, 3] = math.nan
    report = compare("part", "float32", found, torch.ones(4, 8), 1e9)
    assert not report.passed
    assert report.worst_token == 2
    assert report.max_absolute_error == math.inf


# -- How much may differ ---------------------------------------------------------------------------


def test_the_relative_error_ignores_huge_channels_and_elements_near_zero() -> None:
    expected = torch.ones(1, 9, dtype=torch.float64)
    expected[0, 0], expected[0, 1] = 1e6, 1e-9
    found = expected.clone()
    found[0, 1] += 1e-3
    assert difference(found, expected).relative == pytest.approx(1e-3, rel=1e-6)


def test_fp32_is_allowed_the_growth_of_its_sums_and_no_more() -> None:
    # One rounding to bf16, four times; in fp32 that is 4 units, times 60 for sums of 7168 products.
    assert tolerance("bfloat16", 0.0, 7168) == 4 * BF16_UNIT
    assert tolerance("float32", 0.0, 7168) == pytest.approx(4 * FP32_UNIT * 59.87, rel=1e-3)


def test_other_picks_pass_only_where_scores_are_within_rounding() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.5 + 1e-7, 0.1]]).double().expand(3, 4)
    expected = torch.tensor([[0, 2]] * 3)
    found = torch.tensor([[2, 0], [0, 1], [0, 3]])
    same, tied = equal_picks(found, expected, scores, 1e-6)
    assert same.tolist() == [True, False, False]
    assert tied.tolist() == [False, True, False]


@pytest.mark.parametrize("tokens", [3, 4, 12, 100])
@pytest.mark.parametrize("max_positions", [128, 4096, 262144])
def test_positions_reach_from_the_first_to_the_last(tokens: int, max_positions: int) -> None:
    positions = choose_positions(tokens, max_positions)
    assert len(positions) == tokens
    assert positions[0] == 0
    assert positions[-1] == max_positions - 1
    assert bool((positions.diff() >= 0).all())


def test_layers_that_the_model_lacks_are_refused(small_checkpoint: Path) -> None:
    with Checkpoint.open(small_checkpoint) as checkpoint:
        assert default_layers(checkpoint.config) == [0, 1, 2]
        with pytest.raises(RequestError, match="layer 3: this model has layers 0 to 2"):
            verify_layers(checkpoint, [3])


# -- Checksums -------------------------------------------------------------------------------------


def write_sums(folder: Path, path: Path) -> dict[str, str]:
    sums = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }
    path.write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    return sums


def test_files_equal_their_checksums(small_checkpoint: Path, tmp_path: Path) -> None:
    sums = write_sums(small_checkpoint, tmp_path / "sums")
    assert checksums.read_list(tmp_path / "sums") == sums
    seen: list[LoadProgress] = []
    files = checksums.check_files(small_checkpoint, sums, seen.append)
    assert all(file.passed for file in files)
    assert [file.name for file in files] == list(sums)
    total = sum(file.stat().st_size for file in small_checkpoint.iterdir())
    assert (seen[-1].done_bytes, seen[-1].total_bytes) == (total, total)


def test_a_changed_a_missing_and_an_unlisted_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "changed.safetensors").write_bytes(b"one")
    (tmp_path / "extra.safetensors").write_bytes(b"three")
    sums = {"changed.safetensors": hashlib.sha256(b"two").hexdigest(), "lost.json": "0" * 64}
    changed, lost = checksums.check_files(tmp_path, sums, lambda progress: None)
    assert not changed.passed
    assert changed.found == hashlib.sha256(b"one").hexdigest()
    assert not lost.passed
    assert lost.found is None
    assert checksums.unlisted_shards(tmp_path, sums) == ["extra.safetensors"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("not a list\n", r":1: expected 64 hexadecimal digits"),
        (f"{'0' * 63}  short\n", r":1: expected 64 hexadecimal digits"),
        (f"{'0' * 64}  a\n{'1' * 64}  a\n", r":2: a is listed twice"),
        (f"{'0' * 64}  ../../secret\n", r":1: expected a file inside"),
        (f"{'0' * 64} */etc/passwd\n", r":1: expected a file inside"),
    ],
)
def test_a_list_that_cannot_be_trusted_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sums"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        checksums.read_list(path)


# -- The command -----------------------------------------------------------------------------------


def run(*arguments: str | int | Path) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def test_the_command_shows_every_part_and_exits_with_0(small_checkpoint: Path) -> None:
    result = run(small_checkpoint, "--layers", "1")
    assert result.exit_code == 0, result.output
    for part in (*ATTENTION, "router picks", "routed experts", "shared expert", "layer output"):
        assert part in result.stdout
    assert "set to the config's" in " ".join(result.stdout.split())


def test_the_command_names_the_fault_and_exits_with_1(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_expert(monkeypatch, lambda weights: replace(weights, gate=weights.up, up=weights.gate))
    result = run(small_checkpoint, "--layers", "0,1")
    assert result.exit_code == 1
    assert "layer 1, routed experts, float32: relative error" in " ".join(result.stdout.split())
    assert "FAILED" in result.stdout


def test_the_command_writes_json(small_checkpoint: Path, tmp_path: Path) -> None:
    write_sums(small_checkpoint, tmp_path / "sums")
    result = run(
        small_checkpoint, "--json", "--tokens", 5, "--layers", "2", "--sha256", tmp_path / "sums"
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passed"]
    assert report["sha256"]["passed"]
    (layer,) = report["comparison"]["layers"]
    assert layer["layer"] == 2
    assert len(layer["positions"]) == 5
    assert {part["mode"] for part in layer["parts"]} == {"float32", "bfloat16"}


def test_json_of_a_value_that_is_not_a_number_is_still_json(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(weights: LayerWeights) -> LayerWeights:
        weights.input_norm[0] = math.nan
        return weights

    patch_layer(monkeypatch, 0, change)
    result = run(small_checkpoint, "--json", "--layers", "0")
    assert result.exit_code == 1
    (layer,) = json.loads(result.stdout)["comparison"]["layers"]
    worst = next(part for part in layer["parts"] if part["part"] == "input norm")
    assert worst["max_relative_error"] is None


def test_checksums_that_differ_fail_the_command(small_checkpoint: Path, tmp_path: Path) -> None:
    sums = tmp_path / "sums"
    shard = sorted(small_checkpoint.glob("*.safetensors"))[0].name
    sums.write_text(f"{'0' * 64}  {shard}\n")
    result = run(small_checkpoint, "--structure-only", "--sha256", sums)
    assert result.exit_code == 1
    text = " ".join(result.stdout.split())
    assert f"{shard}: expected {'0' * 64}, found" in text
    assert "not in the list" in text


def test_structure_alone_compares_nothing(small_checkpoint: Path) -> None:
    result = run(small_checkpoint, "--structure-only")
    assert result.exit_code == 0
    assert "structure" in result.stdout
    assert "router" not in result.stdout


def test_a_broken_checkpoint_is_refused_with_its_reason(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    for file in small_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    result = run(tmp_path)
    assert result.exit_code == 1
    assert shard.name in result.stderr


@pytest.mark.parametrize("value", ["one", "1,,2", ""])
def test_a_list_of_layers_that_is_none_is_a_usage_error(small_checkpoint: Path, value: str) -> None:
    assert run(small_checkpoint, "--layers", value).exit_code == 2

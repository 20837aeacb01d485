"""The specification agrees with transformers' DeepseekV3, and would not if it were wrong.

The published vectors were computed by transformers in fp32 on the tiny checkpoint. Tolerances are
theirs (facts of the model, section 2): 1e-4 at positions 0..15, 1e-3 from 5000 on, 3e-2 with gaps
up to 262143, where one ulp of an inverse frequency already turns a pair by 0.016 rad.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import (
    Reference,
    Trace,
    dequantize,
    softmax_scale,
    unpack_int4,
    yarn_inverse_frequencies,
    yarn_range,
)

# block of expected.json -> eps of the latent norms, logits tolerance
BLOCKS = {
    "pos0_eps_hf_1e-6": (1e-6, 1e-4),
    "pos5000_eps_hf_1e-6": (1e-6, 1e-3),
    "pos0_eps_cfg_1e-5": (None, 1e-4),
    "pos5000_eps_cfg_1e-5": (None, 1e-3),
    "posgap_eps_cfg_1e-5": (None, 3e-2),
}


@pytest.fixture(scope="module")
def tiny(shared_dir: Path) -> Path:
    return shared_dir / "k2" / "vectors" / "tiny"


@pytest.fixture(scope="module")
def expected(tiny: Path) -> dict[str, Any]:
    return json.loads((tiny / "expected.json").read_text())


def positions_of(block: str, expected: dict[str, Any]) -> list[int]:
    count = len(expected["ids"])
    if block.startswith("posgap"):
        return expected["posgap_positions"]
    start = 5000 if block.startswith("pos5000") else 0
    return list(range(start, start + count))


def logits_error(trace: Trace, block: dict[str, Any]) -> float:
    return (
        (trace.logits - torch.tensor(block["logits"], dtype=trace.logits.dtype)).abs().max().item()
    )


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_every_published_block_is_reproduced(
    tiny: Path, expected: dict[str, Any], block: str, dtype: torch.dtype
) -> None:
    eps, tolerance = BLOCKS[block]
    trace = Reference(tiny, dtype, latent_norm_eps=eps).forward(
        expected["ids"], positions_of(block, expected)
    )
    want = expected[block]

    assert logits_error(trace, want) <= tolerance
    assert trace.logits.argmax(dim=-1).tolist() == want["argmax"]
    for layer, output in enumerate(trace.layer_outputs):
        for token, name in ((0, "tok0"), (-1, "last")):
            found = output[token, :8]
            target = torch.tensor(want[f"layer{layer}_out_{name}_first8"], dtype=dtype)
            torch.testing.assert_close(
                found, target, atol=tolerance, rtol=0, msg=lambda m, at=(layer, name): f"{at}: {m}"
            )


@pytest.mark.parametrize("block", BLOCKS)
def test_the_router_picks_the_published_experts_with_their_weights(
    tiny: Path, expected: dict[str, Any], block: str
) -> None:
    eps, tolerance = BLOCKS[block]
    trace = Reference(tiny, latent_norm_eps=eps).forward(
        expected["ids"], positions_of(block, expected)
    )
    assert sorted(trace.picks) == [1, 2]
    for layer, picks in trace.picks.items():
        for token, want in enumerate(expected[block][f"router{layer}_sorted_idx_weight"]):
            order = picks[token].argsort()
            assert picks[token, order].tolist() == [expert for expert, _ in want], (layer, token)
            found = trace.pick_weights[layer][token, order]
            torch.testing.assert_close(
                found, torch.tensor([weight for _, weight in want]), atol=tolerance, rtol=0
            )


def test_fp32_and_fp64_differ_by_rounding_only(tiny: Path, expected: dict[str, Any]) -> None:
    # Angles are fp32 products in both, so even gap positions leave only fp32 rounding of sums of a
    # few hundred terms through three layers: 1e-5 is some 100 ulp of a logit near 1.5.
    positions = expected["posgap_positions"]
    single = Reference(tiny).forward(expected["ids"], positions).logits
    double = Reference(tiny, torch.float64).forward(expected["ids"], positions).logits
    assert (single - double).abs().max() < 1e-5


# -- Sensitivity: each known mistake moves the logits out of tolerance -------------------------


def without_magnitude(model: Reference) -> None:
    head_dim = model.config["qk_nope_head_dim"] + model.config["qk_rope_head_dim"]
    model.softmax_scale = head_dim**-0.5


def without_yarn(model: Reference) -> None:
    dim = model.config["qk_rope_head_dim"]
    pairs = torch.arange(dim // 2)
    model.inverse_frequencies = model.config["rope_theta"] ** (-2 * pairs / dim)


def with_beta_fast_of_k25(model: Reference) -> None:
    yarn = {**model.config["rope_scaling"], "beta_fast": 32.0}
    model.inverse_frequencies = yarn_inverse_frequencies({**model.config, "rope_scaling": yarn})


def with_half_split_rope(model: Reference) -> None:
    interleaved = model.rotate

    def half_split(x: Tensor, positions: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return interleaved(torch.stack((a, b), dim=-1).flatten(-2), positions)

    model.rotate = half_split  # type: ignore[method-assign]


def without_routed_scaling(model: Reference) -> None:
    model.config["routed_scaling_factor"] = 1.0


def without_correction_bias(model: Reference) -> None:
    for name, tensor in model.tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor.zero_()


def with_bias_in_the_weights(model: Reference) -> None:
    def biased(layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        prefix = f"model.layers.{layer}.mlp.gate."
        scores = model.linear(x, prefix + "weight").sigmoid()
        scores = scores + model.weight(prefix + "e_score_correction_bias")
        weights, picks = scores.topk(model.config["num_experts_per_tok"], dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return picks, weights * model.config["routed_scaling_factor"]

    model.route = biased  # type: ignore[method-assign]


def with_reversed_nibbles(model: Reference) -> None:
    shifts = torch.arange(28, -1, -4)
    for name, tensor in model.tensors.items():
        if name.endswith("weight_packed"):
            nibbles = (tensor.unsqueeze(-1).to(torch.int64) >> torch.arange(0, 32, 4)) & 0xF
            words = (nibbles << shifts).sum(dim=-1)
            tensor.copy_(words.to(torch.int32))


def with_rope_in_the_first_dims(model: Reference) -> None:
    """Each q head read as (rotated, plain) instead of (plain, rotated)."""
    rope = model.config["qk_rope_head_dim"]
    head_dim = model.config["qk_nope_head_dim"] + rope
    for name, tensor in model.tensors.items():
        if name.endswith("q_b_proj.weight"):
            heads = tensor.view(-1, head_dim, tensor.shape[-1])
            heads.copy_(heads.roll(-rope, dims=1))


MISTAKES: list[Callable[[Reference], None]] = [
    without_magnitude,
    without_yarn,
    with_beta_fast_of_k25,
    with_half_split_rope,
    without_routed_scaling,
    without_correction_bias,
    with_bias_in_the_weights,
    with_reversed_nibbles,
    with_rope_in_the_first_dims,
]


@pytest.mark.parametrize("block", ["pos0_eps_cfg_1e-5", "posgap_eps_cfg_1e-5"])
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_the_vectors_catch_the_mistake(
    tiny: Path, expected: dict[str, Any], mistake: Callable[[Reference], None], block: str
) -> None:
    model = Reference(tiny)
    mistake(model)
    trace = model.forward(expected["ids"], positions_of(block, expected))
    # Not merely out of tolerance: ten times out. The faintest is no YaRN at positions 0..15, 0.027.
    assert logits_error(trace, expected[block]) > 10 * BLOCKS[block][1]


# -- Tables and packing ----------------------------------------------------------------------------

K2_THINKING = {
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "factor": 64.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


def k2_variant(**yarn: float) -> dict[str, Any]:
    return {**K2_THINKING, "rope_scaling": {**K2_THINKING["rope_scaling"], **yarn}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("K2-Thinking", k2_variant()),
        ("K2-Instruct", k2_variant(factor=32.0)),
        ("K2.5/2.6", k2_variant(beta_fast=32.0)),
    ],
)
def test_rope_tables_of_the_published_models(
    shared_dir: Path, name: str, config: dict[str, Any]
) -> None:
    want = json.loads((shared_dir / "k2" / "vectors" / "rope.json").read_text())[name]
    found = yarn_inverse_frequencies(config)
    assert yarn_range(config) == (want["low"], want["high"])
    assert found.shape == (32,)
    # The published table went through fp32 pow, reciprocal, product and sum, half an ulp each.
    torch.testing.assert_close(found, torch.tensor(want["inv_freq"]), rtol=4 * 2**-24, atol=0)
    assert softmax_scale(config) == pytest.approx(want["softmax_scale"], rel=1e-15)


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        ([-8, -7, -1, 0, 1, 2, 6, 7], [0xFEA98710]),
        ([0] * 8, [0x88888888]),
        (list(range(-8, 8)), [0x76543210, 0xFEDCBA98]),
        (
            [*range(-7, 8), 0, 7, -7, 3, -3, 1, -1, 0, 0, 2, -2, 4, -4, 6, -6, 5, -5],
            [0x87654321, 0x8FEDCBA9, 0x88795B1F, 0x3D2E4C6A],
        ),
    ],
)
def test_int4_words_unpack_to_the_published_codes(codes: list[int], words: list[int]) -> None:
    packed = torch.tensor(words, dtype=torch.uint32).view(torch.int32).unsqueeze(0)
    assert unpack_int4(packed).tolist() == [codes]


def test_a_scale_covers_32_columns_of_its_row() -> None:
    packed = torch.tensor([[0x99999999] * 8, [0xAAAAAAAA] * 8], dtype=torch.uint32)  # codes 1, 2
    scale = torch.tensor([[0.5, 3.0], [0.25, -1.0]], dtype=torch.bfloat16)
    weight = dequantize(packed.view(torch.int32), scale, torch.float32)
    assert weight.shape == (2, 64)
    assert weight.tolist() == [[0.5] * 32 + [3.0] * 32, [0.5] * 32 + [-2.0] * 32]

"""Every instruction set against fp64 torch, with tolerances derived from the arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from hybridk2.checkpoint import QuantizedLinear
from hybridk2.errors import ConfigError
from hybridk2.experts.host import HostExperts, available_isas

from .expert_weights import (
    EMULATED_ISAS,
    RandomLayer,
    assert_within,
    compute,
    dequantise,
    random_activations,
    random_routing,
    runnable_isas,
)

ALL_ISAS = ["scalar", "avx2", "avx512", "avx512_bf16", "amx"]
DTYPES = [torch.bfloat16, torch.float32]
# Tiles are 12 tokens (6 in AVX2 and scalar registers), blocks 192, partial outputs end at 256
# (token, expert) pairs: with top-2, 128 tokens.
TOKENS_AROUND_EDGES = [0, 1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 23, 24, 25, 31, 32, 33]
MANY_TOKENS = [48, 64, 65, 127, 128, 129, 200, 385]

every_isa = pytest.mark.parametrize("isa", [*ALL_ISAS, *EMULATED_ISAS])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])


def require(isa: str) -> None:
    if isa not in runnable_isas():
        pytest.skip(f"this machine cannot run {isa}, only {', '.join(available_isas())}")


@pytest.fixture(scope="module")
def layer() -> RandomLayer:
    return RandomLayer(num_experts=5, hidden=192, intermediate=128)


def test_the_baseline_runs_everywhere_and_names_are_known() -> None:
    assert available_isas()[0] == "scalar"
    assert set(available_isas()) <= set(ALL_ISAS)


@every_isa
@every_dtype
def test_every_isa_matches_the_reference_around_every_tile_edge(
    layer: RandomLayer, isa: str, dtype: torch.dtype
) -> None:
    require(isa)
    with HostExperts(1, 5, 192, 128, isa=isa, threads=2) as experts:
        layer.load_into(experts)
        # top-1 on a single expert puts all tokens of a call on it: edges are where they seem.
        for tokens in TOKENS_AROUND_EDGES + MANY_TOKENS:
            for top_k, num_experts in ((1, 1), (2, 5)):
                x = random_activations(tokens, 192, dtype, seed=tokens)
                ids, weights = random_routing(tokens, num_experts, top_k, seed=tokens)
                actual = compute(experts, x, ids, weights)
                assert actual.shape == (tokens, 192)
                if tokens:
                    assert_within(actual, layer.reference(x, ids, weights))


@every_isa
@every_dtype
@pytest.mark.parametrize(("hidden", "intermediate"), [(32, 32), (64, 32), (96, 160), (224, 96)])
def test_columns_that_do_not_fill_a_block_count_as_zero(
    isa: str, dtype: torch.dtype, hidden: int, intermediate: int
) -> None:
    require(isa)
    layer = RandomLayer(8, hidden, intermediate, seed=hidden)
    with HostExperts(1, 8, hidden, intermediate, isa=isa, threads=2) as experts:
        layer.load_into(experts)
        for tokens in (1, 2, 13, 33, 150):
            x = random_activations(tokens, hidden, dtype, seed=tokens)
            ids, weights = random_routing(tokens, 8, 2, seed=tokens)
            assert_within(compute(experts, x, ids, weights), layer.reference(x, ids, weights))


@pytest.fixture(scope="module")
def k2_layer() -> RandomLayer:
    return RandomLayer(num_experts=2, hidden=7168, intermediate=2048)


@pytest.mark.parametrize("isa", ALL_ISAS)  # twins are too slow for these shapes
def test_k2s_true_shapes_match_the_reference(k2_layer: RandomLayer, isa: str) -> None:
    require(isa)
    with HostExperts(1, 2, 7168, 2048, isa=isa, threads=2) as experts:
        k2_layer.load_into(experts)
        assert experts.weight_bytes == 2 * 24_772_608  # 4.5 bits per weight, nothing else
        for tokens in (1, 3, 14):
            x = random_activations(tokens, 7168, torch.bfloat16, seed=tokens)
            ids, weights = random_routing(tokens, 2, 1, seed=tokens)
            assert_within(compute(experts, x, ids, weights), k2_layer.reference(x, ids, weights))


def test_panels_give_back_the_published_packing_vectors() -> None:
    words = [
        *(0xFEA98710, 0x88888888, 0x76543210, 0xFEDCBA98),
        *(0x87654321, 0x8FEDCBA9, 0x88795B1F, 0x3D2E4C6A),
    ]
    values = [
        *(-8, -7, -1, 0, 1, 2, 6, 7),
        *([0] * 8),
        *range(-8, 8),
        *(-7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 0),
        *(7, -7, 3, -3, 1, -1, 0, 0, 2, -2, 4, -4, 6, -6, 5, -5),
    ]
    signed = torch.tensor([word - 2**32 * (word >= 2**31) for word in words], dtype=torch.int32)
    scale = torch.tensor([[0.5, 2.0]]).bfloat16()
    matrix = QuantizedLinear(signed.repeat(64, 1), scale.repeat(64, 1))
    expected = torch.tensor(values).float() * torch.tensor([0.5, 2.0]).repeat_interleave(32)
    with HostExperts(1, 1, 64, 64, threads=1) as experts:
        experts.load_expert(0, 0, matrix, matrix, matrix)
        for dense in experts.expert_weights(0, 0):
            torch.testing.assert_close(dense, expected.repeat(64, 1), rtol=0, atol=0)


def test_expert_weights_are_exactly_the_checkpoints(layer: RandomLayer) -> None:
    with HostExperts(2, 5, 192, 128, threads=1) as experts:
        layer.load_into(experts, slot=1)
        for number, matrices in enumerate(layer.experts):
            for dense, matrix in zip(experts.expert_weights(1, number), matrices, strict=True):
                assert torch.equal(dense.double(), dequantise(matrix))


@every_isa
def test_each_of_the_sixteen_values_multiplies_exactly(isa: str) -> None:
    require(isa)
    # One-hot activations pick one column of gate and up; powers of two keep everything exact.
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (32, 32), generator=generator)
    codes[:, :16] = torch.arange(16)
    words = sum(codes[:, k::8] << (4 * k) for k in range(8))
    matrix = QuantizedLinear((words - (words >> 31 << 32)).int(), torch.ones(32, 1).bfloat16())
    values = (codes - 8).double()
    with HostExperts(1, 1, 32, 32, isa=isa, threads=1) as experts:
        experts.load_expert(0, 0, matrix, matrix, matrix)
        x = torch.eye(32)
        y = compute(experts, x, torch.zeros(32, 1).int(), torch.ones(32, 1))
    gate = values.T
    expected = (torch.nn.functional.silu(gate) * gate) @ values.T
    bound = (torch.nn.functional.silu(gate) * gate).abs() @ values.T.abs() * 40 * 2.0**-23
    assert ((y.double() - expected).abs() <= bound + 1e-30).all()


@every_isa
def test_silu_is_accurate_over_its_whole_range(isa: str) -> None:
    """|x| up to 100, where e^-x leaves fp32 on both sides; each result within 8 ulp."""
    require(isa)
    # Row r of gate is column r of x alone, up is a constant 1: out = silu(x).
    identity = torch.full((32, 32), 8)
    identity += torch.eye(32).long()
    words = sum(identity[:, k::8] << (4 * k) for k in range(8))
    unit = QuantizedLinear((words - (words >> 31 << 32)).int(), torch.ones(32, 1).bfloat16())
    with HostExperts(1, 1, 32, 32, isa=isa, threads=1) as experts:
        experts.load_expert(0, 0, unit, unit, unit)
        x = torch.linspace(-100, 100, 32 * 6400).view(-1, 32)
        ids = torch.zeros(x.shape[0], 1).int()
        y = compute(experts, x, ids, torch.ones(x.shape[0], 1)).double()
    exact = torch.nn.functional.silu(x.double()) * x.double()
    # Below -87 the fp32 result of e^x is denormal or 0: absolute, not relative, accuracy.
    assert ((y - exact).abs() <= 8 * 2.0**-23 * exact.abs() + 1e-34).all()


@every_isa
def test_the_isa_we_asked_for_is_the_isa_we_run(isa: str) -> None:
    require(isa)
    with HostExperts(1, 1, 64, 32, isa=isa, threads=1) as experts:
        assert experts.isa == isa


def run_with_environment(isa: str) -> subprocess.CompletedProcess[str]:
    program = (
        "from hybridk2.experts.host import HostExperts\n"
        "print(HostExperts(1, 1, 64, 32, threads=1).isa)"
    )
    environment = {**os.environ, "HYBRIDK2_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )


def test_the_environment_forces_an_isa() -> None:
    for isa in available_isas()[:2]:
        assert run_with_environment(isa).stdout.strip() == isa


def test_an_unknown_isa_is_refused_by_name() -> None:
    run = run_with_environment("avx1024")
    assert run.returncode != 0
    assert "ConfigError: HYBRIDK2_ISA: there is no instruction set 'avx1024'" in run.stderr
    with pytest.raises(ConfigError, match=r"no instruction set 'AVX2'; this machine runs scalar"):
        HostExperts(1, 1, 64, 32, isa="AVX2", threads=1)

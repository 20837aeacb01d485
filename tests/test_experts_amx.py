"""AMX: the order in which it sums, held bit for bit, on the portable twin and on real tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridk2.checkpoint import QuantizedLinear
from hybridk2.experts.host import HostExperts, available_isas

from .expert_weights import (
    RandomLayer,
    assert_within,
    compute,
    random_activations,
    random_matrix,
    random_routing,
)

WITH_TILES = ["amx", "amx_emulated"]
# Tiles begin at 4 tokens and hold 16; a thread multiplies 192 at once.
TOKENS = [1, 2, 3, 4, 5, 15, 16, 17, 18, 19, 31, 32, 33, 48, 191, 192, 193, 194, 195, 210]
SMALLEST_NORMAL = 2.0**-126


def require(isa: str) -> None:
    if isa == "amx" and isa not in available_isas():
        pytest.skip("this machine has no AMX tiles that Linux lets us use")


@pytest.fixture(params=WITH_TILES)
def isa(request: pytest.FixtureRequest) -> str:
    require(request.param)
    return str(request.param)


def loaded(layer: RandomLayer, isa: str) -> HostExperts:
    experts = HostExperts(
        1, layer.num_experts, layer.hidden, layer.intermediate, isa=isa, threads=2
    )
    layer.load_into(experts)
    return experts


def on_one_expert(experts: HostExperts, x: Tensor) -> Tensor:
    tokens = x.shape[0]
    return compute(experts, x, torch.zeros(tokens, 1).int(), torch.ones(tokens, 1))


def test_the_twin_is_never_chosen_only_named() -> None:
    assert "amx_emulated" not in available_isas()
    with HostExperts(1, 1, 64, 32, threads=1) as experts:
        assert experts.isa == available_isas()[-1]
    with HostExperts(1, 1, 64, 32, isa="amx_emulated", threads=1) as experts:
        assert experts.isa == "amx_emulated"


def test_every_number_of_tokens_gives_each_token_the_same_bits(isa: str) -> None:
    """Up to three tokens never meet a tile; 15 and 17 meet one that is not full."""
    layer = RandomLayer(num_experts=1, hidden=224, intermediate=96)
    with loaded(layer, isa) as experts:
        x = random_activations(max(TOKENS), 224, torch.bfloat16)
        together = on_one_expert(experts, x)
        for tokens in TOKENS:
            for begin in {0, max(TOKENS) - tokens}:
                part = slice(begin, begin + tokens)
                alone = on_one_expert(experts, x[part].contiguous())
                assert torch.equal(alone, together[part]), f"{tokens} tokens from {begin}"


def matrix_of(values: Tensor, scale: float) -> QuantizedLinear:
    """(rows, columns) integers from -8 to 7, one scale for all."""
    words = ((values.long() + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)).sum(2)
    scales = torch.full((values.shape[0], values.shape[1] // 32), scale).bfloat16()
    return QuantizedLinear((words - (words >> 31 << 32)).int(), scales)


def documented_sums(matrix: QuantizedLinear, x: np.ndarray) -> np.ndarray:
    """(tokens, rows) in fp32, in the order of Intel's TDPBF16PS (SDM, volume 2).

    x: (tokens, columns) fp32 that are bf16. Per group of 32 columns: even columns one after the
    other, odd columns likewise, then both, then times the scale onto the total, in one rounding. A
    product of bf16 with a 4-bit integer is exact in fp32, so plain sums round as fused ones do.
    """
    words = matrix.packed.numpy().astype(np.int64)
    nibbles = np.stack([words >> (4 * k) & 15 for k in range(8)], axis=-1).reshape(len(words), -1)
    values = (nibbles - 8).astype(np.float32)
    scales = matrix.scale.float().numpy()
    total = np.zeros((len(x), len(values)), np.float32)
    for group in range(scales.shape[1]):
        even = np.zeros_like(total)
        odd = np.zeros_like(total)
        for column in range(32 * group, 32 * group + 32, 2):
            even += x[:, column, None] * values[None, :, column]
            odd += x[:, column + 1, None] * values[None, :, column + 1]
        scaled = (even + odd).astype(np.float64) * scales[None, :, group]
        # fp64 holds the product exactly, and for these inputs the sum as well, or rounds it where
        # no fp32 is near: the second rounding is the fused operation's only one.
        total = (scaled + total).astype(np.float32)
    return total


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 16, 21])
def test_sums_have_the_bits_that_intel_documents(isa: str, tokens: int) -> None:
    """Down of a known SwiGLU result: what an expert with the identity for down returned."""
    size = 96
    generator = torch.Generator().manual_seed(tokens)
    identity = matrix_of(torch.eye(size), 1.0)
    down = random_matrix(size, size, generator)
    x = random_activations(tokens, size, torch.bfloat16, seed=tokens)
    with HostExperts(1, 2, size, size, isa=isa, threads=1) as experts:
        experts.load_expert(0, 0, identity, identity, identity)
        experts.load_expert(0, 1, identity, identity, down)
        middle = on_one_expert(experts, x)
        assert torch.equal(middle, middle.bfloat16().float())
        found = compute(experts, x, torch.ones(tokens, 1).int(), torch.ones(tokens, 1))
    assert np.array_equal(found.numpy(), documented_sums(down, middle.numpy()))


def test_activations_with_outliers_keep_the_tolerance(isa: str) -> None:
    """One column in 50 is 300 times as large, as in real models."""
    layer = RandomLayer(num_experts=2, hidden=192, intermediate=128, seed=5)
    x = random_activations(40, 192, torch.float32, seed=5)
    x[:, ::50] *= 300
    x = x.bfloat16()
    ids, weights = random_routing(40, 2, 1)
    with loaded(layer, isa) as experts:
        assert_within(compute(experts, x, ids, weights), layer.reference(x, ids, weights))


@pytest.mark.parametrize(
    ("first", "second", "survives"),
    [
        (0.5 * SMALLEST_NORMAL, 0.0, False),
        (0.0, -SMALLEST_NORMAL / 128, False),
        (1.5 * SMALLEST_NORMAL, -SMALLEST_NORMAL, False),  # each is normal, their sum is not
        (SMALLEST_NORMAL, 0.0, True),
        (1.5 * SMALLEST_NORMAL, -0.5 * SMALLEST_NORMAL, True),
    ],
)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_denormal_inputs_and_sums_are_zero_for_few_tokens_as_for_many(
    isa: str, tokens: int, first: float, second: float, survives: bool
) -> None:
    """gate is 1, from column 31; up is the sum of columns 0 and 1, times 2^100 to be seen."""
    x = torch.zeros(tokens, 32)
    x[:, 0], x[:, 1], x[:, 31] = first, second, 1.0
    gate, up = torch.zeros(32, 32), torch.zeros(32, 32)
    gate[:, 31] = 1
    up[:, :2] = 1
    with HostExperts(1, 1, 32, 32, isa=isa, threads=1) as experts:
        experts.load_expert(
            0, 0, matrix_of(gate, 1.0), matrix_of(up, 2.0**100), matrix_of(torch.eye(32), 1.0)
        )
        found = on_one_expert(experts, x.bfloat16())
    assert bool((found != 0).all() if survives else (found == 0).all())


def test_tiles_have_an_arithmetic_roof_and_their_twin_has_none(isa: str) -> None:
    with HostExperts(1, 1, 64, 32, isa=isa, threads=2) as experts:
        rate = experts.arithmetic_roof(torch.bfloat16)
    if isa == "amx":
        assert rate is not None
        assert 1e9 < rate < 1e14
    else:
        assert rate is None


def test_real_tiles_give_the_bits_of_their_twin() -> None:
    require("amx")
    layer = RandomLayer(num_experts=3, hidden=224, intermediate=160, seed=9)
    with loaded(layer, "amx") as real, loaded(layer, "amx_emulated") as twin:
        for tokens in TOKENS:
            x = random_activations(tokens, 224, torch.bfloat16, seed=tokens)
            ids, weights = random_routing(tokens, 3, 2, seed=tokens)
            assert torch.equal(compute(real, x, ids, weights), compute(twin, x, ids, weights))

"""INT8 matrices and the head: products of a few rows, exact but for sums in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybridk2.model.triton import int8
from tests.triton_kernels import DEVICE
from tests.triton_offline import CARDS, MOST_SHARED_BYTES, MOST_STACK_BYTES, compiled

few_rows = pytest.importorskip("hybridk2.model.triton.few_rows", reason="Triton is not installed")

EPS_FP32 = 2.0**-23
HALF_ULP_BF16 = 2.0**-8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """As the head of a model on a card computes them."""
    return few_rows.product(x, weight, None, torch.float32)


def on_device(weight: int8.Int8Linear) -> int8.Int8Linear:
    return int8.Int8Linear(weight.codes.to(DEVICE), weight.scales.to(DEVICE), weight.columns)


def assert_product(found: Tensor, x: Tensor, weight: Tensor, rounding: float = 0.0) -> None:
    """x weight^T. A sum of n exact products is off by 2 n eps sum|a b|: 2, as tensor cores cut off
    instead of rounding; a scale adds 1 to n. rounding: relative, of the result."""
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    tolerance = 2 * (x.shape[1] + 2) * EPS_FP32 * magnitude
    excess = (found.double() - exact).abs() - tolerance * (1 + rounding) - rounding * exact.abs()
    assert excess.nan_to_num(nan=1.0).max() <= 0, f"{excess.max()} beyond the tolerance"


def values(weight: int8.Int8Linear) -> Tensor:
    """What an INT8 matrix stands for, in fp64."""
    wide = weight.scales.double().repeat_interleave(int8.GROUP, dim=1)
    return (weight.codes.double() * wide)[:, : weight.columns]


@pytest.mark.parametrize("shape", [(5, 128), (16, 384), (7, 200), (3, 17)])
def test_a_weight_is_off_by_half_its_scale_at_most(shape: tuple[int, int]) -> None:
    weight = (random(*shape) * 3).bfloat16()
    weight[1] = 0
    weight[2] = 1e-39  # below what a scale can say: nothing is left of it
    kept = int8.quantise(weight)
    half_scales = kept.scales.double().repeat_interleave(int8.GROUP, dim=1)[:, : shape[1]] / 2
    assert ((values(kept) - weight.double()).abs() <= half_scales.clamp(min=1e-38)).all()
    assert kept.codes.abs().max() == 127
    assert kept.codes[1:3].count_nonzero() == 0
    assert kept.codes[:, shape[1] :].count_nonzero() == 0


def test_codes_and_a_scale_for_128_of_them_are_all_that_is_kept() -> None:
    kept = int8.quantise(random(32, 512).bfloat16())
    assert kept.codes.shape == (32, 512)
    assert kept.codes.dtype == torch.int8
    assert kept.scales.shape == (32, 4)
    assert kept.scales.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shape", [(40, 384), (19, 200)])
def test_a_few_rows_times_int8_are_the_values_products(rows: int, shape: tuple[int, int]) -> None:
    weight = int8.quantise(random(*shape).bfloat16())
    x = random(rows, shape[1], seed=1).bfloat16()
    found = int8.linear(x.to(DEVICE), on_device(weight)).cpu()
    assert found.dtype == torch.bfloat16
    assert_product(found, x, values(weight), HALF_ULP_BF16)


def test_more_rows_take_the_matrix_in_bf16() -> None:
    weight = int8.quantise(random(40, 200).bfloat16())
    x = random(9, 200, seed=1).bfloat16()
    wide = int8.dequantise(weight)
    assert torch.equal(wide, values(weight).bfloat16())
    found = int8.linear(x.to(DEVICE), on_device(weight)).cpu()
    assert_product(found, x, wide, HALF_ULP_BF16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 8])
def test_logits_are_the_exact_products_summed_in_fp32(rows: int, dtype: torch.dtype) -> None:
    weight = random(150, 200).bfloat16()
    x = random(rows, 200, seed=1).to(dtype)
    found = logits(x.to(DEVICE), weight.to(DEVICE)).cpu()
    assert found.dtype == torch.float32
    assert_product(found, x, weight)


def test_k2s_widths() -> None:
    """The columns of K2's head and of its widest INT8 matrix, a few rows of each."""
    weight, x = random(20, 7168).bfloat16(), random(2, 7168, seed=1)
    assert_product(logits(x.to(DEVICE), weight.to(DEVICE)).cpu(), x, weight)
    small, wide = int8.quantise(random(20, 18_432).bfloat16()), random(1, 18_432, seed=2).bfloat16()
    found = int8.linear(wide.to(DEVICE), on_device(small)).cpu()
    assert_product(found, wide, values(small), HALF_ULP_BF16)


def test_a_rows_bits_do_not_depend_on_its_neighbours_and_nan_stays_its_own() -> None:
    weight, x = random(70, 256).bfloat16().to(DEVICE), random(5, 256, seed=1).to(DEVICE)
    x[3, 9] = torch.nan
    together = logits(x, weight)
    assert together[3].isnan().all()
    for row in (0, 1, 2, 4):
        assert torch.equal(together[row : row + 1], logits(x[row : row + 1], weight))


def launch_k2() -> None:
    """K2's head with fp32 and bf16 activations, and an INT8 matrix."""
    vocab = torch.empty(163_840, 7168, dtype=torch.bfloat16)
    x = torch.empty(8, 7168)
    logits(x, vocab)
    logits(x.bfloat16(), vocab)
    codes, scales = torch.empty(7168, 8192, dtype=torch.int8), torch.empty(7168, 64)
    weight = int8.Int8Linear(codes, scales.bfloat16(), 8192)
    int8.linear(torch.empty(8, 8192, dtype=torch.bfloat16), weight)


def test_the_kernels_compile_for_every_card_within_its_shared_memory() -> None:
    found = compiled(__name__, launch_k2.__name__)
    assert [kernel.card for kernel in found] == 3 * list(CARDS)
    for kernel in found:
        assert kernel.shared_bytes <= MOST_SHARED_BYTES, kernel
        assert kernel.stack_bytes <= MOST_STACK_BYTES, kernel

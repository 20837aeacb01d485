"""Triton's interpreter as these tests use it: bf16 numbers convert and multiply as on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.triton_kernels import DEVICE

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def multiply_kernel(a, b, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + places, tl.dot(tl.load(a + places), tl.load(b + places)))


@triton.jit
def convert_kernel(values, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, N)
    tl.store(out + places, tl.load(values + places).to(tl.bfloat16))


def test_products_of_bf16_tiles_are_products_of_their_values() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-9, 10, (16, 16), generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(16, 16, device=DEVICE)
    multiply_kernel[(1,)](a.to(DEVICE), b.to(DEVICE), out, N=16)
    assert torch.equal(out.cpu(), a.float() @ b.float())


def test_fp32_is_rounded_to_the_nearest_bf16_ties_to_even() -> None:
    ulp = 2.0**-7
    values = torch.tensor([1 + ulp / 2, 1 + 3 * ulp / 2, 1 + 0.51 * ulp, -1 - 0.51 * ulp])
    values = torch.cat((values, torch.tensor([float("nan"), float("inf"), 3.4e38, 1e-40])))
    out = torch.empty(8, dtype=torch.bfloat16, device=DEVICE)
    convert_kernel[(1,)](values.to(DEVICE), out, N=8)
    torch.testing.assert_close(out.cpu(), values.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_integers_become_the_bf16_numbers_of_their_value() -> None:
    values = torch.arange(-128, 128, dtype=torch.int8)
    out = torch.empty(256, dtype=torch.bfloat16, device=DEVICE)
    convert_kernel[(1,)](values.to(DEVICE), out, N=256)
    assert torch.equal(out.cpu(), values.bfloat16())

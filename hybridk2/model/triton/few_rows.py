"""Products of a few rows of activations with a matrix that is read once: what decoding waits for.

Owns the kernel for bf16 matrices and INT8 ones with a scale for every group of columns; does not
know which matrix it is. Activations are bf16, or fp32 taken apart into three bf16 numbers, which is
exact; INT8 codes are bf16 numbers as they stand. So every product is exact, and sums are fp32.

A program owns some rows of the matrix and passes along their columns, with a few tiles on their
way into shared memory; the activations come from L2. Rows of activations are filled up to the 16
that a product of tiles takes: a row's bits are the same whatever is beside it and however many
there are. Bytes: those of the matrix, plus 16 rows of activations from L2 for each program.

On an H100, share of the speed of a copy of one row's product (torch's own bf16 product beside it):
7168 x 8192 1.1 in bf16 (1.1), 0.8 in INT8; 36,864 x 7168 1.2 (1.2), 1.05; 2048 x 7168 INT8 0.28. A
matrix of few rows makes few programs and stays below: 576 x 7168, K2's kv_a, 0.20 (0.46).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 8
_TILE_ROWS = 16
_COLUMNS = 128  # of a tile: a group of INT8 scales
# Rows of the matrix and warps of a program, tiles under way: 40 KB of a program (bf16) and 24 KB
# (INT8). The fastest of six and of five that were tried on an H100.
_BF16_TILING = (32, 4, 4)
_INT8_TILING = (32, 4, 6)


def product(x: Tensor, weight: Tensor, scales: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x weight^T, or x (codes * scales)^T.

    x: (rows <= MAX_ROWS, columns) bf16 or fp32. weight: (outputs, columns) bf16, scales None; or
    codes int8 and scales (outputs, columns / 128) bf16, columns then a multiple of 128 or x
    narrower than the codes, which are zero there. Returns (rows, outputs) of out_dtype.
    """
    rows, columns = x.shape
    outputs, width = weight.shape
    assert 0 < rows <= MAX_ROWS, f"{rows} rows"
    assert x.dtype in (torch.bfloat16, torch.float32), f"x: {x.dtype}"
    if scales is None:
        assert weight.dtype == torch.bfloat16, f"weight: {weight.dtype}"
        assert width == columns, f"x: {columns} columns, weight: {width}"
    else:
        groups = triton.cdiv(columns, _COLUMNS)
        assert weight.dtype == torch.int8, f"codes: {weight.dtype}"
        assert scales.dtype == torch.bfloat16, f"scales: {scales.dtype}"
        assert width == groups * _COLUMNS, f"x: {columns} columns, codes: {width}"
        assert scales.shape == (outputs, groups), f"scales: {tuple(scales.shape)}"
        assert scales.is_contiguous(), f"scales: strides {scales.stride()}"
    assert x.stride(1) == 1, f"x: strides {x.stride()}"
    assert weight.is_contiguous(), f"weight: strides {weight.stride()}"
    matrix_rows, warps, stages = _BF16_TILING if scales is None else _INT8_TILING
    out = x.new_empty((rows, outputs), dtype=out_dtype)
    _multiply[(triton.cdiv(outputs, matrix_rows),)](
        x,
        weight,
        weight if scales is None else scales,
        out,
        rows,
        columns,
        outputs,
        x.stride(0),
        WIDTH=width,
        TILE_ROWS=_TILE_ROWS,
        MATRIX_ROWS=matrix_rows,
        COLUMNS=_COLUMNS,
        PARTS=1 if x.dtype == torch.bfloat16 else 3,
        SCALED=scales is not None,
        num_warps=warps,
        num_stages=stages,
    )
    return out


@triton.jit
def split_fp32(x: tl.tensor) -> tl.tensor:
    """An fp32 tile as three bf16 tiles whose sum it is: 24 bits of significand in 8 + 8 + 8."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return high, middle, low


@triton.jit
def add_product(a: tl.tensor, b: tl.tensor, total: tl.tensor, PARTS: tl.constexpr) -> tl.tensor:
    """total + a b in fp32. b is bf16; a is made bf16 (PARTS 1), or fp32 and taken apart (3)."""
    if PARTS == 1:
        total = tl.dot(a.to(tl.bfloat16), b, total)
    else:
        high, middle, low = split_fp32(a)
        total = tl.dot(low, b, total)
        total = tl.dot(middle, b, total)
        total = tl.dot(high, b, total)
    return total


@triton.jit
def _multiply(
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_outputs: tl.tensor,
    x_stride: tl.tensor,
    WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    MATRIX_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    rows = tl.arange(0, TILE_ROWS)
    outputs = tl.program_id(0) * MATRIX_ROWS + tl.arange(0, MATRIX_ROWS)
    output_exists = outputs < num_outputs
    # 64 bits: K2's head has 1.2 * 10^9 elements, a larger one would have more than 2^31.
    weight_rows = weight + outputs.to(tl.int64) * WIDTH
    total = tl.zeros((TILE_ROWS, MATRIX_ROWS), tl.float32)
    for begin in range(0, num_columns, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        activations = tl.load(
            x + rows[:, None] * x_stride + columns[None, :],
            mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :],
            other=0.0,
        )
        tile = tl.load(
            weight_rows[:, None] + columns[None, :],
            mask=output_exists[:, None] & (columns < WIDTH)[None, :],
            other=0,
        )
        if SCALED:
            groups: tl.constexpr = WIDTH // COLUMNS
            scale = tl.load(
                scales + outputs * groups + begin // COLUMNS, mask=output_exists, other=0.0
            )
            share = tl.zeros((TILE_ROWS, MATRIX_ROWS), tl.float32)
            share = add_product(activations, tl.trans(tile.to(tl.bfloat16)), share, PARTS)
            total += share * scale.to(tl.float32)[None, :]
        else:
            total = add_product(activations, tl.trans(tile), total, PARTS)
    tl.store(
        out + rows[:, None].to(tl.int64) * num_outputs + outputs[None, :],
        total,
        mask=(rows < num_rows)[:, None] & output_exists[None, :],
    )

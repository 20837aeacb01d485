"""INT4 experts on the GPU, straight from the panels that the host's kernels read.

Owns the kernels for experts that live here (decoding) and for widening an expert that passes
through (prefill). The layout is csrc/kernels/kernels.h's, of one NUMA node: an expert is its strips
of gate and up, then those of down. Of a strip, line n (of all its blocks, 8 a block) holds columns
8n to 8n + 7 of its rows, a 32-bit word a row, so lines are to columns what an index is to eight.

The arithmetic is the host's: values are exact, sums fp32, silu(gate) * up rounded to bf16, weighted
sums of experts fp32 in a fixed order. Sums are cut elsewhere than on the host, so bits differ.

A nibble becomes fp32 in two operations, where it stands in its word. `word & 15 << s | 2^23's bits`
is the fp32 number 2^23 + nibble * 2^s, for s up to 12; what is subtracted leaves (nibble - 8) *
2^s exactly, and two columns' sum of products is multiplied by 2^-s instead, which is exact as well.
Converting instructions run at a quarter of that rate or less. One shift by 16 brings the upper four
nibbles down. About 3.6 operations a weight, 19 * 10^12 a second for the 5.3 * 10^12 weights that 3
TB/s are, of 29 * 10^12 that an H100 can do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TOKENS = 8

_PANEL_ROWS = 16
_STRIP_ROWS = 32
_BLOCK_COLUMNS = 64
_GROUP_COLUMNS = 32
_STRIP_BLOCK_BYTES = 1152
_LINES_PER_BLOCK = 8

# Lines of a strip that a program takes at a time, 128 bytes each, and its warps. Of one token's
# experts an H100 reads at 0.61 (128 lines, 8 warps), 0.71 (64, 8), 0.70 (64, 4), 0.59 (32, 4) and
# 0.56 (256, 8) of the speed of a copy; of eight tokens' at 0.45, 0.54, 0.55, 0.57 and 0.41.
_LINES = 64
_WARPS = 8
# Of the widening kernel, which writes 16 bf16 rows of 8 columns a line.
_WIDENED_LINES = 32
_WIDENING_WARPS = 4


def expert_bytes(hidden: int, intermediate: int) -> int:
    """Bytes of one expert in panels, rows and columns that fill up blocks included."""
    gate_up = intermediate // _PANEL_ROWS * _blocks(hidden)
    down = hidden // _STRIP_ROWS * _blocks(intermediate)
    return (gate_up + down) * _STRIP_BLOCK_BYTES


def resident_experts(
    x: Tensor, places: Tensor, weights: Tensor, panels: Tensor, *, intermediate: int
) -> Tensor:
    """Weighted sum of the experts that live here, for a few tokens.

    x: (tokens <= MAX_TOKENS, hidden) bf16. places: (tokens, k) int32, index into panels, or -1
    where another place computes that expert. weights: (tokens, k) fp32. panels: (experts,
    expert_bytes) uint8. hidden, intermediate: multiples of 32. All dense.

    Returns (tokens, hidden) fp32: sum over k, in the order of k, of weight_k * expert_k(x); zeros
    where every place is -1. A token's bits depend on its own row alone. Nothing is read back:
    places that panels do not have are the caller's to prevent. Reads an expert's bytes once for
    every token that picked it, from L2 if tokens share it.
    """
    tokens, hidden = x.shape
    picks = places.shape[1]
    assert 0 < tokens <= MAX_TOKENS, f"{tokens} tokens"
    assert x.dtype == torch.bfloat16, f"x: {x.dtype}"
    assert places.dtype == torch.int32, f"places: {places.dtype}"
    assert weights.dtype == torch.float32, f"weights: {weights.dtype}"
    assert places.shape == weights.shape == (tokens, picks), f"{places.shape}, {weights.shape}"
    for name, tensor in (("x", x), ("places", places), ("weights", weights), ("panels", panels)):
        assert tensor.is_contiguous(), f"{name}: strides {tensor.stride()}"
    _check_panels(panels, (panels.shape[0],), hidden, intermediate)
    words, scales = panels.view(torch.int32), panels.view(torch.bfloat16)
    middle = x.new_empty((tokens * picks, intermediate))
    out = x.new_empty((tokens, hidden), dtype=torch.float32)
    gate_up_strips = intermediate // _PANEL_ROWS
    _gate_up[(gate_up_strips, tokens * picks)](
        x,
        places,
        words,
        scales,
        middle,
        hidden,
        picks,
        BLOCKS=_blocks(hidden),
        EXPERT_BYTES=panels.shape[1],
        LINES=_LINES,
        num_warps=_WARPS,
    )
    _down[(hidden // _STRIP_ROWS, tokens)](
        middle,
        places,
        weights,
        words,
        scales,
        out,
        intermediate,
        picks,
        BLOCKS=_blocks(intermediate),
        EXPERT_BYTES=panels.shape[1],
        DOWN_BYTES=gate_up_strips * _blocks(hidden) * _STRIP_BLOCK_BYTES,
        LINES=_LINES,
        num_warps=_WARPS,
    )
    return out


def dequantise(
    panel: Tensor, *, hidden: int, intermediate: int, gate_up_out: Tensor, down_out: Tensor
) -> None:
    """One expert's values, (4-bit value) * scale: exact in fp32, rounded to the nearest in bf16.

    panel: (expert_bytes,) uint8. gate_up_out: (2 * intermediate, hidden), gate over up. down_out:
    (hidden, intermediate). Both dense, fp32 or bf16. For an expert of K2 reads 24.8 MB and writes
    176 MB of fp32.
    """
    _check_panels(panel, (), hidden, intermediate)
    for name, out, shape in (
        ("gate_up_out", gate_up_out, (2 * intermediate, hidden)),
        ("down_out", down_out, (hidden, intermediate)),
    ):
        assert out.shape == shape, f"{name}: {tuple(out.shape)}, expected {shape}"
        assert out.dtype in (torch.float32, torch.bfloat16), f"{name}: {out.dtype}"
        assert out.is_contiguous(), f"{name}: strides {out.stride()}"
    gate_up_strips = intermediate // _PANEL_ROWS
    down_bytes = gate_up_strips * _blocks(hidden) * _STRIP_BLOCK_BYTES
    # Rows of a strip's first panel begin at strip * step, those of its second `apart` further on.
    for strips, step, apart, part, out in (
        (gate_up_strips, _PANEL_ROWS, intermediate, panel[:down_bytes], gate_up_out),
        (hidden // _STRIP_ROWS, _STRIP_ROWS, _PANEL_ROWS, panel[down_bytes:], down_out),
    ):
        columns = out.shape[1]
        lines = _blocks(columns) * _LINES_PER_BLOCK
        _widen[(strips, triton.cdiv(lines, _WIDENED_LINES), 2)](
            part.view(torch.int32),
            part.view(torch.bfloat16),
            out,
            columns,
            step,
            apart,
            BLOCKS=_blocks(columns),
            LINES=_WIDENED_LINES,
            num_warps=_WIDENING_WARPS,
        )


def _blocks(columns: int) -> int:
    return -(-columns // _BLOCK_COLUMNS)


def _check_panels(panels: Tensor, leading: tuple[int, ...], hidden: int, intermediate: int) -> None:
    assert hidden % _GROUP_COLUMNS == 0, f"{hidden=}"
    assert intermediate % _GROUP_COLUMNS == 0, f"{intermediate=}"
    expected = (*leading, expert_bytes(hidden, intermediate))
    assert panels.shape == expected, f"panels: {tuple(panels.shape)}, expected {expected}"
    assert panels.dtype == torch.uint8, f"panels: {panels.dtype}"
    assert panels.is_contiguous(), f"panels: strides {panels.stride()}"
    assert panels.data_ptr() % 64 == 0, "panels: not at a multiple of 64 bytes"


@triton.jit
def _value(words: tl.tensor, COLUMN: tl.constexpr) -> tl.tensor:
    """Column COLUMN of each word's eight as (nibble - 8) * 2^(4 * (COLUMN // 2)) in fp32."""
    half = words if COLUMN % 2 == 0 else words >> 16
    shift: tl.constexpr = 4 * (COLUMN // 2)
    bits = (half & (15 << shift)) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + (8 << shift))


@triton.jit
def _pair(words: tl.tensor, even: tl.tensor, odd: tl.tensor, COLUMN: tl.constexpr) -> tl.tensor:
    """Columns COLUMN, an even one, and COLUMN + 1 of each word, multiplied by theirs of x."""
    pair = _value(words, COLUMN) * even[:, :, None] + _value(words, COLUMN + 1) * odd[:, :, None]
    return pair * (1.0 / (1 << (2 * COLUMN)))


@triton.jit
def _read_lines(
    words: tl.tensor, scales: tl.tensor, begin: tl.tensor, BLOCKS: tl.constexpr, LINES: tl.constexpr
) -> tl.tensor:
    """Words and scales of LINES lines of a strip: (lines, 8 fours of rows, 4 rows).

    In int32 and in bf16 a block has 288 and 576 elements, a panel 144 and 288, of which the scales
    are the last 32: 16 rows of each group of four lines.
    """
    fours = tl.arange(0, 8)
    row = tl.arange(0, 4)[None, None, :]
    lines = begin + tl.arange(0, LINES)
    there = (lines < BLOCKS * 8)[:, None, None]
    block, line = lines // 8, lines % 8
    at = (block * 288 + line * 16)[:, None] + (fours // 4 * 144 + fours % 4 * 4)[None, :]
    word = tl.load(words + at[:, :, None] + row, mask=there, other=0)
    at = (block * 576 + 256 + line // 4 * 16)[:, None]
    at = at + (fours // 4 * 288 + fours % 4 * 4)[None, :]
    scale = tl.load(scales + at[:, :, None] + row, mask=there, other=0.0)
    return word.to(tl.uint32, bitcast=True), scale


@triton.jit
def _strip_sums(
    words: tl.tensor,
    scales: tl.tensor,
    x: tl.tensor,
    num_columns: tl.tensor,
    BLOCKS: tl.constexpr,
    LINES: tl.constexpr,
) -> tl.tensor:
    """Products of one strip's 32 rows with x: (32,) fp32, those of the first panel first.

    words, scales: where the strip begins, in int32 and in bf16.

    The last dimension of tiles is what a thread loads at once, 16 bytes of words, 16 of x, 8 of
    scales, and the first two say which thread, alike for all three. So nothing moves between
    threads before the sum at the end. (x as a vector of lines took 20 barriers for every tile.) The
    next tile's words are asked for before this one's are used; asynchronous copies would have to
    take x along, from L2, eight times what they need.
    """
    fours = tl.arange(0, 8)[None, :, None]
    column = tl.arange(0, 8)[None, None, :]
    sums = tl.zeros((LINES, 8, 4), tl.float32)
    word, scale = _read_lines(words, scales, 0, BLOCKS, LINES)
    for begin in range(0, BLOCKS * 8, LINES):
        next_word, next_scale = _read_lines(words, scales, begin + LINES, BLOCKS, LINES)
        at = (begin + tl.arange(0, LINES))[:, None, None] * 8 + fours * 0 + column
        eight = tl.load(x + at, mask=at < num_columns, other=0.0).to(tl.float32)
        # Each split takes the lowest bit of the column's number.
        even, odd = tl.split(tl.reshape(eight, (LINES, 8, 4, 2)))
        even_04, even_26 = tl.split(tl.reshape(even, (LINES, 8, 2, 2)))
        odd_15, odd_37 = tl.split(tl.reshape(odd, (LINES, 8, 2, 2)))
        x0, x4 = tl.split(even_04)
        x2, x6 = tl.split(even_26)
        x1, x5 = tl.split(odd_15)
        x3, x7 = tl.split(odd_37)
        share = _pair(word, x0, x1, 0) + _pair(word, x2, x3, 2)
        share += _pair(word, x4, x5, 4) + _pair(word, x6, x7, 6)
        sums += share * scale.to(tl.float32)
        word, scale = next_word, next_scale
    return tl.reshape(tl.sum(sums, axis=0), (32,))


@triton.jit
def _gate_up(
    x: tl.tensor,
    places: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    middle: tl.tensor,
    hidden: tl.tensor,
    picks: tl.tensor,
    BLOCKS: tl.constexpr,
    EXPERT_BYTES: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    """16 columns of silu(gate x) * up x for one pick of one token, if its expert lives here."""
    strip = tl.program_id(0)
    pick = tl.program_id(1)
    place = tl.load(places + pick).to(tl.int64)
    if place < 0:
        return
    sums = _strip_sums(
        words + place * (EXPERT_BYTES // 4) + strip * (BLOCKS * 288),
        scales + place * (EXPERT_BYTES // 2) + strip * (BLOCKS * 576),
        x + pick // picks * hidden,
        hidden,
        BLOCKS,
        LINES,
    )
    both = tl.reshape(sums, (2, 16))
    first = (tl.arange(0, 2) == 0)[:, None]
    gate = tl.sum(tl.where(first, both, 0.0), axis=0)
    up = tl.sum(tl.where(first, 0.0, both), axis=0)
    product = gate / (1.0 + tl.exp(-gate)) * up
    columns = strip * 16 + tl.arange(0, 16)
    tl.store(middle + pick * (tl.num_programs(0) * 16) + columns, product.to(tl.bfloat16))


@triton.jit
def _down(
    middle: tl.tensor,
    places: tl.tensor,
    weights: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    intermediate: tl.tensor,
    picks: tl.tensor,
    BLOCKS: tl.constexpr,
    EXPERT_BYTES: tl.constexpr,
    DOWN_BYTES: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    """32 values of one token's output: the weighted sum over its picks that live here."""
    strip = tl.program_id(0)
    token = tl.program_id(1)
    total = tl.zeros((32,), tl.float32)
    for pick in range(token * picks, (token + 1) * picks):
        place = tl.load(places + pick).to(tl.int64)
        if place >= 0:
            sums = _strip_sums(
                words + place * (EXPERT_BYTES // 4) + DOWN_BYTES // 4 + strip * (BLOCKS * 288),
                scales + place * (EXPERT_BYTES // 2) + DOWN_BYTES // 2 + strip * (BLOCKS * 576),
                middle + pick * intermediate,
                intermediate,
                BLOCKS,
                LINES,
            )
            total += tl.load(weights + pick) * sums
    tl.store(out + token * (tl.num_programs(0) * 32) + strip * 32 + tl.arange(0, 32), total)


@triton.jit
def _widened(words: tl.tensor, scale: tl.tensor, COLUMN: tl.constexpr) -> tl.tensor:
    """Column COLUMN of each word's eight in fp32. The power of two leaves the value by a factor."""
    value = _value(words, COLUMN) * (1.0 / (1 << (4 * (COLUMN // 2))))
    return value * scale


@triton.jit
def _widen(
    words: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    num_columns: tl.tensor,
    strip_step: tl.tensor,
    panel_step: tl.tensor,
    BLOCKS: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    """16 rows and 8 * LINES columns of a matrix."""
    strip, panel = tl.program_id(0), tl.program_id(2)
    rows = tl.arange(0, 16)
    lines = tl.program_id(1) * LINES + tl.arange(0, LINES)
    there = (lines < BLOCKS * 8)[None, :]
    block, line = lines // 8, lines % 8
    word = tl.load(
        words
        + strip * (BLOCKS * 288)
        + panel * 144
        + (block * 288 + line * 16)[None, :]
        + rows[:, None],
        mask=there,
        other=0,
    ).to(tl.uint32, bitcast=True)
    scale = tl.load(
        scales
        + strip * (BLOCKS * 576)
        + panel * 288
        + 256
        + (block * 576 + line // 4 * 16)[None, :]
        + rows[:, None],
        mask=there,
        other=0.0,
    ).to(tl.float32)
    # Each join adds the next lower bit of the column's number behind the others.
    even = tl.join(
        tl.join(_widened(word, scale, 0), _widened(word, scale, 4)),
        tl.join(_widened(word, scale, 2), _widened(word, scale, 6)),
    )
    odd = tl.join(
        tl.join(_widened(word, scale, 1), _widened(word, scale, 5)),
        tl.join(_widened(word, scale, 3), _widened(word, scale, 7)),
    )
    tile = tl.reshape(tl.join(even, odd), (16, LINES * 8))
    columns = tl.program_id(1) * (LINES * 8) + tl.arange(0, LINES * 8)
    out_rows = (strip * strip_step + panel * panel_step + rows).to(tl.int64)
    tl.store(
        out + out_rows[:, None] * num_columns + columns[None, :],
        tile.to(out.dtype.element_ty),
        mask=(columns < num_columns)[None, :],
    )

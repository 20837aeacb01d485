"""Absorbed attention of decoding over the paged latent cache, split over the keys.

Owns the kernels and the shapes they take; does not know layers, weights or who holds a page. On
Hopper cards K2's bf16 queries and latents go to hybridk2/model/hopper instead, which does the same.

For each row (one new token of one sequence) and head, over the keys t < length:

  score[t] = scale * (q . latent[t]),   out = sum over t of softmax(score)[t] * latent[t][:rank]

The latent is both key and value, so a tile of the cache is read once and used twice. A program owns
`heads` heads of a row and one of `splits` shares of its keys; it leaves a largest score, a sum of
exponentials and an unnormalised sum of latents, which a second kernel joins (flash decoding; the
rescaling is Milakov and Gimelshein's, arXiv 1805.02867). Shares are cut by the length that the
kernel reads from device memory, so a captured graph serves every length.

Products are of bf16 numbers, sums are fp32. Softmax weights are rounded to bf16 before they meet
the latents, as every flash kernel does: an output is off by 2^-8 of the weighted mean of |latent|
at most. With fp32 queries nothing is rounded: queries and weights are taken apart into three bf16
numbers each, whose products are exact, at three times the multiplications.

Bytes: 1,152 a key for K2 (656 in fp8), from DRAM once a row: the programs of one share read the
same tiles at about the same time, all but the first from L2. Beside them stand 2,056 bytes of
partial sums a head and split, written and read again: 8.7 MB for one row and 66 splits, in L2,
against 37.7 MB of latents at 32K. A key costs 139 kFLOP in 64 heads, 121 FLOP a byte: at 3 TB/s 365
TFLOP/s, which is why a second product for what bf16 weights lose was left out, and why a Hopper
card has all 64 heads in one program, whose large products run at twice the rate. FP8 tiles are
decoded by every program that reads them, with about 7 integer and fp32 operations a value, so they
save memory, not time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridk2.model.triton.few_rows import add_product
from hybridk2.model.triton.latents import (
    GROUP,
    check_dimensions,
    dequantise_latents,
    groups_of,
    quantise_latents,
    token_bytes,
)

__all__ = [
    "LOG2_E",
    "PAGE_TOKENS",
    "TILINGS",
    "Tiling",
    "check_inputs",
    "decode",
    "dequantise_latents",
    "quantise_latents",
    "splits_for",
    "tiling_for",
]

PAGE_TOKENS = 64
LOG2_E = 1.4426950408889634
_MIN_DOT = 16  # the smallest side that a product of tiles may have
# The combining kernel: splits that it reads at a time, and columns of a program.
_JOINED_SPLITS = 128
_JOINED_COLUMNS = 32


@dataclass(frozen=True)
class Tiling:
    """heads of one program, keys of one tile (a page at most), warps, and Triton's num_stages: with
    3 there are three tiles in shared memory, of which one is on its way while another is computed
    with. parts: 2 where a program sums half of the columns, and two programs compute the same
    scores; of bf16 latents alone. programs: of a multiprocessor, between which a row is divided."""

    heads: int
    keys: int
    warps: int
    stages: int
    parts: int = 1
    programs: int = 2


# The fastest of those that were tried on an H100. Microseconds of a row of 32,768 and of 262,144
# keys: 30 and 149 of the first, 41 and 241 of _EVERYWHERE, which has room on every card (91 KB of
# shared memory, the first 216) and the products that those before Hopper know. With FP8 latents 46
# of the second and 117 of _EVERYWHERE at 32,768 keys. Fp32 queries need more memory. On a Hopper
# card the first is what is left where the driver refuses hybridk2/model/hopper's kernel.
_HOPPER = Tiling(heads=64, keys=32, warps=4, stages=4, parts=2, programs=1)
_HOPPER_FP8 = Tiling(heads=64, keys=32, warps=8, stages=3, programs=1)
_EVERYWHERE = Tiling(heads=16, keys=32, warps=4, stages=3)
_FP8 = Tiling(heads=16, keys=32, warps=8, stages=3)
_FP32 = Tiling(heads=16, keys=32, warps=8, stages=2)
TILINGS = (_HOPPER, _HOPPER_FP8, _EVERYWHERE, _FP8, _FP32)
_HOPPER_BYTES = 216 * 1024


def tiling_for(
    queries: torch.dtype, latents: torch.dtype, heads: int, program_bytes: int
) -> Tiling:
    """queries, latents: their dtypes. heads: of a row. program_bytes: shared memory that the card
    gives one program."""
    if queries != torch.bfloat16:
        return _FP32
    is_hopper = heads >= _HOPPER.heads and program_bytes >= _HOPPER_BYTES
    if latents == torch.uint8:
        return _HOPPER_FP8 if is_hopper else _FP8
    return _HOPPER if is_hopper else _EVERYWHERE


def splits_for(rows: int, heads: int, multiprocessors: int, tiling: Tiling) -> int:
    """Shares of a row's keys that make tiling.programs for every multiprocessor.

    Of rows, heads and card alone, never of lengths. A row's bits depend on it.
    """
    programs = rows * triton.cdiv(heads, tiling.heads) * tiling.parts
    return max(1, tiling.programs * multiprocessors // programs)


def decode(
    q: Tensor,
    latents: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    rank: int,
    splits: int,
    tiling: Tiling,
) -> Tensor:
    """Each row's softmax-weighted mean of its latents, head by head.

    q: (rows, heads, rank + rope) bf16 or fp32, absorbed queries; their last dimension is dense.
    latents: one layer of the cache: (pages, 64, rank + rope) bf16, or (pages, 64, token_bytes)
    uint8 as quantise_latents makes it; pages may lie apart, a page is dense. page_table: (rows,
    max_pages) int32, dense rows: where token t of a row lies: page t // 64, place t % 64. Entries
    beyond a row's length are not read. lengths: (rows,) int32, at most 64 * max_pages; 0 for
    padding, which comes to zero. splits: see splits_for.

    Returns (rows, heads, rank) fp32. A row's bits depend on its own queries and keys, on `splits`
    and on `tiling`. Nothing is read back: page ids and lengths out of range are the caller's to
    prevent.
    """
    rows, heads, latent_dim = q.shape
    rope = latent_dim - rank
    fp8 = check_inputs(q, latents, page_table, lengths, rank)
    assert splits > 0, f"{splits=}"
    assert PAGE_TOKENS % tiling.keys == 0, f"{tiling.keys=} cuts across pages"
    assert tiling.parts == 1 or not fp8, "FP8 latents have whole programs"
    out = q.new_empty((rows, heads, rank), dtype=torch.float32)
    sums = out.new_empty((rows, heads, splits, rank))
    # Of each part: their scores' sums are in another order, so they are no copies of each other.
    largest = out.new_empty((rows, heads, tiling.parts, splits))
    totals = torch.empty_like(largest)
    # The FP8 layout is read through three types; for bf16 all three are the cache itself.
    scales, keys = (
        (latents.view(torch.float32), latents.view(torch.bfloat16)) if fp8 else (latents, latents)
    )
    _attend[(triton.cdiv(heads, tiling.heads) * tiling.parts, splits, rows)](
        q,
        latents,
        scales,
        keys,
        page_table,
        lengths,
        sums,
        largest,
        totals,
        q.stride(0),
        q.stride(1),
        page_table.stride(0),
        heads,
        scale * LOG2_E,
        PAGE_STRIDE=latents.stride(0),
        TOKEN_STRIDE=latents.stride(1),
        RANK=rank,
        ROPE=rope,
        BLOCK_RANK=_block(rank) // tiling.parts,
        BLOCK_ROPE=_block(rope),
        RANK_PARTS=tiling.parts,
        HEADS=tiling.heads,
        KEYS=tiling.keys,
        PARTS=1 if q.dtype == torch.bfloat16 else 3,
        FP8=fp8,
        WIDTH=min(_block(rank), GROUP),
        GROUPS=groups_of(rank),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    columns = min(_block(rank) // tiling.parts, _JOINED_COLUMNS)
    _join[(triton.cdiv(rank, columns), heads, rows)](
        lengths,
        sums,
        largest,
        totals,
        out,
        splits,
        RANK=rank,
        PART_COLUMNS=_block(rank) // tiling.parts,
        RANK_PARTS=tiling.parts,
        KEYS=tiling.keys,
        BLOCK_SPLITS=triton.next_power_of_2(splits),
        JOINED=_JOINED_SPLITS,
        COLUMNS=columns,
        num_warps=4,
    )
    return out


def _block(width: int) -> int:
    return max(triton.next_power_of_2(width), _MIN_DOT)


def check_inputs(
    q: Tensor, latents: Tensor, page_table: Tensor, lengths: Tensor, rank: int
) -> bool:
    """Refuse what a kernel would misread, as `decode` describes it; whether the latents are FP8."""
    rows, _, latent_dim = q.shape
    assert 0 < rank < latent_dim, f"{rank=} of {latent_dim} values a latent"
    assert q.dtype in (torch.bfloat16, torch.float32), f"q: {q.dtype}"
    assert q.stride(2) == 1, f"q: strides {q.stride()}"
    fp8 = latents.dtype == torch.uint8
    assert fp8 or latents.dtype == torch.bfloat16, f"latents: {latents.dtype}"
    width = latent_dim
    if fp8:
        check_dimensions(rank, latent_dim - rank)
        width = token_bytes(rank, latent_dim - rank)
    assert latents.shape[1:] == (PAGE_TOKENS, width), f"latents: {tuple(latents.shape)}, {width=}"
    assert latents.stride()[1:] == (width, 1), f"latents: strides {latents.stride()}"
    assert page_table.dtype == lengths.dtype == torch.int32, f"{page_table.dtype}, {lengths.dtype}"
    assert page_table.shape[0] == rows, f"page_table: {tuple(page_table.shape)}, {rows} rows"
    assert page_table.stride(1) == 1, f"page_table: strides {page_table.stride()}"
    assert lengths.shape == (rows,), f"lengths: {tuple(lengths.shape)}, {rows} rows"
    assert lengths.is_contiguous(), f"lengths: strides {lengths.stride()}"
    return fp8


@triton.jit
def _fp8_tile(
    codes: tl.tensor,
    scales: tl.tensor,
    code_offsets: tl.tensor,
    scale_offsets: tl.tensor,
    present: tl.tensor,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
) -> tl.tensor:
    """Stored latents of some keys as (keys, BLOCK_RANK) bf16, exactly.

    A code's exponent and significand, put where fp16 has its own, are the code's value * 2^-8:
    fp16's bias is 15, e4m3's 7. That holds for subnormal codes too, and on every card, where
    conversions of e4m3 begin with sm_89.
    """
    groups = tl.arange(0, BLOCK_RANK // WIDTH)
    columns = groups[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    here = present[:, None, None] & (columns < RANK)[None, :, :]
    code = tl.load(codes + code_offsets[:, None, None] + columns[None, :, :], mask=here, other=0)
    wide = code.to(tl.uint16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    scale = tl.load(
        scales + scale_offsets[:, None] + groups[None, :],
        mask=present[:, None] & (groups < GROUPS)[None, :],
        other=0.0,
    )
    latent = (value * scale[:, :, None]).to(tl.bfloat16)
    return tl.reshape(latent, (latent.shape[0], BLOCK_RANK))


@triton.jit
def _attend(
    q: tl.tensor,
    latents: tl.tensor,
    scales: tl.tensor,
    keys: tl.tensor,
    page_table: tl.tensor,
    lengths: tl.tensor,
    sums: tl.tensor,
    largest: tl.tensor,
    totals: tl.tensor,
    q_row_stride: tl.tensor,
    q_head_stride: tl.tensor,
    table_row_stride: tl.tensor,
    num_heads: tl.tensor,
    scale: tl.tensor,
    PAGE_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    RANK_PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    FP8: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """One share of one row's keys for HEADS heads; scale includes log2(e), exponentials are 2^x.

    BLOCK_RANK: columns of the result, all of them or, of RANK_PARTS 2, the first or second half;
    scores take the other half as well. FP8: a latent has GROUPS scales, one for every WIDTH of its
    columns.

    Programs of one share follow each other in the grid, so that its tiles are in L2 for all but one
    of them. Strides are compile-time constants: how far loads may be widened rests on what divides
    them, and 328, the FP8 token in bf16, is no multiple of the 16 that Triton looks for itself.
    """
    split = tl.program_id(1)
    row = tl.program_id(2)
    num_splits = tl.num_programs(1)
    length = tl.load(lengths + row)
    share = tl.cdiv(tl.cdiv(length, KEYS), num_splits) * KEYS
    first = split * share
    last = tl.minimum(first + share, length)
    if first >= last:
        return  # _join knows which shares are empty, and does not read them

    heads = tl.program_id(0) // RANK_PARTS * HEADS + tl.arange(0, HEADS)
    part = tl.program_id(0) % RANK_PARTS
    columns = part * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    others = (1 - part) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    rotated = tl.arange(0, BLOCK_ROPE)
    head_exists = heads < num_heads
    q_rows = q + row.to(tl.int64) * q_row_stride + heads.to(tl.int64)[:, None] * q_head_stride
    q_latent = tl.load(
        q_rows + columns[None, :], mask=head_exists[:, None] & (columns < RANK)[None, :], other=0.0
    )
    if RANK_PARTS == 2:
        q_other = tl.load(
            q_rows + others[None, :],
            mask=head_exists[:, None] & (others < RANK)[None, :],
            other=0.0,
        )
    q_rotated = tl.load(
        q_rows + RANK + rotated[None, :],
        mask=head_exists[:, None] & (rotated < ROPE)[None, :],
        other=0.0,
    )

    top = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS, KEYS), tl.float32)
    mixed = tl.zeros((HEADS, BLOCK_RANK), tl.float32)
    table = page_table + row.to(tl.int64) * table_row_stride
    # 64 bits: a layer of the cache may have more than 2^31 elements.
    page = tl.load(table + first // 64).to(tl.int64)
    for start in range(first, last, KEYS):
        # The next tile's page is known a tile early: Triton asks for tiles ahead only where what
        # they need has not been asked for in the same round.
        after = start + KEYS
        next_page = tl.load(table + after // 64, mask=after < last, other=0).to(tl.int64)
        place = start % 64 + tl.arange(0, KEYS)
        present = start + tl.arange(0, KEYS) < last
        # What lies beyond the length is not read: it may be NaN, and 0 * NaN is not 0.
        if FP8:
            latent = _fp8_tile(
                latents + page * PAGE_STRIDE,
                scales + page * (PAGE_STRIDE // 4),
                place * TOKEN_STRIDE,
                place * (TOKEN_STRIDE // 4) + RANK // 4,
                present,
                RANK,
                BLOCK_RANK,
                WIDTH,
                GROUPS,
            )
            key_base = keys + page * (PAGE_STRIDE // 2)
            key_offsets = place * (TOKEN_STRIDE // 2) + (TOKEN_STRIDE // 2 - ROPE)
        else:
            tile = latents + page * PAGE_STRIDE + (place * TOKEN_STRIDE)[:, None]
            latent = tl.load(
                tile + columns[None, :],
                mask=present[:, None] & (columns < RANK)[None, :],
                other=0.0,
            )
            if RANK_PARTS == 2:
                other = tl.load(
                    tile + others[None, :],
                    mask=present[:, None] & (others < RANK)[None, :],
                    other=0.0,
                )
            key_base = keys + page * PAGE_STRIDE
            key_offsets = place * TOKEN_STRIDE + RANK
        key = tl.load(
            key_base + key_offsets[:, None] + rotated[None, :],
            mask=present[:, None] & (rotated < ROPE)[None, :],
            other=0.0,
        )
        scores = tl.zeros((HEADS, KEYS), tl.float32)
        scores = add_product(q_rotated, tl.trans(key), scores, PARTS)
        scores = add_product(q_latent, tl.trans(latent), scores, PARTS)
        if RANK_PARTS == 2:
            scores = add_product(q_other, tl.trans(other), scores, PARTS)
        scores = tl.where(present[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink[:, None] + weights
        mixed = add_product(weights, latent, mixed * shrink[:, None], PARTS)
        top = higher
        page = next_page

    line = row.to(tl.int64) * num_heads + heads
    at = (line * RANK_PARTS + part) * num_splits + split
    tl.store(largest + at, top, mask=head_exists)
    tl.store(totals + at, tl.sum(total, axis=1), mask=head_exists)
    tl.store(
        sums + (line * num_splits + split)[:, None] * RANK + columns[None, :],
        mixed,
        mask=head_exists[:, None] & (columns < RANK)[None, :],
    )


@triton.jit
def _join(
    lengths: tl.tensor,
    sums: tl.tensor,
    largest: tl.tensor,
    totals: tl.tensor,
    out: tl.tensor,
    num_splits: tl.tensor,
    RANK: tl.constexpr,
    PART_COLUMNS: tl.constexpr,
    RANK_PARTS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    JOINED: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Some columns of one head's output from all shares of its keys, in their order."""
    head = tl.program_id(1)
    row = tl.program_id(2)
    tiles = tl.cdiv(tl.load(lengths + row), KEYS)
    used = tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, num_splits), 1))
    line = row.to(tl.int64) * tl.num_programs(1) + head
    first = line * num_splits
    part = tl.program_id(0) * COLUMNS // PART_COLUMNS
    scored = (line * RANK_PARTS + part) * num_splits
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    splits = tl.arange(0, BLOCK_SPLITS)
    tops = tl.load(largest + scored + splits, mask=splits < used, other=float("-inf"))
    top = tl.max(tops, axis=0)
    total = 0.0
    mixed = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, used, JOINED):
        some = begin + tl.arange(0, JOINED)
        there = some < used
        # A share that is not there has the largest score -inf, hence the factor 0.
        factors = tl.exp2(tl.load(largest + scored + some, mask=there, other=float("-inf")) - top)
        total += tl.sum(factors * tl.load(totals + scored + some, mask=there, other=0.0), axis=0)
        share = tl.load(
            sums + (first + some)[:, None] * RANK + columns[None, :],
            mask=there[:, None] & (columns < RANK)[None, :],
            other=0.0,
        )
        mixed += tl.sum(factors[:, None] * share, axis=0)
    # Without a share both are 0, and so is the mean of a padding row.
    mean = mixed / tl.where(used > 0, total, 1.0)
    tl.store(out + line * RANK + columns, mean, mask=columns < RANK)

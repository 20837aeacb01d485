"""What decoding computes between its products, a launch each: norms, rotations, SwiGLU's middle.

Owns the kernels; does not know layers, weights or the cache's pages. Each stands for a handful of
torch's operators on a few kilobytes, where launches are all the time there is.

They round where those operators do, in their order: sums and products are of fp32 numbers, rounded
to the activations' dtype wherever torch would have kept a tensor of it. So no product may be fused
with a sum. What differs from torch is the order of the norm's sum, and the last bits of reciprocal
roots and exponentials, which are the card's own instructions.

Bytes: a row of K2's hidden state is 14 KB. A program owns a row or a part of one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# None of these has been tried against others on a card. A thread takes 16 columns of a norm, two
# loads of 16 bytes of bf16; more warps would spend longer on adding up their sums.
_NORM_COLUMNS_PER_WARP = 512
_MOST_WARPS = 16
# Heads whose queries a program rotates: about as much work as a latent is.
_ROTATED_HEADS = 8
_MIDDLE_COLUMNS = 1024  # of SwiGLU's middle: one load of 16 bytes a thread and operand


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `layers.rms_norm`. x: (rows, columns) bf16 or fp32, dense rows, of weight's dtype."""
    return _normed(x, None, None, weight, eps, None)


def add_rms_norm(
    hidden: Tensor, branch: Tensor, routed: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """hidden + (branch + routed), and its norm.

    hidden, branch: (rows, columns) of weight's dtype, bf16 or fp32. routed: the same in fp32, which
    is rounded to that dtype before it is added; None for none. All dense.
    """
    for name, term in (("branch", branch), ("routed", routed)):
        if term is not None:
            assert term.shape == hidden.shape, f"{name}: {tuple(term.shape)}, {hidden.shape}"
            assert term.is_contiguous(), f"{name}: strides {term.stride()}"
    assert hidden.is_contiguous(), f"hidden: strides {hidden.stride()}"
    assert branch.dtype == hidden.dtype, f"branch: {branch.dtype}, hidden: {hidden.dtype}"
    assert routed is None or routed.dtype == torch.float32, f"routed: {routed.dtype}"
    total = torch.empty_like(hidden)
    return total, _normed(hidden, branch, routed, weight, eps, total)


def _normed(
    x: Tensor,
    branch: Tensor | None,
    routed: Tensor | None,
    weight: Tensor,
    eps: float,
    total: Tensor | None,
) -> Tensor:
    rows, columns = x.shape
    assert x.dtype in (torch.bfloat16, torch.float32), f"x: {x.dtype}"
    assert weight.dtype == x.dtype, f"weight: {weight.dtype}, x: {x.dtype}"
    assert weight.shape == (columns,), f"weight: {tuple(weight.shape)}, {columns} columns"
    assert x.stride(1) == 1, f"x: strides {x.stride()}"
    block = triton.next_power_of_2(columns)
    out = x.new_empty((rows, columns))
    _norm[(rows,)](
        x,
        x if branch is None else branch,
        x if routed is None else routed,
        weight,
        out if total is None else total,
        out,
        columns,
        x.stride(0),
        eps,
        BLOCK=block,
        ADDS=branch is not None,
        ADDS_ROUTED=routed is not None,
        num_warps=min(max(block // _NORM_COLUMNS_PER_WARP, 1), _MOST_WARPS),
        enable_fp_fusion=False,
    )
    return out


def latents_and_queries(
    compressed: Tensor,
    weight: Tensor,
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    queries: Tensor,
    latents: Tensor,
    places: Tensor | None,
) -> None:
    """New tokens' latents put where they belong, and the rotated part of their queries.

    compressed: (rows, rank + rope), normed here in its first part and rotated in the other. weight:
    (rank,). q: (rows, heads, plain + rope), of which the last part is rotated into that of queries:
    (rows, heads, rank + rope). latents: (any, rank + rope); places: (rows,) int64, the row of it
    that each token's goes to, None for its own. All of one dtype, bf16 or fp32, and dense; cos,
    sin: (rows, rope / 2) fp32. Places that latents do not have are the caller's to prevent.
    """
    rows, latent_dim = compressed.shape
    heads = q.shape[1]
    rank, rope = weight.shape[0], 2 * cos.shape[1]
    assert rank + rope == latent_dim, f"{rank=}, {rope=}, {latent_dim} values a latent"
    assert q.shape[0] == rows, f"q: {tuple(q.shape)}, {rows} rows"
    assert q.shape[2] >= rope, f"q: {tuple(q.shape)}, {rope=}"
    assert queries.shape == (rows, heads, latent_dim), f"queries: {tuple(queries.shape)}"
    assert latents.shape[1:] == (latent_dim,), f"latents: {tuple(latents.shape)}"
    for name, tensor, dtype in (
        ("compressed", compressed, compressed.dtype),
        ("weight", weight, compressed.dtype),
        ("q", q, compressed.dtype),
        ("queries", queries, compressed.dtype),
        ("latents", latents, compressed.dtype),
        ("cos", cos, torch.float32),
        ("sin", sin, torch.float32),
    ):
        assert tensor.dtype == dtype, f"{name}: {tensor.dtype}"
        assert tensor.is_contiguous(), f"{name}: strides {tensor.stride()}"
    assert cos.shape == sin.shape == (rows, rope // 2), f"{cos.shape}, {sin.shape}"
    if places is not None:
        assert places.dtype == torch.int64, f"places: {places.dtype}"
        assert places.shape == (rows,), f"places: {tuple(places.shape)}, {rows} rows"
    _latents_and_queries[(1 + triton.cdiv(heads, _ROTATED_HEADS), rows)](
        compressed,
        weight,
        q,
        cos,
        sin,
        queries,
        latents,
        latents if places is None else places,
        heads,
        eps,
        RANK=rank,
        ROPE=rope,
        PLAIN=q.shape[2] - rope,
        BLOCK_RANK=triton.next_power_of_2(rank),
        BLOCK_ROPE=triton.next_power_of_2(rope),
        HEADS=_ROTATED_HEADS,
        PLACED=places is not None,
        num_warps=4,
        enable_fp_fusion=False,
    )


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both roundings as torch has them. Of one shape and dtype, bf16 or fp32."""
    assert gate.shape == up.shape, f"gate: {tuple(gate.shape)}, up: {tuple(up.shape)}"
    assert gate.dtype == up.dtype, f"gate: {gate.dtype}, up: {up.dtype}"
    for name, tensor in (("gate", gate), ("up", up)):
        assert tensor.is_contiguous(), f"{name}: strides {tensor.stride()}"
    out = torch.empty_like(gate)
    size = gate.numel()
    _silu_product[(triton.cdiv(size, _MIDDLE_COLUMNS),)](
        gate, up, out, size, BLOCK=_MIDDLE_COLUMNS, num_warps=4, enable_fp_fusion=False
    )
    return out


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-x)) in fp32: off by (|x| + 6) 2^-23 of itself at most, of which |x| + 2 are the
    exponential's, whose argument is rounded for a power of two."""
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def _normed_row(
    x: tl.tensor, weights: tl.tensor, num_columns: tl.tensor, eps: tl.tensor
) -> tl.tensor:
    """x / rms(x) * weights of a row in fp32 that is zero beyond its columns, as of weights' dtype,
    to which it is rounded before they are applied."""
    mean = tl.sum(x * x, axis=0) / num_columns
    normed = (x * tl.rsqrt(mean + eps)).to(weights.dtype)
    return (normed.to(tl.float32) * weights.to(tl.float32)).to(weights.dtype)


@triton.jit
def _norm(
    x: tl.tensor,
    branch: tl.tensor,
    routed: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    num_columns: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    ADDS_ROUTED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    there = columns < num_columns
    weights = tl.load(weight + columns, mask=there, other=0.0)
    values = tl.load(x + row * x_stride + columns, mask=there, other=0.0).to(tl.float32)
    at = row * num_columns + columns
    if ADDS:
        added = tl.load(branch + at, mask=there, other=0.0).to(tl.float32)
        if ADDS_ROUTED:
            share = tl.load(routed + at, mask=there, other=0.0).to(weights.dtype)
            added = (added + share.to(tl.float32)).to(weights.dtype).to(tl.float32)
        rounded = (values + added).to(weights.dtype)
        tl.store(total + at, rounded, mask=there)
        values = rounded.to(tl.float32)
    tl.store(out + at, _normed_row(values, weights, num_columns, eps), mask=there)


@triton.jit
def _rotated(
    values: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    columns: tl.tensor,
    there: tl.tensor,
    ROPE: tl.constexpr,
) -> tl.tensor:
    """Columns of one or more vectors, turned in pairs (2i, 2i + 1) by the angle i: in fp32.

    An even one is a cos - b sin and an odd one b cos + a sin, with its partner before or behind it.
    """
    value = tl.load(values + columns, mask=there, other=0.0).to(tl.float32)
    partner = tl.load(values + (columns ^ 1), mask=there, other=0.0).to(tl.float32)
    c = tl.load(cos + columns // 2, mask=columns < ROPE, other=0.0)
    s = tl.load(sin + columns // 2, mask=columns < ROPE, other=0.0)
    return value * c + partner * tl.where(columns % 2 == 0, -s, s)


@triton.jit
def _store_latent(
    source: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    target: tl.tensor,
    eps: tl.tensor,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
) -> None:
    columns = tl.arange(0, BLOCK_RANK)
    there = columns < RANK
    weights = tl.load(weight + columns, mask=there, other=0.0)
    values = tl.load(source + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(target + columns, _normed_row(values, weights, RANK, eps), mask=there)
    turned = tl.arange(0, BLOCK_ROPE)
    key = _rotated(source + RANK, cos, sin, turned, turned < ROPE, ROPE)
    tl.store(target + RANK + turned, key.to(weights.dtype), mask=turned < ROPE)


@triton.jit
def _store_queries(
    q: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    queries: tl.tensor,
    first: tl.tensor,
    num_heads: tl.tensor,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    """Heads from `first` on of a row, whose own queries q and queries point to."""
    heads = first + tl.arange(0, HEADS)[:, None]
    turned = tl.arange(0, BLOCK_ROPE)[None, :]
    there = (heads < num_heads) & (turned < ROPE)
    query = _rotated(q + heads * (PLAIN + ROPE) + PLAIN, cos, sin, turned, there, ROPE)
    target = queries + heads * (RANK + ROPE) + RANK + turned
    tl.store(target, query.to(queries.dtype.element_ty), mask=there)


@triton.jit
def _latents_and_queries(
    compressed: tl.tensor,
    weight: tl.tensor,
    q: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    queries: tl.tensor,
    latents: tl.tensor,
    places: tl.tensor,
    num_heads: tl.tensor,
    eps: tl.tensor,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    PLACED: tl.constexpr,
) -> None:
    """A row's first program makes its latent, the others rotate the queries of HEADS heads each."""
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    cos += row * (ROPE // 2)
    sin += row * (ROPE // 2)
    if part == 0:
        # 64 bits: a layer of the cache may have more than 2^31 elements.
        place = row
        if PLACED:
            place = tl.load(places + row)
        _store_latent(
            compressed + row * (RANK + ROPE),
            weight,
            cos,
            sin,
            latents + place * (RANK + ROPE),
            eps,
            RANK,
            ROPE,
            BLOCK_RANK,
            BLOCK_ROPE,
        )
    else:
        _store_queries(
            q + row * num_heads * (PLAIN + ROPE),
            cos,
            sin,
            queries + row * num_heads * (RANK + ROPE),
            (part - 1) * HEADS,
            num_heads,
            RANK,
            ROPE,
            PLAIN,
            BLOCK_ROPE,
            HEADS,
        )


@triton.jit
def _silu_product(
    gate: tl.tensor, up: tl.tensor, out: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr
) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    gates = tl.load(gate + at, mask=there, other=0.0)
    wide = gates.to(tl.float32)
    silu = tl.div_rn(wide, 1.0 + tl.exp(-wide)).to(gates.dtype)
    ups = tl.load(up + at, mask=there, other=0.0)
    tl.store(out + at, (silu.to(tl.float32) * ups.to(tl.float32)).to(gates.dtype), mask=there)

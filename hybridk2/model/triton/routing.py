"""From the router's logits to a step's picks and their weights, in one launch.

Owns the kernel; does not know the router's matrix, nor who computes an expert.

A warp owns a token. Scores are ordered as integers, each beside its expert's number, so that the
largest of them all is one reduction and no two are equal: top_k reductions, each of which strikes
out what it found, are the sorted picks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridk2.model.triton.elementwise import sigmoid


def pick_experts(
    logits: Tensor,
    bias: Tensor,
    in_use: Tensor,
    picks: Tensor,
    *,
    scaling_factor: float,
    nobody: int,
) -> tuple[Tensor, Tensor]:
    """What `moe.TopKRouter` makes of its logits; of equal scores the lower expert comes first.

    logits: (rows, experts) fp32. bias: (experts,) fp32. in_use: (rows, 1) bool. picks: (rows,
    top_k) int32, which takes every row's experts. All dense. Returns expert_ids like picks, but
    `nobody` in rows that are not in use, and weights (rows, top_k) fp32.
    """
    rows, experts = logits.shape
    top_k = picks.shape[1]
    assert logits.dtype == bias.dtype == torch.float32, f"{logits.dtype}, {bias.dtype}"
    assert bias.shape == (experts,), f"bias: {tuple(bias.shape)}, {experts} experts"
    assert in_use.dtype == torch.bool, f"in_use: {in_use.dtype}"
    assert in_use.shape == (rows, 1), f"in_use: {tuple(in_use.shape)}, {rows} rows"
    assert picks.dtype == torch.int32, f"picks: {picks.dtype}"
    assert picks.shape[0] == rows, f"picks: {tuple(picks.shape)}, {rows} rows"
    assert 0 < top_k <= experts, f"{top_k} of {experts} experts"
    for name, tensor in (("logits", logits), ("bias", bias), ("in_use", in_use), ("picks", picks)):
        assert tensor.is_contiguous(), f"{name}: strides {tensor.stride()}"
    expert_ids = torch.empty_like(picks)
    weights = logits.new_empty((rows, top_k))
    _pick[(rows,)](
        logits,
        bias,
        in_use,
        picks,
        expert_ids,
        weights,
        experts,
        scaling_factor,
        TOP_K=top_k,
        BLOCK=triton.next_power_of_2(experts),
        BLOCK_TOP_K=triton.next_power_of_2(top_k),
        NOBODY=nobody,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return expert_ids, weights


@triton.jit
def _pick(
    logits: tl.tensor,
    bias: tl.tensor,
    in_use: tl.tensor,
    picks: tl.tensor,
    expert_ids: tl.tensor,
    weights: tl.tensor,
    num_experts: tl.tensor,
    scaling_factor: tl.tensor,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TOP_K: tl.constexpr,
    NOBODY: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK)
    exists = experts < num_experts
    own = logits + row * num_experts
    scores = sigmoid(tl.load(own + experts, mask=exists, other=0.0))
    choice = scores + tl.load(bias + experts, mask=exists, other=0.0)
    # As torch.nan_to_num: what is infinite becomes the largest number, NaN is below them all.
    largest: tl.constexpr = 3.4028234663852886e38
    finite = tl.minimum(tl.maximum(choice, -largest), largest)
    choice = tl.where(choice == choice, finite, float("-inf"))
    # The bits of an fp32 number order as integers if those of a negative one, all but its sign, are
    # turned over. A sum with a score is never -0. What is not there is below -inf.
    bits = choice.to(tl.int32, bitcast=True)
    order = tl.where(exists, bits ^ ((bits >> 31) & 0x7FFFFFFF), -2147483648)
    keys = (order.to(tl.int64) << 32) | (BLOCK - 1 - experts)
    columns = tl.arange(0, BLOCK_TOP_K)
    is_pick = columns < TOP_K
    picked = tl.zeros((BLOCK_TOP_K,), tl.int32)
    for place in tl.static_range(TOP_K):
        best = tl.max(keys, axis=0)
        picked = tl.where(columns == place, BLOCK - 1 - (best & (BLOCK - 1)).to(tl.int32), picked)
        keys = tl.where(keys == best, -9223372036854775808, keys)
    score = sigmoid(tl.load(own + picked, mask=is_pick, other=0.0))
    total = tl.sum(tl.where(is_pick, score, 0.0), axis=0) + 1e-20
    at = row * TOP_K + columns
    tl.store(weights + at, tl.div_rn(score, total) * scaling_factor, mask=is_pick)
    tl.store(picks + at, picked, mask=is_pick)
    used = tl.load(in_use + row)
    tl.store(expert_ids + at, tl.where(used, picked, NOBODY), mask=is_pick)

"""What differs, by how much, and how much may.

Relative error of an element = |found - expected| / (|expected| + the median |expected| of its
token): the median keeps an element near zero from counting as wrong, and unlike a maximum it is not
moved by the few huge channels that trained models have.

Tolerances come from the checkpoint's own weights, not from a table:

  bfloat16   transformers computes the part a second time with bf16 weights and activations. What
             that moves is what bf16 costs here, however well or badly conditioned the part is. The
             engine rounds in the same places or fewer, with other signs: MARGIN times as much is
             allowed.
  float32    the same, 2^-16 times as large, because fp32 has 16 more bits; times sqrt(k / 2), since
             a sum of k products is now rounded at every addition (in bf16 mode sums are fp32 and
             only their result is rounded). k steps of independent rounding errors, each relative to
             a partial sum that itself grows as a random walk, add up to sqrt(k / 2) of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["float32", "bfloat16"]
DTYPES: dict[Mode, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Two runs that round alike differ by sqrt(2) of one's error; the largest of thousands of elements
# varies by some tens of percent; an engine that rounds one place more still belongs to the model.
MARGIN = 4.0
BF16_UNIT = 2.0**-8  # largest relative error of one rounding to bf16
FP32_UNIT = 2.0**-24


@dataclass(frozen=True)
class PartReport:
    """One part of one layer in one mode.

    max_relative_error: as this module's docstring defines it; absolute for cos and sin; for router
    picks the share of tokens that went elsewhere. worst_token: index of the token that has it, None
    where there is nothing to locate. note: what to know beside the numbers, or empty.
    """

    part: str
    mode: Mode
    passed: bool
    max_absolute_error: float
    max_relative_error: float
    tolerance: float
    worst_token: int | None
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """The largest errors of a tensor (tokens, width); infinite where a value is not finite."""

    absolute: float
    relative: float
    worst_token: int


def difference(found: Tensor, expected: Tensor) -> Difference:
    """found, expected: (tokens, width) of any floating dtypes."""
    wide = expected.double()
    error = (found.double() - wide).abs()
    scale = wide.abs() + wide.abs().median(dim=-1, keepdim=True).values
    relative = torch.where(error == 0, 0.0, error / scale)
    relative = relative.nan_to_num(nan=math.inf)
    by_token = relative.amax(dim=-1)
    worst = int(by_token.argmax())
    absolute = float(error.nan_to_num(nan=math.inf).max())
    return Difference(absolute, float(by_token[worst]), worst)


def tolerance(mode: Mode, bf16_effect: float, products: int) -> float:
    """Largest relative error allowed.

    bf16_effect: largest relative error of transformers' own bf16 run of the part. products: terms
    of the part's longest sum.
    """
    # Rounding the result alone costs up to half a step, also where the run happened not to.
    allowed = MARGIN * max(bf16_effect, BF16_UNIT)
    return allowed if mode == "bfloat16" else allowed * fp32_share(products)


def fp32_share(products: int) -> float:
    """What fp32 rounding moves, as a share of what bf16 does, in sums of so many products."""
    return 2.0**-16 * math.sqrt(products / 2)


def compare(
    part: str, mode: Mode, found: Tensor, expected: Tensor, allowed: float, note: str = ""
) -> PartReport:
    """Report one part: passed when the largest relative error is at most `allowed`."""
    worst = difference(found, expected)
    return PartReport(
        part,
        mode,
        worst.relative <= allowed,
        worst.absolute,
        worst.relative,
        allowed,
        worst.worst_token,
        note,
    )


def logit_rounding(spread: float, products: int) -> float:
    """How far fp32 rounding may move a router logit, a sum of `products` terms w x.

    spread: root of the sum of (w x)^2. Partial sums grow as a random walk up to the spread, each
    addition rounds by at most FP32_UNIT of one: sqrt(products / 2) * FP32_UNIT * spread, times
    MARGIN.
    """
    return MARGIN * FP32_UNIT * math.sqrt(products / 2) * spread


def compare_positions(
    mode: Mode,
    found: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    positions: Tensor,
    inverse_frequencies: Tensor,
) -> PartReport:
    """cos and sin of both sides, (tokens, frequencies) each; the error is absolute.

    Each side's frequencies are rounded to fp32 a few times (power, reciprocal, ramp: 4 units of
    2^-24 relative at most) and so is each angle (1 unit), so angles may differ by 10 units of
    themselves: 0.16 rad for 262,143 rad. Sine and cosine move by no more, and are rounded once.
    """
    error = torch.maximum(
        (found[0].double() - expected[0].double()).abs(),
        (found[1].double() - expected[1].double()).abs(),
    )
    angles = positions.double().unsqueeze(-1) * inverse_frequencies.double()
    allowed = 10 * FP32_UNIT * angles + 2 * FP32_UNIT
    excess = (error / allowed).nan_to_num(nan=math.inf)
    worst = int(excess.argmax())
    token = worst // excess.shape[-1]
    return PartReport(
        "positions (cos, sin)",
        mode,
        bool(excess.max() <= 1),
        float(error.flatten()[worst]),
        float(error.flatten()[worst]),
        float(allowed.flatten()[worst]),
        token,
        f"at position {int(positions[token])}, frequency {worst % excess.shape[-1]}",
    )


def compare_routing(
    mode: Mode,
    found: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    scores: Tensor,
    logit_tolerance: float,
) -> list[PartReport]:
    """The router's picks and weights, given the same inputs.

    found, expected: (expert_ids, weights), each (tokens, top_k), in any order within a token.
    scores: (tokens, experts) fp64, what was chosen by. A sigmoid's slope is at most 1/4 and its
    relative slope at most 1, so a logit's tolerance moves scores by a quarter of it, and a weight,
    which is a score over a sum of scores, by twice it, relatively.
    """
    same, tied = equal_picks(found[0], expected[0], scores, logit_tolerance / 4)
    wrong = ~(same | tied)
    worst = int(wrong.int().argmax()) if bool(wrong.any()) else None
    note = f"{int(tied.sum())} ties within rounding" if bool(tied.any()) else ""
    if worst is not None:
        note = (
            f"token {worst}: expected experts {sorted(expected[0][worst].tolist())}, "
            f"found {sorted(found[0][worst].tolist())}"
        )
    picks = PartReport(
        "router picks",
        mode,
        worst is None,
        float(wrong.sum()),
        float(wrong.double().mean()),
        0.0,
        worst,
        note,
    )
    if not bool(same.any()):
        return [picks]
    dense = [
        torch.zeros(scores.shape, dtype=torch.float64).scatter_(1, ids.long(), weights.double())
        for ids, weights in (found, expected)
    ]
    rows = torch.where(same)[0]
    error = (dense[0] - dense[1]).abs()[rows]
    relative = torch.where(error == 0, 0.0, error / dense[1][rows]).nan_to_num(nan=math.inf)
    by_token = relative.amax(dim=-1)
    allowed = 2 * logit_tolerance + 8 * FP32_UNIT
    weights = PartReport(
        "router weights",
        mode,
        bool(by_token.max() <= allowed),
        float(error.max()),
        float(by_token.max()),
        allowed,
        int(rows[by_token.argmax()]),
    )
    return [picks, weights]


def equal_picks(
    found: Tensor, expected: Tensor, scores: Tensor, score_tolerance: float
) -> tuple[Tensor, Tensor]:
    """Which tokens have the same experts, and which differ only by a tie: two (tokens,) bools.

    A tie: every expert that only one side picked has a score within twice score_tolerance of the
    lowest that transformers picked, so rounding decides between them.
    """
    picked = [
        torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, ids.long(), True)
        for ids in (found, expected)
    ]
    disputed = picked[0] ^ picked[1]
    same = ~disputed.any(dim=-1)
    lowest = scores.masked_fill(~picked[1], math.inf).amin(dim=-1, keepdim=True)
    near = (scores - lowest).abs() <= 2 * score_tolerance
    tied = ~same & (near | ~disputed).all(dim=-1)
    return same, tied

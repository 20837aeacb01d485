"""Attention over the paged cache as a problem, and its answer in fp64 with a derived tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

PAGE = 64
EPS_FP32 = 2.0**-23
HALF_ULP_BF16 = 2.0**-8

Kind = TypeVar("Kind", bound="PagedAttention")


@dataclass(frozen=True)
class PagedAttention:
    """Rows of queries, and a cache in which their pages lie in no order, NaN wherever nobody may
    look: beyond lengths, in pages of nobody, and in pages that the table names but nobody needs."""

    q: Tensor
    cache: Tensor  # (pages, 64, rank + rope) bf16
    table: Tensor
    lengths: Tensor
    rank: int
    scale: float = 0.25

    @classmethod
    def random(
        cls: type[Kind],
        lengths: list[int],
        *,
        heads: int,
        rank: int,
        rope: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Kind:
        generator = torch.Generator().manual_seed(sum(lengths))
        max_pages = max(-(-length // PAGE) for length in lengths) + 1
        pages = len(lengths) * max_pages + 3
        cache = torch.full((pages, PAGE, rank + rope), torch.nan, dtype=torch.bfloat16)
        order = torch.randperm(pages, generator=generator)[: len(lengths) * max_pages]
        table = order.view(len(lengths), max_pages).int()
        for row, length in enumerate(lengths):
            values = torch.randn(length, rank + rope, generator=generator)
            tokens = torch.arange(length)
            cache[table[row, tokens // PAGE].long(), tokens % PAGE] = values.bfloat16()
        q = torch.randn(len(lengths), heads, rank + rope, generator=generator).to(dtype)
        return cls(q, cache, table, torch.tensor(lengths, dtype=torch.int32), rank)

    def to(self: Kind, device: torch.device) -> Kind:
        q, cache, table, lengths = (
            tensor.to(device) for tensor in (self.q, self.cache, self.table, self.lengths)
        )
        return replace(self, q=q, cache=cache, table=table, lengths=lengths)

    def keys(self, row: int, cache: Tensor | None = None) -> Tensor:
        length = int(self.lengths[row])
        named = self.table[row, : -(-length // PAGE)].long()
        pages = (self.cache if cache is None else cache)[named]
        return pages.flatten(0, 1)[:length].double()


def assert_attends(
    found: Tensor,
    given: PagedAttention,
    cache: Tensor | None = None,
    *,
    additions: int | None = None,
    relative_rounding: float = 0.0,
    absolute_rounding: float = 0.0,
) -> None:
    """Every output within a bound of first order on the kernel's roundings.

    A score is a sum of n exact products in fp32, n the query's values that are not 0, off by
    2 n eps sum|q k| (2: tensor cores cut sums off instead of rounding them), and is multiplied by
    scale * log2(e), off by 3 eps of itself. Its weight is off by the exponential of that, and by
    2 eps for exp2. Sums over keys add eps for each key, on top of a rescaling each. With bf16
    queries weights are rounded to bf16.

    additions: that an output goes through at most, None for one a key. relative_rounding,
    absolute_rounding: what else a kernel does to partial sums.
    """
    for row, length in enumerate(given.lengths.tolist()):
        if length == 0:
            assert found[row].count_nonzero() == 0, f"row {row} is padding"
            continue
        q, keys = given.q[row].double(), given.keys(row, cache)
        values = keys[:, : given.rank]
        scores = q @ keys.T * given.scale
        size = q.count_nonzero(dim=1)[:, None]
        score_error = 2 * size * EPS_FP32 * (q.abs() @ keys.abs().T) * given.scale
        score_error = (score_error + 3 * EPS_FP32 * scores.abs()).amax(dim=1, keepdim=True)
        weights = scores.softmax(dim=1)
        relative = torch.expm1(2 * score_error) + (2 * (additions or length) + 8) * EPS_FP32
        if given.q.dtype == torch.bfloat16:
            relative = relative + HALF_ULP_BF16
        relative = relative + relative_rounding
        tolerance = relative * (weights @ values.abs()) + absolute_rounding
        excess = (found[row].double() - weights @ values).abs() - tolerance
        worst = excess.nan_to_num(nan=math.inf).max()
        assert worst <= 0, f"row {row} of length {length}: {worst} beyond the tolerance"

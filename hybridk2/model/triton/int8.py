"""Dense weights in INT8: a bf16 scale for every 128 columns of a row, activations as they are.

Owns the format and its products. Quantising is plain torch, on any device. A weight is off by half
its scale at most; what that does to a model's logits is for whoever chooses it to say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 128  # columns that share a scale
_LARGEST_CODE = 127


@dataclass(frozen=True)
class Int8Linear:
    """A matrix of `columns` columns. codes: (rows, columns rounded up to GROUP) int8, zero beyond;
    scales: (rows, codes' columns / GROUP) bf16. Their product is the weight."""

    codes: Tensor
    scales: Tensor
    columns: int


def quantise(weight: Tensor) -> Int8Linear:
    """weight: (rows, columns) bf16, all numbers finite. Codes are -127 to 127."""
    rows, columns = weight.shape
    grouped = F.pad(weight, (0, -columns % GROUP)).float().view(rows, -1, GROUP)
    scales = (grouped.abs().amax(dim=-1) / _LARGEST_CODE).bfloat16()
    # A scale of 0, of zeros alone or of numbers too small for bf16, must not divide. Where a scale
    # was rounded down, by 2^-8 of itself at most, the largest is 127.5 of them at most.
    divisors = torch.where(scales > 0, scales, 1).float()
    codes = (grouped / divisors[..., None]).round().clamp(-_LARGEST_CODE, _LARGEST_CODE)
    return Int8Linear(codes.to(torch.int8).view(rows, -1), scales, columns)


def dequantise(weight: Int8Linear) -> Tensor:
    """(rows, columns) bf16: code times scale, rounded once to the nearest bf16."""
    grouped = weight.codes.view(*weight.scales.shape, GROUP)
    wide = torch.mul(grouped, weight.scales[..., None])
    return wide.flatten(1)[:, : weight.columns]


def linear(x: Tensor, weight: Int8Linear) -> Tensor:
    """x W^T: (rows, columns) bf16 -> (rows, outputs) bf16, sums in fp32.

    Up to 8 rows the codes are read as they are, by a kernel, and no product is rounded. More rows
    take a bf16 copy of the matrix, two bytes a weight as long as the product lasts.
    """
    from hybridk2.model.triton import few_rows  # loads Triton: quantising does without

    if x.shape[0] <= few_rows.MAX_ROWS:
        return few_rows.product(x, weight.codes, weight.scales, x.dtype)
    return F.linear(x, dequantise(weight))

"""Logits of decoding: the exact products of activations and the bf16 head, summed in fp32.

Rounding logits of 20 to bf16 would move each by up to 0.06, more than whole layers do; widening the
head to fp32 would double the 2.35 GB that a token of K2 reads of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridk2.model.triton import few_rows


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """x: (rows <= 8, hidden) fp32, or bf16 at a third of the multiplications; normed. weight:
    (vocab, hidden) bf16. Returns (rows, vocab) fp32."""
    return few_rows.product(x, weight, None, torch.float32)

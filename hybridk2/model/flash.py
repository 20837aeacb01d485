"""Attention of many queries through torch's flash kernels, block of keys by block of keys.

A kernel gives, for its keys alone, the softmax-weighted sum of values and the logarithm of the sum
of exponentials under it. Two such results make that of both sets of keys:

    lse = log(exp(lse1) + exp(lse2)),  out = out1 exp(lse1 - lse) + out2 exp(lse2 - lse).

Owns that and the kernels' conventions. Scores and sums are fp32 within a block; the kernels round
the weights and their result to the activations' dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class FlashState:
    """The sum so far over blocks of keys that arrive in any order."""

    def __init__(self, q: Tensor, value_dim: int, scale: float) -> None:
        """q: (heads, tokens, key_dim)."""
        self._q = q[None]
        self._value_dim = value_dim
        self._scale = scale
        self._sum: Tensor | None = None
        self._lse: Tensor | None = None  # (heads, tokens, 1)

    def add(self, k: Tensor, v: Tensor, *, causal: bool) -> None:
        """k: (heads, keys, key_dim), v: (heads, keys, value_dim), in q's dtype.

        causal: query t sees keys 0..t, and there are as many keys as queries; else all of them.
        """
        # The kernels want values as wide as keys; what is added is zero.
        wide = F.pad(v, (0, self._q.shape[-1] - self._value_dim))
        attend = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            if self._q.is_cpu
            else torch.ops.aten._scaled_dot_product_flash_attention
        )
        out, lse = attend(self._q, k[None], wide[None], 0.0, causal, scale=self._scale)[:2]
        block_sum = out[0, ..., : self._value_dim].float()
        block_lse = lse[0, ..., None]
        if self._sum is None or self._lse is None:
            self._sum, self._lse = block_sum, block_lse
            return
        both = torch.logaddexp(self._lse, block_lse)
        self._sum = self._sum * torch.exp(self._lse - both)
        self._sum += block_sum * torch.exp(block_lse - both)
        self._lse = both

    def result(self) -> Tensor:
        """(heads, tokens, value_dim) fp32."""
        assert self._sum is not None, "no block came"
        return self._sum

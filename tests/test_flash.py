"""Flash attention over blocks gives what softmax over all keys gives, in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hybridk2.model.flash import FlashState

HEADS, KEY_DIM, VALUE_DIM, SCALE = 3, 24, 16, 0.2


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(q: Tensor, k: Tensor, v: Tensor, past: int) -> tuple[Tensor, Tensor]:
    """The result, and the sum of |values| under the same weights, both fp64."""
    scores = SCALE * q.double() @ k.double().transpose(-1, -2)
    hidden = torch.arange(k.shape[1]) > past + torch.arange(q.shape[1])[:, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return weights @ v.double(), weights @ v.double().abs()


def flash(q: Tensor, k: Tensor, v: Tensor, past: int, edges: Sequence[int]) -> Tensor:
    state = FlashState(q, VALUE_DIM, SCALE)
    state.add(k[:, past:], v[:, past:], causal=True)
    for begin, end in pairwise([*edges, past]):
        state.add(k[:, begin:end], v[:, begin:end], causal=False)
    return state.result()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 64, 130])
@pytest.mark.parametrize(("past", "edges"), [(0, []), (1, [0]), (64, [0]), (200, [0, 64, 128])])
def test_blocks_add_up_to_attention_over_all_keys(
    dtype: torch.dtype, tokens: int, past: int, edges: list[int]
) -> None:
    keys = past + tokens
    q = random(HEADS, tokens, KEY_DIM, seed=1).to(dtype)
    k = (3 * random(HEADS, keys, KEY_DIM, seed=2)).to(dtype)
    v = random(HEADS, keys, VALUE_DIM, seed=3).to(dtype)
    wanted, size = exact(q, k, v, past)
    # Weights and each block's result are rounded once each to dtype, so by eps / 2 of the sum of
    # |values|; scores of up to 30 in fp32 move weights by 30 fp32 ulps and a few for exp and log.
    allowed = (torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps) * size
    difference = (flash(q, k, v, past, edges).double() - wanted).abs()
    assert bool((difference <= allowed).all()), f"{(difference / allowed).max():.2f} of what may be"


def test_scores_that_are_far_apart_between_blocks_neither_overflow_nor_vanish() -> None:
    q = torch.full((1, 2, KEY_DIM), 30.0)
    k = torch.cat((torch.full((1, 4, KEY_DIM), -30.0), torch.full((1, 2, KEY_DIM), 30.0)), dim=1)
    v = random(1, 6, VALUE_DIM, seed=4)
    for keys in (k, -k):
        found = flash(q, keys, v, 4, [0, 2])
        # Logarithms of sums are as large as the scores, 4320, and as coarse in fp32.
        atol = 4320 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(found.double(), exact(q, keys, v, 4)[0], rtol=0, atol=atol)

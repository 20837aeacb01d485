"""What is fed to a layer under comparison: hidden states, positions, and which layers to take.

Hidden states are seeded: rows of the embedding table, which is what layer 0 really sees, and random
ones at the sizes that a residual stream has deeper down, a few channels much larger than the rest,
as trained models have them. Positions reach from 0 to the model's last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridk2.config import K2Config
from hybridk2.errors import RequestError
from hybridk2.verification.published import PublishedWeights

MIN_TOKENS = 3  # one at the start, one in between, one at the end of the context

# Random tokens have sizes (root mean square) between these, spread evenly over the logarithm.
_SMALLEST_SIZE, _LARGEST_SIZE = 0.02, 4.0
_LARGE_CHANNELS, _LARGE_FACTOR = 4, 30.0


@dataclass(frozen=True)
class Probe:
    """hidden: (tokens, hidden) bf16. positions: (tokens,) int64, none below the one before."""

    hidden: Tensor
    positions: Tensor


def default_layers(config: K2Config) -> list[int]:
    """The first layer, the first with routed experts, one in the middle, the last."""
    last = config.num_hidden_layers - 1
    return sorted({0, min(config.first_k_dense_replace, last), config.num_hidden_layers // 2, last})


def check_request(config: K2Config, layers: Sequence[int], tokens: int) -> None:
    """Raises RequestError for a layer or a number of tokens that this model does not have."""
    for layer in layers:
        if not 0 <= layer < config.num_hidden_layers:
            raise RequestError(
                f"layer {layer}: this model has layers 0 to {config.num_hidden_layers - 1}"
            )
    if not MIN_TOKENS <= tokens <= config.max_position_embeddings:
        raise RequestError(
            f"tokens: expected {MIN_TOKENS} to {config.max_position_embeddings}, found {tokens}"
        )


def choose_positions(tokens: int, max_positions: int) -> Tensor:
    """(tokens,) int64: a run from 0, ever wider steps, a run that ends at the last position."""
    run = tokens // 3
    steps = torch.logspace(0, math.log10(max_positions), tokens - 2 * run + 2, dtype=torch.float64)
    between = steps[1:-1].round().long().clamp(run, max_positions - 1 - run)
    end = torch.arange(max_positions - run, max_positions)
    return torch.cat((torch.arange(run), between, end))


def make_probe(weights: PublishedWeights, config: K2Config, tokens: int, seed: int) -> Probe:
    """Hidden states and positions of `tokens` tokens; the same seed gives the same ones."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = tokens // 2
    num_random = tokens - num_rows
    ids = torch.randint(config.vocab_size, (num_rows,), generator=generator)
    random = torch.randn(num_random, config.hidden_size, generator=generator)
    channels = torch.randint(config.hidden_size, (_LARGE_CHANNELS,), generator=generator)
    random[:, channels] *= _LARGE_FACTOR
    sizes = torch.logspace(math.log10(_SMALLEST_SIZE), math.log10(_LARGEST_SIZE), num_random)
    random *= (sizes / random.square().mean(dim=-1).sqrt()).unsqueeze(-1)
    hidden = torch.cat((weights.embedding_rows(ids.tolist()), random.to(torch.bfloat16)))
    order = torch.randperm(tokens, generator=generator)
    return Probe(hidden[order], choose_positions(tokens, config.max_position_embeddings))

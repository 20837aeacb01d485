"""When a placement should change while it is used: which swaps pay for their uploads.

Pure: is told what was picked and what a hit saves and an upload costs, and says which experts
should change places. Whoever moves them does so between steps. Every layer keeps as many as it has.

How often an expert is picked is counted with a memory of `window_tokens`: each pick weighs 1 at
first and e^-1 once so many tokens have passed, so an expert that goes on being picked at one rate
has a count of rate times window, and as many hits are to be expected in the next window. A swap
pays if the hits it is sure to gain there save more than its upload costs. Sure: counts are random,
with about their own variance, so of the difference of two, `_SIGMAS` standard deviations are taken
off. Fewer would not do: of 384 experts that are alike, the luckiest and the unluckiest are apart by
six deviations of one count, which is 4.3 of a difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybridk2.placement import Mask

_SIGMAS = 5.0


class Swap(NamedTuple):
    """In a layer, one expert leaves the device and another takes its place."""

    layer: int
    leaving: int
    entering: int


@dataclass(frozen=True)
class SwapCosts:
    """Measured. hit_seconds: that a token saves when one of its picks is on the device and not on
    the host. upload_seconds: of one expert, as far as decoding has to wait for it."""

    hit_seconds: float
    upload_seconds: float


class ChangingPlacement:
    """A placement and how often each expert was picked lately."""

    def __init__(self, mask: Mask, window_tokens: int) -> None:
        """mask: (layers, experts), True on the device. window_tokens: that routing is expected to
        stay as it is, and that a swap has to pay for itself in."""
        self._mask = mask.copy()
        self._window_tokens = window_tokens
        self._counts = np.zeros(mask.shape)

    @property
    def mask(self) -> Mask:
        """(layers, experts), True on the device, with all swaps that were made."""
        return self._mask.copy()

    @property
    def counts(self) -> NDArray[np.float64]:
        """(layers, experts), picks of the last tokens, older ones counting less."""
        return self._counts.copy()

    def observe(self, picks: NDArray[np.integer]) -> None:
        """Decoded tokens. picks: (layers, tokens, top_k), ids; negative ones are nobody's."""
        layers, tokens = picks.shape[:2]
        age = np.arange(tokens - 1, -1, -1)
        weights = np.exp(-age / self._window_tokens)[:, None]
        self._counts *= np.exp(-tokens / self._window_tokens)
        for layer in range(layers):
            chosen = picks[layer] >= 0
            np.add.at(
                self._counts[layer],
                picks[layer][chosen],
                np.broadcast_to(weights, chosen.shape)[chosen],
            )

    def swaps(self, costs: SwapCosts, most: int) -> list[Swap]:
        """The swaps that pay, those that gain most first, at most so many; none is made yet.

        In a layer the most picked expert of the host is set against the least picked of the device,
        the second against the second, and so on.
        """
        found: list[tuple[float, Swap]] = []
        for layer, (counts, here) in enumerate(zip(self._counts, self._mask, strict=True)):
            entering = _ordered(counts, ~here)[::-1]
            leaving = _ordered(counts, here)
            for comes, goes in zip(entering[:most], leaving[:most], strict=False):
                sure = counts[comes] - counts[goes]
                sure -= _SIGMAS * np.sqrt(counts[comes] + counts[goes])
                gain = sure * costs.hit_seconds - costs.upload_seconds
                if gain <= 0:
                    break
                found.append((gain, Swap(layer, int(goes), int(comes))))
        found.sort(key=lambda pair: -pair[0])
        return [swap for _, swap in found[:most]]

    def make(self, swap: Swap) -> None:
        """The swap was made."""
        here = self._mask[swap.layer]
        assert here[swap.leaving], f"{swap}: not on the device"
        assert not here[swap.entering], f"{swap}: on the device before"
        here[[swap.leaving, swap.entering]] = False, True


def _ordered(counts: NDArray[np.float64], among: NDArray[np.bool_]) -> NDArray[np.intp]:
    """The ids among these, by count, fewest first."""
    ids = np.flatnonzero(among)
    return ids[np.argsort(counts[ids], kind="stable")]

"""Placements that change: only when it pays, never back and forth, and after the routing."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from hybridk2.placement_changes import ChangingPlacement, Swap, SwapCosts

LAYERS, EXPERTS, TOP_K, WINDOW = 2, 64, 4, 500
# An upload takes what twenty hits save.
COSTS = SwapCosts(hit_seconds=1e-4, upload_seconds=2e-3)


def picks_of(
    random: np.random.Generator, popularity: NDArray[np.float64], tokens: int
) -> NDArray[np.int64]:
    """(LAYERS, tokens, TOP_K) different experts a token, by popularity (Gumbel's top-k)."""
    scores = np.log(popularity) + random.gumbel(size=(LAYERS, tokens, EXPERTS))
    return np.argsort(-scores, axis=-1)[..., :TOP_K]


def skewed(random: np.random.Generator) -> NDArray[np.float64]:
    """Few experts are picked for most tokens, other ones in each layer."""
    ranks = np.stack([random.permutation(EXPERTS) for _ in range(LAYERS)])
    return (1.0 / (1 + ranks))[:, None]


def first_ones(number: int) -> NDArray[np.bool_]:
    mask = np.zeros((LAYERS, EXPERTS), bool)
    mask[:, :number] = True
    return mask


def run(
    placement: ChangingPlacement, picks: NDArray[np.int64], step: int = 8
) -> tuple[int, int, int]:
    """Decode in steps, swapping between them: hits, swaps, and hits without any swap."""
    hits = swaps = fixed_hits = 0
    start, layer = placement.mask, np.arange(LAYERS)[:, None, None]
    for begin in range(0, picks.shape[1], step):
        part = picks[:, begin : begin + step]
        hits += int(placement.mask[layer, part].sum())
        fixed_hits += int(start[layer, part].sum())
        placement.observe(part)
        for swap in placement.swaps(COSTS, most=2):
            placement.make(swap)
            swaps += 1
    return hits, swaps, fixed_hits


def test_counts_are_picks_that_fade_however_they_are_told() -> None:
    random = np.random.default_rng(0)
    picks = picks_of(random, np.ones((LAYERS, 1, EXPERTS)), 40)
    picks[0, 3] = -1
    whole, pieces = (ChangingPlacement(first_ones(3), WINDOW) for _ in range(2))
    whole.observe(picks)
    for begin, end in ((0, 1), (1, 17), (17, 40)):
        pieces.observe(picks[:, begin:end])
    expected = np.zeros((LAYERS, EXPERTS))
    for layer, token, pick in np.ndindex(picks.shape):
        if picks[layer, token, pick] >= 0:
            expected[layer, picks[layer, token, pick]] += np.exp((token - 39) / WINDOW)
    np.testing.assert_allclose(whole.counts, expected)
    np.testing.assert_allclose(pieces.counts, expected)


@pytest.mark.parametrize("seed", range(5))
def test_the_routing_is_followed_and_the_hits_pay_for_the_uploads(seed: int) -> None:
    random = np.random.default_rng(seed)
    placement = ChangingPlacement(first_ones(12), WINDOW)
    popularity = skewed(random)
    hits, swaps, fixed_hits = run(placement, picks_of(random, popularity, 4000))
    assert swaps > 0
    assert (hits - fixed_hits) * COSTS.hit_seconds > swaps * COSTS.upload_seconds
    # Of the hits that the best of its size has beyond the first one, two thirds at least: what is
    # missing are experts too alike for a difference that chance may have made.
    later = picks_of(random, popularity, 1000)
    layer = np.arange(LAYERS)[:, None, None]
    best = np.zeros((LAYERS, EXPERTS), bool)
    np.put_along_axis(best, np.argsort(-popularity[:, 0])[:, :12], True, axis=1)
    first, now, most = (mask[layer, later].sum() for mask in (first_ones(12), placement.mask, best))
    assert now - first >= (most - first) * 2 / 3


@pytest.mark.parametrize("seed", range(5))
def test_swaps_end_where_the_routing_stays_as_it_is(seed: int) -> None:
    """Once what pays has been moved, hardly anything moves any more."""
    random = np.random.default_rng(seed)
    placement = ChangingPlacement(first_ones(12), WINDOW)
    popularity = skewed(random)
    _, at_first, _ = run(placement, picks_of(random, popularity, 4000))
    _, swaps, _ = run(placement, picks_of(random, popularity, 4000))
    assert swaps <= at_first / 5


@pytest.mark.parametrize("seed", range(5))
def test_chance_alone_moves_nothing(seed: int) -> None:
    """Experts that are all alike, with uploads that cost nothing: the differences are noise."""
    random = np.random.default_rng(seed)
    placement = ChangingPlacement(first_ones(12), WINDOW)
    for _ in range(300):
        placement.observe(picks_of(random, np.ones((LAYERS, 1, EXPERTS)), 10))
        assert not placement.swaps(SwapCosts(1.0, 0.0), most=10)


def test_what_becomes_popular_later_comes_in_later() -> None:
    random = np.random.default_rng(7)
    placement = ChangingPlacement(first_ones(12), WINDOW)
    run(placement, picks_of(random, skewed(random), 3000))
    hits, swaps, fixed_hits = run(placement, picks_of(random, skewed(random), 3000))
    assert swaps > 0
    assert (hits - fixed_hits) * COSTS.hit_seconds > swaps * COSTS.upload_seconds


def test_every_swap_that_is_proposed_pays_and_keeps_the_sizes() -> None:
    random = np.random.default_rng(1)
    placement = ChangingPlacement(first_ones(12), WINDOW)
    popularity = skewed(random)
    for _ in range(100):
        placement.observe(picks_of(random, popularity, 10))
        counts, mask = placement.counts, placement.mask
        proposed = placement.swaps(COSTS, most=3)
        assert len(proposed) <= 3
        assert len({(swap.layer, swap.leaving) for swap in proposed}) == len(proposed)
        assert len({(swap.layer, swap.entering) for swap in proposed}) == len(proposed)
        gains = []
        for layer, leaving, entering in proposed:
            assert mask[layer, leaving]
            assert not mask[layer, entering]
            comes, goes = counts[layer, entering], counts[layer, leaving]
            gains.append((comes - goes - 5 * np.sqrt(comes + goes)) * COSTS.hit_seconds)
        assert gains == sorted(gains, reverse=True)
        assert all(gain > COSTS.upload_seconds for gain in gains)
        for swap in proposed:
            placement.make(swap)
        assert (placement.mask.sum(axis=1) == 12).all()


def test_dearer_uploads_and_cheaper_hits_never_lead_to_more_swaps() -> None:
    random = np.random.default_rng(3)
    placement = ChangingPlacement(first_ones(12), WINDOW)
    placement.observe(picks_of(random, skewed(random), 1000))
    numbers = [
        len(placement.swaps(SwapCosts(1e-4, upload), most=100))
        for upload in (0.0, 1e-3, 5e-3, 2e-2, 1.0)
    ]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] > numbers[-1] == 0
    assert not placement.swaps(SwapCosts(0.0, 1e-9), most=100)
    assert not placement.swaps(SwapCosts(-1e-4, 0.0), most=100), "the device is the slower one"


def test_a_layer_with_all_or_none_of_its_experts_there_has_nothing_to_swap() -> None:
    random = np.random.default_rng(4)
    mask = np.zeros((LAYERS, EXPERTS), bool)
    mask[1] = True
    placement = ChangingPlacement(mask, WINDOW)
    placement.observe(picks_of(random, skewed(random), 1000))
    assert not placement.swaps(SwapCosts(1.0, 0.0), most=10)
    with pytest.raises(AssertionError, match="not on the device"):
        placement.make(Swap(0, 1, 2))

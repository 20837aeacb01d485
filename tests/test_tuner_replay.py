"""Replays against plain loops, and the policies against the optimum of small cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from hybridk2.placement import by_frequency, by_marginal_gain, uniform
from hybridk2.tuner.replay import (
    Replay,
    StepCost,
    Windows,
    count_picks,
    hits_histogram,
    priced,
    replay_belady,
    replay_lfu,
    replay_lru,
    saved_time_gains,
)
from tests.routed_traces import skewed_trace

# An expert takes the host a second, the card nothing: seconds count misses.
MISSES = StepCost(top_k=2, fixed=0.0, host=1.0, gpu=0.0, shared=0.0, upload=0.0)
# A card half as fast as it takes not to be waited for.
SLOW_CARD = StepCost(top_k=3, fixed=0.5, host=1.0, gpu=0.7, shared=0.6, upload=2.0)


def random_ids(seed: int, layers: int, tokens: int, experts: int, top_k: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    scores = random.random((layers, tokens, experts)) ** random.uniform(1, 6, (layers, 1, experts))
    return np.argsort(-scores, axis=2)[:, :, :top_k].astype(np.uint8)


def seconds_by_hand(ids: np.ndarray, mask: np.ndarray, cost: StepCost) -> float:
    total = 0.0
    for layer, token in itertools.product(range(ids.shape[0]), range(ids.shape[1])):
        hits = sum(bool(mask[layer, expert]) for expert in ids[layer, token])
        total += max((cost.top_k - hits) * cost.host, cost.shared + hits * cost.gpu)
    return cost.fixed + total / ids.shape[1]


def test_a_placement_takes_the_seconds_that_a_plain_loop_counts() -> None:
    ids = random_ids(0, layers=3, tokens=40, experts=9, top_k=3)
    mask = np.random.default_rng(1).random((3, 9)) < 0.4
    replay = priced(hits_histogram(ids, mask), SLOW_CARD)
    assert replay.seconds == pytest.approx(seconds_by_hand(ids, mask, SLOW_CARD), rel=1e-12)
    hits = sum(mask[layer][ids[layer]].sum() for layer in range(3))
    assert replay.hit_rate == pytest.approx(hits / ids.size, rel=1e-12)
    assert replay.tokens_per_second == 1 / replay.seconds


def test_hits_stop_to_pay_where_the_card_is_the_limit() -> None:
    seconds = SLOW_CARD.layer_seconds()
    assert seconds.tolist() == pytest.approx([3.0, 2.0, 2.0, 2.7])
    assert not SLOW_CARD.host_is_the_limit
    assert StepCost(3, 0, 1.0, 0.4, 0.2, 0).host_is_the_limit
    assert not StepCost(3, 0, 1.0, 0.41, 0.2, 0).host_is_the_limit


def test_saved_time_is_a_count_where_the_host_is_the_limit() -> None:
    ids = random_ids(2, layers=3, tokens=50, experts=9, top_k=2)
    gains = saved_time_gains(ids, 9, MISSES, most=9)
    np.testing.assert_allclose(gains, count_picks(ids, 9))


@pytest.mark.parametrize("seed", range(30))
def test_saved_time_is_within_3_percent_of_the_best_of_all_placements(seed: int) -> None:
    """Exhaustive over 2 layers of 6 experts; the card is the limit of tokens with two hits."""
    ids = random_ids(seed, layers=2, tokens=60, experts=6, top_k=3)
    for budget in (1, 3, 5, 8):
        best = min(
            priced(hits_histogram(ids, chosen), SLOW_CARD).seconds
            for chosen in placements(2, 6, budget)
        )
        mask = by_marginal_gain(saved_time_gains(ids, 6, SLOW_CARD, budget), budget)
        assert mask.sum() <= budget
        assert priced(hits_histogram(ids, mask), SLOW_CARD).seconds <= 1.03 * best


def placements(layers: int, experts: int, budget: int) -> list[np.ndarray]:
    """All with at most so many experts."""
    found = []
    for size in range(budget + 1):
        for chosen in itertools.combinations(range(layers * experts), size):
            mask = np.zeros(layers * experts, bool)
            mask[list(chosen)] = True
            found.append(mask.reshape(layers, experts))
    return found


@pytest.mark.parametrize("budget", [0, 30, 120, 400, 1500, 12 * 128])
def test_on_skewed_routing_layer_budgets_have_the_most_hits_at_every_budget(budget: int) -> None:
    trace = skewed_trace(1500, layers=12, experts=128, top_k=8, seed=1)
    counts = count_picks(trace.ids, 128)
    rates = [
        priced(hits_histogram(trace.ids, mask), SLOW_K2).hit_rate
        for mask in (
            by_marginal_gain(counts, budget),
            by_frequency(counts, budget),
            uniform(12, 128, budget),
        )
    ]
    assert rates == sorted(rates, reverse=True)


SLOW_K2 = StepCost(top_k=8, fixed=0.01, host=1e-4, gpu=2e-5, shared=1e-4, upload=1e-3)


# -- Caches, step by step in plain Python ----------------------------------------------------------


def lru_by_hand(ids: np.ndarray, start: np.ndarray) -> tuple[float, float]:
    """Hit rate, and uploads per token. ids: one pick for each token."""
    hits = uploads = 0
    for layer, picks in enumerate(ids[:, :, 0].tolist()):
        cached = np.flatnonzero(start[layer]).tolist()[::-1]  # the next to go comes first
        for expert in picks:
            if expert in cached:
                hits += 1
                cached.remove(expert)
            else:
                uploads += 1
                del cached[0]
            cached.append(expert)
    return hits / ids.size, uploads / ids.shape[1]


@pytest.mark.parametrize("seed", range(5))
def test_lru_does_what_a_plain_loop_does_with_another_size_in_each_layer(seed: int) -> None:
    ids = random_ids(seed, layers=3, tokens=80, experts=12, top_k=1)
    start = np.zeros((3, 12), bool)
    for layer, size in enumerate((1, 5, 12)):
        start[layer, :size] = True
    one = StepCost(1, 0.0, 1.0, 0.0, 0.0, 0.0)
    assert outcome(replay_lru(ids, start, one)) == pytest.approx(lru_by_hand(ids, start))


@pytest.mark.parametrize("replay", [replay_lru, replay_lfu])
@pytest.mark.parametrize("seed", range(4))
def test_windows_over_all_of_a_trace_are_the_replay_of_all_of_it(
    replay: Callable[..., Replay], seed: int
) -> None:
    """What a cache holds when a window begins is worked out from what was picked before it."""
    ids = random_ids(seed, layers=3, tokens=60, experts=12, top_k=3)
    start = np.zeros((3, 12), bool)
    for layer, size in enumerate((0, 2, 7)):
        start[layer, 12 - size :] = True
    windows = Windows((0, 15, 30, 45), 15)
    whole, cut = replay(ids, start, SLOW_CARD), replay(ids, start, SLOW_CARD, windows)
    assert outcome(cut) == pytest.approx(outcome(whole), rel=1e-12)
    assert cut.seconds == pytest.approx(whole.seconds, rel=1e-12)
    last = replay(ids, start, SLOW_CARD, Windows((45,), 15))
    assert outcome(last) != outcome(replay(ids[:, 45:], start, SLOW_CARD)), "the past counts"


def test_windows_lie_evenly_over_the_whole_trace() -> None:
    assert Windows.spread(1_000_000, 16, 1024).starts[::5] == (0, 332_992, 665_984, 998_976)
    assert Windows.spread(1_000_000, 16, 1024).tokens == 16_384
    assert Windows.spread(5000, 16, 1024) == Windows((0, 1250, 2500, 3750), 1250)
    assert Windows.spread(1500, 16, 1024) == Windows((0,), 1500)


def test_lfu_brings_an_expert_in_once_it_leads() -> None:
    ids = np.array([[[0], [1], [1], [1], [0], [0], [0]]], np.uint8)
    start = np.array([[True, False]])
    one = StepCost(1, 0.0, 1.0, 0.0, 0.0, 3.0)
    # Expert 1 leads at its second pick, expert 0 at its fourth: they come in after that token.
    assert outcome(replay_lfu(ids, start, one)) == pytest.approx((2 / 7, 2 / 7))


def outcome(replay: Replay) -> tuple[float, float]:
    return replay.hit_rate, replay.uploads


@pytest.mark.parametrize("seed", range(8))
def test_no_sequence_of_cache_contents_has_more_hits_than_belady(seed: int) -> None:
    """The optimum by dynamic programming over all contents; a token may change all of them."""
    experts, size = 5, 2
    ids = random_ids(seed, layers=1, tokens=12, experts=experts, top_k=2)
    contents = [frozenset(c) for c in itertools.combinations(range(experts), size)]
    best = dict.fromkeys(contents, 0)
    for picked in (set(token.tolist()) for token in ids[0]):
        best = {
            after: max(
                hits + len(before & picked)
                for before, hits in best.items()
                if after - before <= picked  # only what the token brought may come in
            )
            for after in contents
        }
    start = np.zeros((1, experts), bool)
    start[0, :size] = True
    assert replay_belady(ids, start, MISSES).hit_rate * ids.size == max(best.values())


def test_belady_bounds_every_cache_and_every_placement_with_its_budgets() -> None:
    trace = skewed_trace(600, layers=6, experts=64, top_k=8, seed=3)
    for budget, windows in itertools.product((48, 120, 300), (None, Windows((0, 250, 500), 100))):
        start = by_marginal_gain(count_picks(trace.ids, 64), budget)
        bound = replay_belady(trace.ids, start, SLOW_K2, windows).hit_rate
        for replay in (replay_lru, replay_lfu):
            assert replay(trace.ids, start, SLOW_K2, windows).hit_rate <= bound
        assert priced(hits_histogram(trace.ids, start), SLOW_K2).hit_rate <= bound


def test_an_upload_takes_the_bus_and_the_host_s_memory() -> None:
    ids = np.array([[[0], [1]]], np.uint8)
    start = np.array([[True, False]])
    slow_bus = StepCost(1, fixed=0.25, host=1.0, gpu=0.5, shared=0.25, upload=8.0)
    # A hit takes 0.75 s on the card; the miss comes in over the bus, beside everything else.
    assert replay_lru(ids, start, slow_bus).seconds == pytest.approx(0.25 + (0.75 + 8.0) / 2)
    fast_bus = StepCost(1, fixed=0.25, host=1.0, gpu=0.5, shared=0.25, upload=0.1)
    assert replay_lru(ids, start, fast_bus).seconds == pytest.approx(0.25 + (0.75 + 2.0) / 2)

"""The tuner's choice: never behind frequency, neither on what it saw nor on what comes after."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from hybridk2.errors import TuningError
from hybridk2.hardware import gpu_named
from hybridk2.placement import by_frequency, uniform
from hybridk2.planner import BUILT_IN, Choices, ModelSizes, plan
from hybridk2.routing_trace import RoutingTrace, TraceHeader
from hybridk2.tuner.choice import FREQUENCY, LAYER_BUDGETS, SAVED_TIME, UNIFORM, Tuning, tune
from hybridk2.tuner.costs import step_cost
from hybridk2.tuner.replay import StepCost, count_picks, hits_histogram, priced
from tests.described_machine import WORKSTATION
from tests.routed_traces import skewed_trace

HOST_BOUND = StepCost(top_k=8, fixed=0.01, host=1e-4, gpu=1e-6, shared=1e-5, upload=1e-3)
CARD_BOUND = replace(HOST_BOUND, gpu=8e-5, shared=2e-4)
SHAPE = {"layers": 12, "experts": 128, "top_k": 8}
BUDGETS = (12, 96, 240, 600, 1200)


def results(tuning: Tuning) -> dict[str, float]:
    return {result.name: result.replay.hit_rate for result in tuning.policies}


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_choice_has_at_least_the_hits_of_frequency_and_uniform(budget: int) -> None:
    tuning = tune(skewed_trace(2000, seed=1, **SHAPE), HOST_BOUND, budget)
    rates = results(tuning)
    assert tuning.chosen.name == LAYER_BUDGETS
    assert tuning.chosen.replay.hit_rate >= max(rates[FREQUENCY], rates[UNIFORM])
    assert tuning.placement.num_resident == budget


@pytest.mark.parametrize("cost", [HOST_BOUND, CARD_BOUND], ids=["host-bound", "card-bound"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_on_another_workload_of_the_model_the_choice_does_not_lose_to_frequency(
    budget: int, cost: StepCost
) -> None:
    """Where all layers are alike, budgets follow noise: the parts held out must notice. Allowed is
    what other tokens of the same model move by themselves: of 2000 x 12 x 8 picks a share of hits
    has a standard error of at most sqrt(1/4 / 192,000) = 0.0011."""
    for same_layers in (False, True):
        made = {"model_seed": 5, "same_layers": same_layers, **SHAPE}
        learned, later = (skewed_trace(2000, seed=seed, **made) for seed in (1, 2))
        placement = tune(learned, cost, budget).placement
        frequency = by_frequency(count_picks(learned.ids, 128), budget)
        ours, theirs = (
            priced(hits_histogram(later.ids, mask), cost) for mask in (placement.mask(), frequency)
        )
        assert ours.seconds <= 1.001 * theirs.seconds
        if cost is HOST_BOUND:
            assert ours.hit_rate >= theirs.hit_rate - 0.001


def test_within_3_percent_of_the_most_hits_that_any_placement_has() -> None:
    for seed in range(10):
        trace = skewed_trace(400, layers=3, experts=4, top_k=1, seed=seed, model_seed=seed, skew=2)
        counts = count_picks(trace.ids, 4)
        for budget in (2, 5, 8):
            tuning = tune(trace, replace(HOST_BOUND, top_k=1), budget)
            best = max(
                counts.ravel()[list(chosen)].sum()
                for chosen in itertools.combinations(range(counts.size), budget)
            )
            assert tuning.chosen.replay.hit_rate * trace.ids.size >= 0.97 * best


def test_where_the_card_is_the_limit_the_choice_is_as_fast_as_any_policy() -> None:
    trace = skewed_trace(2000, seed=1, skew=2.0, **SHAPE)
    for budget in BUDGETS:
        tuning = tune(trace, CARD_BOUND, budget)
        assert SAVED_TIME in results(tuning)
        assert tuning.chosen.held_out is not None
        assert tuning.chosen.tokens_per_second == max(
            result.tokens_per_second for result in tuning.policies if result.name != UNIFORM
        )
    assert tuning.chosen.name == SAVED_TIME
    assert tuning.placement.num_resident < BUDGETS[-1], "experts that cost time are left out"
    assert (
        tuning.chosen.replay.seconds
        < priced(
            hits_histogram(trace.ids, by_frequency(count_picks(trace.ids, 128), BUDGETS[-1])),
            CARD_BOUND,
        ).seconds
    )


def test_what_was_held_out_is_predicted_worse_than_what_was_learned() -> None:
    """With 64 tokens most of what distinguishes experts is chance."""
    tuning = tune(skewed_trace(64, seed=1, **SHAPE), HOST_BOUND, 240)
    assert tuning.chosen.held_out is not None
    assert tuning.chosen.held_out.hit_rate < tuning.chosen.replay.hit_rate
    assert tuning.chosen.tokens_per_second == tuning.chosen.held_out.tokens_per_second


def test_caches_are_bounded_and_named() -> None:
    tuning = tune(skewed_trace(500, seed=1, **SHAPE), HOST_BOUND, 240)
    lru, lfu, belady = tuning.caches
    assert belady.replay.hit_rate >= max(
        lru.replay.hit_rate, lfu.replay.hit_rate, tuning.chosen.replay.hit_rate
    )
    assert lru.replay.uploads > lfu.replay.uploads > belady.replay.uploads == 0


def test_no_budget_changes_nothing_and_all_experts_hit_always() -> None:
    trace = skewed_trace(100, seed=1, **SHAPE)
    nothing, everything = (tune(trace, HOST_BOUND, budget) for budget in (0, 12 * 128))
    assert nothing.chosen.replay == nothing.without
    assert everything.chosen.replay.hit_rate == 1.0


def test_a_trace_of_a_few_tokens_is_refused() -> None:
    trace = RoutingTrace.of_one_request(
        TraceHeader("m", 1, 4, 1, "s"), np.zeros((1, 3, 1), np.uint8)
    )
    with pytest.raises(TuningError, match="3 decoded tokens"):
        tune(trace, replace(HOST_BOUND, top_k=1), 2)


@pytest.mark.parametrize("card", ["RTX 4090", "RTX PRO 6000", "H200"])
def test_uniform_routing_is_predicted_as_the_planner_predicts_it(card: str) -> None:
    """The planner takes the mean of hits, the tuner each token: equal where the host is the limit
    for almost every token, so the tolerance is what the rest can add."""
    sizes = ModelSizes.from_config(BUILT_IN["kimi-k2-thinking"])
    machine = replace(WORKSTATION, gpu=gpu_named(card))
    planned = plan(sizes, machine, Choices(context_tokens=8192))
    assert machine.gpu is not None
    cost = step_cost(sizes, machine.host_read_bytes_per_second, machine.gpu, planned.choices)
    trace = skewed_trace(2000, layers=60, experts=384, top_k=8, seed=0, skew=0.0)
    mask = uniform(60, 384, planned.resident_experts)
    replay = priced(hits_histogram(trace.ids, mask), cost)
    assert replay.hit_rate == pytest.approx(planned.resident_share, abs=0.01)
    assert replay.tokens_per_second == pytest.approx(planned.decode_tokens_per_second, rel=0.02)

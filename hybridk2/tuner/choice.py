"""The choice: what each policy would have done, on the trace and on parts held out of it.

Owns which policies there are, how they are compared and which one is written. A policy that fits
the trace may fit its accidents: each is therefore also learned from three quarters of the tokens
and replayed on the fourth, in turn, and these replays decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hybridk2.errors import TuningError
from hybridk2.placement import Mask, Placement, by_frequency, by_marginal_gain, uniform
from hybridk2.routing_trace import Ids, RoutingTrace
from hybridk2.tuner.replay import (
    Counts,
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

UNIFORM = "uniform"
FREQUENCY = "frequency"
LAYER_BUDGETS = "layer budgets"
SAVED_TIME = "saved time"

# Of all tokens, in turn held out. Contiguous, so that most answers are in one part as a whole.
PARTS = 4
# Tokens that saved time is learned from, evenly from the whole trace: 1 s for K2, 2 Zen 5 cores.
_LEARNED_TOKENS = 32_768
# What the caches are replayed on, step by step: windows over the whole trace, 2 s each for K2.
# Belady fills each anew, for nothing: of K2's 8192 picks in one, 50 experts in a layer are 0.6%.
_CACHE_WINDOWS = 16
_WINDOW_TOKENS = 1024


@dataclass(frozen=True)
class PolicyResult:
    """What a policy would have done. replay: learned from the whole trace and replayed on it.
    held_out: on tokens that it was not learned from; None for caches, which learn as they go.
    tokens: replayed. experts: on the GPU, in all layers."""

    name: str
    meaning: str
    replay: Replay
    held_out: Replay | None
    tokens: int
    experts: int

    @property
    def tokens_per_second(self) -> float:
        """The honest prediction."""
        return (self.held_out or self.replay).tokens_per_second

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True)
class Tuning:
    """All results, and the placement that is worth writing. without: nothing on the GPU."""

    budget: int
    cost: StepCost
    without: Replay
    policies: tuple[PolicyResult, ...]
    caches: tuple[PolicyResult, ...]
    chosen: PolicyResult
    placement: Placement

    def as_dict(self) -> dict[str, Any]:
        """Everything but the placement as plain values, for JSON."""
        return {
            "budget_experts": self.budget,
            "cost_seconds": asdict(self.cost),
            "tokens_per_second_without": self.without.tokens_per_second,
            "policies": [result.as_dict() for result in self.policies],
            "caches": [result.as_dict() for result in self.caches],
            "chosen": self.chosen.name,
            "layer_budgets": [len(ids) for ids in self.placement.resident],
        }


_MEANINGS = {
    UNIFORM: "as many in each layer, whichever",
    FREQUENCY: "as many in each layer, the most picked",
    LAYER_BUDGETS: "the most picked of all layers together",
    SAVED_TIME: "those that save most time beside the others of their layer",
}


def tune(
    trace: RoutingTrace,
    cost: StepCost,
    budget: int,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> Tuning:
    """Replay all policies and choose one. budget: experts on the GPU, in all layers together.

    Raises TuningError for a trace with fewer tokens than parts to hold out.
    """
    if trace.tokens < PARTS:
        raise TuningError(
            f"the trace has {trace.tokens} decoded tokens; expected {PARTS} at least, and "
            "thousands to learn from. Give more prompts, or longer answers"
        )
    experts = trace.header.experts
    parts = np.array_split(trace.ids, PARTS, axis=1)
    counts = np.stack([count_picks(part, experts) for part in parts])
    held_out: dict[str, Counts] = {}
    for number, part in enumerate(parts):
        on_progress(f"part {number + 1} of {PARTS} held out")
        others = [other for place, other in enumerate(parts) if place != number]
        masks = _learned(others, counts.sum(axis=0) - counts[number], cost, budget)
        for name, mask in masks.items():
            held_out[name] = held_out.get(name, 0) + hits_histogram(part, mask)
    on_progress("the whole trace")
    masks = _learned(parts, counts.sum(axis=0), cost, budget)
    policies = tuple(
        PolicyResult(
            name,
            _MEANINGS[name],
            priced(hits_histogram(trace.ids, mask), cost),
            priced(held_out[name], cost),
            trace.tokens,
            int(mask.sum()),
        )
        for name, mask in masks.items()
    )
    chosen = max(
        (result for result in policies if result.name != UNIFORM),
        key=lambda result: result.tokens_per_second,
    )
    mask = masks[chosen.name]
    empty = hits_histogram(trace.ids[:, :1], np.zeros_like(mask))
    return Tuning(
        budget,
        cost,
        priced(empty, cost),
        policies,
        tuple(_caches(trace.ids, mask, cost, on_progress)),
        chosen,
        Placement.from_mask(trace.header.model, chosen.name, mask),
    )


def _learned(parts: list[Ids], counts: Counts, cost: StepCost, budget: int) -> Mapping[str, Mask]:
    """The placements of every policy that learns from these parts of a trace."""
    layers, experts = counts.shape
    masks = {
        UNIFORM: uniform(layers, experts, budget),
        LAYER_BUDGETS: by_marginal_gain(counts, budget),
        FREQUENCY: by_frequency(counts, budget),
    }
    if not cost.host_is_the_limit:  # otherwise it is the same as by counts
        tokens = sum(part.shape[1] for part in parts)
        every = -(-tokens // _LEARNED_TOKENS)
        sample = np.concatenate([part[:, ::every] for part in parts], axis=1)
        gains = saved_time_gains(sample, experts, cost, budget)
        masks[SAVED_TIME] = by_marginal_gain(gains, budget)
    return masks


def _caches(
    ids: Ids, start: Mask, cost: StepCost, on_progress: Callable[[str], None]
) -> list[PolicyResult]:
    """Caches with the chosen placement's experts at first, and as many in each layer all along."""
    windows = Windows.spread(ids.shape[1], _CACHE_WINDOWS, _WINDOW_TOKENS)
    results = []
    for name, meaning, replay in (
        ("LRU", "every pick comes in, the one not picked for longest goes", replay_lru),
        ("LFU", "one that leads in picks comes in, the last goes", replay_lfu),
        ("Belady", "the bound: knows the future, and moves experts for nothing", replay_belady),
    ):
        on_progress(name)
        result = replay(ids, start, cost, windows)
        experts = int(start.sum())
        results.append(PolicyResult(name, meaning, result, None, windows.tokens, experts))
    return results

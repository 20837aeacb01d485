"""The split of a chunk's experts against the best of all splits, and against its formulas."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from hybridk2.prefill_split import ExpertCosts, Split, split

# K2's expert on a workstation: 200 GB/s and 3 TFLOP/s beside PCIe 5 and a card.
K2 = ExpertCosts(
    expert_bytes=24_772_608,
    token_flops=2.0 * 3 * 7168 * 2048,
    host_bytes_per_second=200e9,
    host_flops=3e12,
    bus_bytes_per_second=50e9,
    device_flops=100e12,
    device_fixed_seconds=2e-4,
)


def random_costs(random: np.random.Generator) -> ExpertCosts:
    """Any machine, sensible or not: each speed over three orders of magnitude."""
    factor = 10 ** random.uniform(-1.5, 1.5, 5)
    return ExpertCosts(
        K2.expert_bytes,
        K2.token_flops,
        K2.host_bytes_per_second * factor[0],
        K2.host_flops * factor[1],
        K2.bus_bytes_per_second * factor[2],
        K2.device_flops * factor[3],
        K2.device_fixed_seconds * factor[4],
    )


def random_counts(random: np.random.Generator, experts: int) -> NDArray[np.int64]:
    return (random.pareto(1.0, experts) * random.choice([1, 20, 300])).astype(np.int64)


def check(found: Split, counts: NDArray, resident: NDArray, costs: ExpertCosts) -> None:
    """Every expert with tokens stands in one place, and the seconds are the formulas'."""
    for side in (found.host, found.streamed, found.resident):
        assert list(side) == sorted(side)
    everyone = [*found.host, *found.streamed, *found.resident]
    assert sorted(everyone) == np.flatnonzero(counts).tolist()
    assert list(found.resident) == np.flatnonzero((counts > 0) & resident).tolist()
    host = sum(
        max(
            costs.expert_bytes / costs.host_bytes_per_second,
            costs.token_flops * counts[expert] / costs.host_flops,
        )
        for expert in found.host
    )
    device = 0.0
    for expert in (*found.streamed, *found.resident):
        work = costs.device_fixed_seconds + costs.token_flops * counts[expert] / costs.device_flops
        copying = costs.expert_bytes / costs.bus_bytes_per_second
        device += work if resident[expert] else max(copying, work)
    assert found.host_seconds == pytest.approx(host)
    assert found.device_seconds == pytest.approx(device)


@pytest.mark.parametrize("seed", range(60))
def test_no_split_is_shorter_by_more_than_the_stated_bound(seed: int) -> None:
    random = np.random.default_rng(seed)
    experts = int(random.integers(1, 11))
    counts, costs = random_counts(random, experts), random_costs(random)
    resident = random.random(experts) < 0.2
    found = split(counts, resident, costs)
    check(found, counts, resident, costs)
    movable = np.flatnonzero((counts > 0) & ~resident)
    host, streamed = costs.on_host(counts[movable]), costs.streamed(counts[movable])
    base = costs.on_device(counts[(counts > 0) & resident]).sum()
    best = min(
        max(host[~moved].sum(), base + streamed[moved].sum())
        for bits in itertools.product([False, True], repeat=len(movable))
        for moved in [np.array(bits, bool)]
    )
    bound = max(host * streamed / (host + streamed), default=0.0)
    assert best * (1 - 1e-9) <= found.seconds <= (best + bound) * (1 + 1e-9)


def test_the_largest_go_to_the_device_where_the_bus_is_the_limit() -> None:
    random = np.random.default_rng(0)
    counts = np.minimum(random_counts(random, 384), 2000)
    found = split(counts, np.zeros(384, bool), K2)
    assert found.streamed
    assert found.host
    assert counts[list(found.streamed)].min() >= counts[list(found.host)].max()


@pytest.mark.parametrize("tokens", [512, 4096, 16_384])
def test_a_layer_of_k2_takes_less_than_either_side_alone_and_both_sides_end_together(
    tokens: int,
) -> None:
    counts = np.random.default_rng(tokens).multinomial(tokens * 8, np.full(384, 1 / 384))
    nobody = np.zeros(384, bool)
    found = split(counts, nobody, K2)
    alone = min(K2.on_host(counts).sum(), K2.streamed(counts).sum())
    assert found.seconds < alone
    one = max(K2.on_host(counts).max(), K2.streamed(counts).max())
    assert abs(found.host_seconds - found.device_seconds) <= one
    assert len(found.host) + len(found.streamed) == 384


def test_a_few_tokens_stay_on_the_host_where_the_bus_is_slow() -> None:
    counts = np.zeros(384, np.int64)
    counts[:8] = 1
    found = split(counts, np.zeros(384, bool), replace(K2, bus_bytes_per_second=1e9))
    assert found.host == tuple(range(8))
    assert not found.streamed


def test_residents_are_computed_where_they_live_whatever_they_cost() -> None:
    counts = np.array([5, 0, 7, 0, 3])
    resident = np.array([True, True, False, False, True])
    found = split(counts, resident, replace(K2, device_fixed_seconds=100.0))
    assert found == Split((2,), (), (0, 4), found.host_seconds, found.device_seconds)
    nothing = split(np.zeros(5, np.int64), resident, K2)
    assert nothing == Split((), (), (), 0.0, 0.0)


def test_the_same_counts_are_split_alike_every_time() -> None:
    counts = np.full(40, 100)  # all alike: only the ids tell them apart
    found = {split(counts, np.zeros(40, bool), K2) for _ in range(3)}
    assert len(found) == 1
    streamed = next(iter(found)).streamed
    assert streamed == tuple(range(len(streamed)))

"""Residents that change: more hits and the same sums, or a refusal where there is no copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybridk2.device import CpuDevice
from hybridk2.errors import ConfigError
from hybridk2.experts.changes import ChangingResidents, measure_swap_costs
from hybridk2.experts.host import HostExperts
from hybridk2.experts.resident import ResidentExperts
from hybridk2.experts.router import HOST_SHARE
from hybridk2.placement_changes import SwapCosts
from hybridk2.prefill_split import ExpertCosts

from .expert_weights import (
    HIDDEN,
    INTERMEDIATE,
    RandomLayer,
    assert_within,
    compute,
    random_activations,
)

EXPERTS, TOP_K = 12, 2
FEW = np.zeros((1, EXPERTS), bool)
FEW[0, :3] = True


@pytest.fixture(scope="module")
def layer() -> RandomLayer:
    return RandomLayer(EXPERTS, HIDDEN, INTERMEDIATE)


def residents(layer: RandomLayer, host: HostExperts, mask: np.ndarray) -> ResidentExperts:
    resident = ResidentExperts(mask, HIDDEN, INTERMEDIATE, CpuDevice())
    for slot, expert in np.argwhere(mask).tolist():
        resident.load(slot, expert, host.pack_expert(*layer.experts[expert]))
    return resident


@pytest.mark.parametrize("nodes", [1, 2])
def test_popular_experts_come_in_and_every_sum_stays_that_of_all_experts(
    layer: RandomLayer, nodes: int
) -> None:
    random = np.random.default_rng(0)
    # Experts 7 and 9 are picked nearly always, the residents 0, 1 and 2 hardly ever.
    popularity = np.full(EXPERTS, 0.02)
    popularity[[7, 9]] = 0.4
    popularity /= popularity.sum()
    with HostExperts(1, EXPERTS, HIDDEN, INTERMEDIATE, threads=2, simulated_nodes=nodes) as host:
        layer.load_into(host)
        resident = residents(layer, host, FEW)
        changing = ChangingResidents(host, resident, SwapCosts(1e-3, 5e-3), window_tokens=200)
        hits = []
        for step in range(150):
            picks = random.choice(EXPERTS, TOP_K, replace=False, p=popularity)
            ids = torch.tensor(picks[None], dtype=torch.int32)
            host_ids, places = resident.split(0, ids)
            hits.append(int((places != HOST_SHARE).sum()))
            if step % 15 == 0:
                x, weights = random_activations(1, HIDDEN, torch.bfloat16), torch.rand(1, TOP_K)
                total = compute(host, x, host_ids, weights)
                total = total + resident.compute(0, x, places, weights)
                assert_within(total, layer.reference(x, ids, weights))
            changing.after_step(torch.from_numpy(picks.reshape(1, 1, TOP_K)))
        assert changing.uploads == 2
        assert resident.mask()[0, [7, 9]].all()
        assert resident.mask().sum() == 3
        assert sum(hits[-50:]) > 50 > sum(hits[:50])


def test_nothing_moves_where_an_upload_costs_more_than_it_saves(layer: RandomLayer) -> None:
    with HostExperts(1, EXPERTS, HIDDEN, INTERMEDIATE, threads=2) as host:
        layer.load_into(host)
        resident = residents(layer, host, FEW)
        changing = ChangingResidents(host, resident, SwapCosts(1e-6, 1.0), window_tokens=200)
        for _ in range(200):
            changing.after_step(torch.tensor([[[7, 9]]]))
        assert changing.uploads == 0
        assert np.array_equal(resident.mask(), FEW)


def test_without_a_copy_on_the_host_a_changing_placement_is_refused(layer: RandomLayer) -> None:
    with HostExperts(1, EXPERTS, HIDDEN, INTERMEDIATE, threads=2, elsewhere=FEW) as host:
        resident = residents(layer, host, FEW)
        with pytest.raises(ConfigError, match=r"expert 0 is on the device alone.*--keep-host-copy"):
            ChangingResidents(host, resident, SwapCosts(1.0, 0.0), window_tokens=200)


def test_a_hit_saves_what_the_host_takes_less_what_the_device_takes(layer: RandomLayer) -> None:
    costs = ExpertCosts(
        expert_bytes=1000,
        token_flops=10.0,
        host_bytes_per_second=1e6,
        host_flops=1e9,
        bus_bytes_per_second=5e5,
        device_flops=1e9,
        device_fixed_seconds=0.0,
    )
    now = 0.0

    def slow_sum(  # type: ignore[no-untyped-def]
        x, places, weights, panels, *, intermediate
    ):
        nonlocal now
        now += 1e-3 + 2e-4 * int((places != HOST_SHARE).sum())
        return torch.zeros(x.shape)

    resident = ResidentExperts(FEW, HIDDEN, INTERMEDIATE, CpuDevice(), slow_sum)
    found = measure_swap_costs(costs, resident, CpuDevice(), HIDDEN, top_k=2, clock=lambda: now)
    assert found.hit_seconds == pytest.approx(1e-3 - 2e-4)
    assert found.upload_seconds == pytest.approx(2e-3)

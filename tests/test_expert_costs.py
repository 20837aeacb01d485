"""Measured costs are those of the machine that was measured, told by a clock that tests own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from hybridk2.device import CpuDevice, InlineCopyQueue
from hybridk2.experts.expert_costs import measure_expert_costs
from hybridk2.experts.host import HostExperts
from hybridk2.experts.prefill import ExpertProducts
from hybridk2.experts.stream import ExpertStream
from hybridk2.prefill_split import ExpertCosts, split

from .expert_weights import EXPERTS, HIDDEN, INTERMEDIATE, RandomLayer

LOADED = [(0, expert) for expert in range(EXPERTS)] + [(1, 2), (1, 5)]


@pytest.fixture(scope="module")
def experts() -> Iterator[HostExperts]:
    layer = RandomLayer(EXPERTS, HIDDEN, INTERMEDIATE)
    with HostExperts(2, EXPERTS, HIDDEN, INTERMEDIATE, threads=2) as experts:
        for slot, expert in LOADED:
            experts.load_expert(slot, expert, *layer.experts[expert])
        yield experts


class Clock:
    """Stands still but for what parts of a machine say they took."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_machine_of_known_speeds_is_measured_as_what_it_is(
    experts: HostExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = ExpertCosts(
        expert_bytes=experts.expert_bytes,
        token_flops=6.0 * HIDDEN * INTERMEDIATE,
        host_bytes_per_second=3e9,
        host_flops=7e10,
        bus_bytes_per_second=2e9,
        device_flops=5e10,
        device_fixed_seconds=3e-4,
    )
    clock = Clock()
    submit, copy, work = HostExperts.submit, InlineCopyQueue.copy, ExpertProducts.__call__

    def slow_submit(self, slot, x, ids, weights):  # type: ignore[no-untyped-def]
        counts = np.bincount(ids.flatten().numpy())
        clock.seconds += float(known.on_host(counts[counts > 0]).sum())
        return submit(self, slot, x, ids, weights)

    def slow_copy(self, target, source):  # type: ignore[no-untyped-def]
        clock.seconds += source.numel() / known.bus_bytes_per_second
        copy(self, target, source)

    def slow_work(self, panel, x):  # type: ignore[no-untyped-def]
        clock.seconds += float(known.on_device(np.array(x.shape[0])))
        return work(self, panel, x)

    monkeypatch.setattr(HostExperts, "submit", slow_submit)
    monkeypatch.setattr(InlineCopyQueue, "copy", slow_copy)
    monkeypatch.setattr(ExpertProducts, "__call__", slow_work)
    device = CpuDevice()
    found = measure_expert_costs(
        experts,
        LOADED,
        ExpertStream(experts, device, 2),
        ExpertProducts(HIDDEN, INTERMEDIATE, device),
        device,
        clock,
    )
    for name, value in vars(known).items():
        assert getattr(found, name) == pytest.approx(value), name


def test_what_is_measured_here_splits_a_chunk(experts: HostExperts) -> None:
    device = CpuDevice()
    costs = measure_expert_costs(
        experts,
        LOADED,
        ExpertStream(experts, device, 2),
        ExpertProducts(HIDDEN, INTERMEDIATE, device),
        device,
    )
    for name, value in vars(costs).items():
        assert np.isfinite(value), name
        assert value > 0 or name == "device_fixed_seconds", name
    counts = torch.full((EXPERTS,), 100).numpy()
    found = split(counts, np.zeros(EXPERTS, bool), costs)
    assert 0 < found.seconds < 60

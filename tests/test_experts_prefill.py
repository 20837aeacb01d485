"""A chunk's experts in two places: whatever is computed where, the sum is that of all of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hybridk2.device import CpuDevice
from hybridk2.errors import EngineError
from hybridk2.experts import panels, prefill
from hybridk2.experts.host import HostExperts
from hybridk2.experts.prefill import ExpertProducts, PrefillExperts
from hybridk2.experts.resident import ResidentExperts
from hybridk2.experts.router import HOST_SHARE, AsyncRouter, PendingExperts, ThreadRouter
from hybridk2.experts.stream import ExpertStream
from hybridk2.prefill_split import ExpertCosts, Split

from .delayed_queue import DelayedDevice
from .expert_weights import (
    HIDDEN,
    INTERMEDIATE,
    RandomLayer,
    assert_within,
    random_activations,
    random_routing,
)

EXPERTS, TOP_K, LAYERS = 12, 3, 2
COSTS = ExpertCosts(
    expert_bytes=panels.expert_bytes(HIDDEN, INTERMEDIATE),
    token_flops=6.0 * HIDDEN * INTERMEDIATE,
    host_bytes_per_second=1e9,
    host_flops=1e9,
    bus_bytes_per_second=1e9,
    device_flops=1e9,
    device_fixed_seconds=0.0,
)


@pytest.fixture(scope="module")
def layers() -> list[RandomLayer]:
    return [RandomLayer(EXPERTS, HIDDEN, INTERMEDIATE, seed) for seed in range(LAYERS)]


@dataclass
class Machine:
    """Host, stream and device put together. mask: who lives on the device, and not on the host."""

    layers: list[RandomLayer]
    mask: NDArray[np.bool_]
    device: CpuDevice

    def __post_init__(self) -> None:
        self.host = HostExperts(
            LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, threads=2, elsewhere=self.mask
        )
        self.resident = ResidentExperts(self.mask, HIDDEN, INTERMEDIATE, CpuDevice())
        for slot, layer in enumerate(self.layers):
            for expert, matrices in enumerate(layer.experts):
                if self.mask[slot, expert]:
                    packed = self.host.pack_expert(*matrices)
                    self.resident.load(slot, expert, packed)
                else:
                    self.host.load_expert(slot, expert, *matrices)
        self.experts = PrefillExperts(
            ThreadRouter(self.host, self.device),
            self.device,
            ExpertStream(self.host, self.device, 3),
            ExpertProducts(HIDDEN, INTERMEDIATE, self.device),
            COSTS,
            EXPERTS,
            self.resident,
        )

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *error: object) -> None:
        self.host.close()


def choose(monkeypatch: pytest.MonkeyPatch, streamed: set[int]) -> None:
    """Have these experts streamed, whatever they cost, wherever they live with the host."""

    def split(counts: NDArray, resident: NDArray, costs: ExpertCosts) -> Split:
        picked = set(np.flatnonzero(counts).tolist())
        home = {expert for expert in picked if resident[expert]}
        moved = (picked & streamed) - home
        host = picked - moved - home
        sides = (tuple(sorted(side)) for side in (host, moved, home))
        return Split(*sides, 0.0, 0.0)

    monkeypatch.setattr(prefill, "split", split)


def compute(
    experts: AsyncRouter, slot: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    return experts.collect(experts.submit(slot, x, ids, weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("seed", range(10))
def test_any_split_of_a_chunk_gives_the_sum_of_all_experts(
    layers: list[RandomLayer],
    dtype: torch.dtype,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each expert is computed with the reference's bound for fp32 sums in any order, streamed ones
    too, as nothing of them is rounded. A token's terms are added in two sums instead of one: one
    more rounding, for which the bound leaves room (k + 2 for k terms)."""
    random = np.random.default_rng(seed)
    mask = random.random((LAYERS, EXPERTS)) < random.choice([0, 0.2, 0.6])
    device = DelayedDevice(seed, copy_seconds=2e-4)
    tokens = int(random.choice([1, 7, 60]))
    with Machine(layers, mask, device) as machine:
        for chunk in range(3):
            chosen = set(np.flatnonzero(random.random(EXPERTS) < random.choice([0, 0.4, 1])))
            choose(monkeypatch, {int(expert) for expert in chosen})
            for slot, layer in enumerate(layers):
                x = random_activations(tokens, HIDDEN, dtype, seed + chunk)
                ids, weights = random_routing(tokens, EXPERTS, TOP_K, seed + chunk)
                ids[::5, 0] = HOST_SHARE
                found = compute(machine.experts, slot, x, ids, weights)
                assert found.dtype == torch.float32
                assert_within(found, layer.reference(x, ids, weights))
    device.queue.finish()


def test_bits_are_the_routers_own_where_the_host_computes_all(
    layers: list[RandomLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, set())
    with Machine(layers, np.zeros((LAYERS, EXPERTS), bool), CpuDevice()) as machine:
        for tokens in (1, 30, 300):
            x = random_activations(tokens, HIDDEN, torch.bfloat16)
            ids, weights = random_routing(tokens, EXPERTS, TOP_K)
            expected = compute(ThreadRouter(machine.host, machine.device), 0, x, ids, weights)
            assert torch.equal(compute(machine.experts, 0, x, ids, weights), expected)


def test_bits_depend_on_who_computes_what_and_not_on_delays(
    layers: list[RandomLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, {1, 4, 7, 9})
    mask = np.zeros((LAYERS, EXPERTS), bool)
    mask[:, [0, 5]] = True
    x = random_activations(40, HIDDEN, torch.bfloat16)
    ids, weights = random_routing(40, EXPERTS, TOP_K)
    results = []
    for seed in range(4):
        device = DelayedDevice(seed, copy_seconds=1e-3)
        with Machine(layers, mask, device) as machine:
            results.append(compute(machine.experts, 1, x, ids, weights))
            device.queue.finish()
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_split_follows_the_costs(layers: list[RandomLayer]) -> None:
    """With costs that are alike on both sides both get a share."""
    mask = np.zeros((LAYERS, EXPERTS), bool)
    mask[0, 3] = True
    x = random_activations(50, HIDDEN, torch.bfloat16)
    ids, weights = random_routing(50, EXPERTS, TOP_K)
    with Machine(layers, mask, CpuDevice()) as machine:
        compute(machine.experts, 0, x, ids, weights)
        found = machine.experts.last_split
        assert found is not None
        assert found.resident == (3,)
        assert found.host
        assert found.streamed
        assert sorted((*found.host, *found.streamed, 3)) == list(range(EXPERTS))


def test_an_expert_that_arrives_by_a_swap_is_computed_where_it_now_lives(
    layers: list[RandomLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a copy of every expert on the host, as placements that change need."""
    choose(monkeypatch, {2})
    with Machine(layers, np.zeros((LAYERS, EXPERTS), bool), CpuDevice()) as machine:
        mask = np.zeros((LAYERS, EXPERTS), bool)
        mask[0, 4] = True
        resident = ResidentExperts(mask, HIDDEN, INTERMEDIATE, CpuDevice())
        packed = [machine.host.pack_expert(*matrices) for matrices in layers[0].experts]
        resident.load(0, 4, packed[4])
        machine.experts = PrefillExperts(
            ThreadRouter(machine.host, machine.device),
            machine.device,
            ExpertStream(machine.host, machine.device, 2),
            ExpertProducts(HIDDEN, INTERMEDIATE, machine.device),
            COSTS,
            EXPERTS,
            resident,
        )
        x = random_activations(30, HIDDEN, torch.bfloat16)
        ids, weights = random_routing(30, EXPERTS, TOP_K)
        for leaving, entering in ((4, 7), (7, 2)):
            resident.replace(0, leaving, entering, packed[entering])
            found = compute(machine.experts, 0, x, ids, weights)
            assert_within(found, layers[0].reference(x, ids, weights))
            assert machine.experts.last_split is not None
            assert machine.experts.last_split.resident == (entering,)


def test_the_host_begins_before_the_device_is_given_its_share(
    layers: list[RandomLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, set(range(6)))
    order: list[str] = []
    with Machine(layers, np.zeros((LAYERS, EXPERTS), bool), CpuDevice()) as machine:
        submit, products = ThreadRouter.submit, ExpertProducts.__call__

        def noted_submit(self: ThreadRouter, *call: object) -> PendingExperts:
            order.append("host")
            return submit(self, *call)  # type: ignore[arg-type]

        def noted_products(self: ExpertProducts, *call: torch.Tensor) -> torch.Tensor:
            order.append("device")
            return products(self, *call)

        monkeypatch.setattr(ThreadRouter, "submit", noted_submit)
        monkeypatch.setattr(ExpertProducts, "__call__", noted_products)
        x = random_activations(60, HIDDEN, torch.bfloat16)
        compute(machine.experts, 0, x, *random_routing(60, EXPERTS, TOP_K))
    assert order == ["host", *["device"] * 6]


def test_an_error_between_leaves_experts_that_work(
    layers: list[RandomLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, set(range(EXPERTS)))
    x = random_activations(20, HIDDEN, torch.bfloat16)
    ids, weights = random_routing(20, EXPERTS, TOP_K)
    with Machine(layers, np.zeros((LAYERS, EXPERTS), bool), CpuDevice()) as machine:
        products, calls = ExpertProducts.__call__, iter([None, None, EngineError("no memory")])

        def failing(self: ExpertProducts, *call: torch.Tensor) -> torch.Tensor:
            if (error := next(calls, None)) is not None:
                raise error
            return products(self, *call)

        monkeypatch.setattr(ExpertProducts, "__call__", failing)
        with pytest.raises(EngineError, match="no memory"):
            compute(machine.experts, 0, x, ids, weights)
        found = compute(machine.experts, 0, x, ids, weights)
        assert_within(found, layers[0].reference(x, ids, weights))


def test_a_token_that_is_not_finite_spoils_only_itself(
    layers: list[RandomLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, {0, 1, 2, 3, 4})
    x = random_activations(9, HIDDEN, torch.bfloat16)
    ids, weights = random_routing(9, EXPERTS, TOP_K)
    with Machine(layers, np.zeros((LAYERS, EXPERTS), bool), CpuDevice()) as machine:
        x[4] = float("nan")
        found = compute(machine.experts, 0, x, ids, weights)
        assert found[4].isnan().all()
        others = torch.arange(9) != 4
        assert_within(found[others], layers[0].reference(x[others], ids[others], weights[others]))


def test_a_prompt_of_one_token_and_none_at_all(layers: list[RandomLayer]) -> None:
    with Machine(layers, np.zeros((LAYERS, EXPERTS), bool), CpuDevice()) as machine:
        x = random_activations(2, HIDDEN, torch.bfloat16)
        nobody = torch.full((2, TOP_K), HOST_SHARE, dtype=torch.int32)
        zeros = compute(machine.experts, 0, x, nobody, torch.ones(2, TOP_K))
        assert torch.equal(zeros, torch.zeros(2, HIDDEN))
        none = compute(machine.experts, 0, x[:0], nobody[:0], torch.ones(0, TOP_K))
        assert none.shape == (0, HIDDEN)

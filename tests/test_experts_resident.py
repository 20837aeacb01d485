"""Experts on the device: the right ones computed there, by a recorded step, whatever is swapped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybridk2.device import CpuDevice
from hybridk2.errors import EngineError
from hybridk2.experts.host import HostExperts
from hybridk2.experts.resident import ResidentExperts
from hybridk2.experts.router import HOST_SHARE

from .expert_weights import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    RandomLayer,
    assert_within,
    compute,
    random_activations,
    random_routing,
)
from .recorded_device import RecordedDevice


@pytest.fixture(scope="module")
def layer() -> RandomLayer:
    return RandomLayer(EXPERTS, HIDDEN, INTERMEDIATE)


@pytest.fixture(scope="module")
def packed(layer: RandomLayer) -> list[torch.Tensor]:
    with HostExperts(1, 1, HIDDEN, INTERMEDIATE, threads=1) as experts:
        return [experts.pack_expert(*matrices) for matrices in layer.experts]


def residents(mask: np.ndarray, packed: list[torch.Tensor]) -> ResidentExperts:
    resident = ResidentExperts(mask, HIDDEN, INTERMEDIATE, CpuDevice())
    for slot, expert in np.argwhere(mask).tolist():
        resident.load(slot, expert, packed[expert])
    resident.check_loaded()
    return resident


def mask_of(*layers: list[int]) -> np.ndarray:
    mask = np.zeros((len(layers), EXPERTS), bool)
    for slot, experts in enumerate(layers):
        mask[slot, experts] = True
    return mask


def test_every_pick_is_computed_in_one_place_and_nobody_in_none(
    packed: list[torch.Tensor],
) -> None:
    mask = mask_of([1, 4], [], list(range(EXPERTS)))
    resident = residents(mask, packed)
    assert np.array_equal(resident.mask(), mask)
    assert resident.num_bytes == (2 + EXPERTS) * len(packed[0])
    ids, _ = random_routing(50, EXPERTS, TOP_K)
    ids[3] = ids[::7, 0] = HOST_SHARE
    for slot in range(3):
        host_ids, places = resident.split(slot, ids)
        assert host_ids.dtype == places.dtype == torch.int32
        here = torch.from_numpy(mask[slot])[ids.long()] & (ids != HOST_SHARE)
        assert torch.equal(places != HOST_SHARE, here)
        assert torch.equal(host_ids, torch.where(here, HOST_SHARE, ids))
        for expert in np.flatnonzero(mask[slot]).tolist():
            assert torch.equal(resident.panel(slot, expert), packed[expert])
        assert [resident.is_resident(slot, e) for e in range(EXPERTS)] == mask[slot].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("seed", range(8))
def test_any_split_between_host_and_device_gives_the_sum_of_all_experts(
    layer: RandomLayer, packed: list[torch.Tensor], dtype: torch.dtype, seed: int
) -> None:
    """Both shares are within their bounds of fp64, and so is their sum but for one more rounding of
    fp32, for which a term more than the token has leaves room in each bound."""
    random = np.random.default_rng(seed)
    mask = random.random((1, EXPERTS)) < random.random()
    tokens = int(random.integers(1, 9))
    resident = residents(mask, packed)
    x = random_activations(tokens, HIDDEN, dtype, seed)
    ids, weights = random_routing(tokens, EXPERTS, TOP_K, seed)
    host_ids, places = resident.split(0, ids)
    with HostExperts(1, EXPERTS, HIDDEN, INTERMEDIATE, threads=2, elsewhere=mask) as experts:
        for number in np.flatnonzero(~mask[0]).tolist():
            experts.load_expert(0, number, *layer.experts[number])
        host = compute(experts, x, host_ids, weights)
    device = resident.compute(0, x, places, weights)
    assert_within(host, layer.reference(x, host_ids, weights))
    own_ids = torch.where(places == HOST_SHARE, HOST_SHARE, ids)
    assert_within(device, layer.reference(x, own_ids, weights))
    assert_within(host + device, layer.reference(x, ids, weights))


def test_a_recorded_step_follows_the_table_and_the_panels_that_are_swapped_under_it(
    layer: RandomLayer, packed: list[torch.Tensor]
) -> None:
    """The recorder refuses a read back to the host, and replays operations on the same memory."""
    resident = ResidentExperts(
        mask_of([1, 4]), HIDDEN, INTERMEDIATE, CpuDevice(), _sum_of_panel_bytes
    )
    for expert in (1, 4):
        resident.load(0, expert, packed[expert])
    x, ids = random_activations(3, HIDDEN, torch.bfloat16), torch.zeros(3, TOP_K, dtype=torch.int32)
    weights = torch.ones(3, TOP_K)
    host_ids, places, result = torch.zeros_like(ids), torch.zeros_like(ids), torch.zeros(3, HIDDEN)

    def step() -> None:
        split = resident.split(0, ids)
        host_ids.copy_(split[0])
        places.copy_(split[1])
        result.copy_(resident.compute(0, x, split[1], weights))

    replay = RecordedDevice().record(step)
    for swap in (None, (4, 2), (1, 5), (2, 4)):
        if swap is not None:
            resident.replace(0, *swap, packed[swap[1]])
        here = np.flatnonzero(resident.mask()[0]).tolist()
        for seed in range(3):
            ids.copy_(random_routing(3, EXPERTS, TOP_K, seed)[0])
            ids[0, 0] = HOST_SHARE
            replay()
            mine = sum(ids == expert for expert in here).bool()
            assert torch.equal(places != HOST_SHARE, mine)
            assert torch.equal(host_ids, torch.where(mine, HOST_SHARE, ids))
            sums = torch.stack([panel.long().sum() for panel in packed]).float()
            expected = torch.where(mine, sums[ids.long()], 0).sum(1, keepdim=True)
            assert torch.equal(result, expected.expand(3, HIDDEN))


def _sum_of_panel_bytes(
    x: torch.Tensor,
    places: torch.Tensor,
    weights: torch.Tensor,
    panels: torch.Tensor,
    *,
    intermediate: int,
) -> torch.Tensor:
    """Arithmetic without a read back, as a card's is: each token gets its panels' bytes, summed."""
    sums = panels.long().sum(1).float()
    found = torch.where(places >= 0, sums[places.clamp(min=0).long()], 0) * weights
    return found.sum(1, keepdim=True).expand(x.shape)


def test_a_swapped_in_expert_computes_as_if_it_had_always_been_there(
    layer: RandomLayer, packed: list[torch.Tensor]
) -> None:
    resident = residents(mask_of([0, 1]), packed)
    resident.replace(0, 0, 3, packed[3])
    resident.check_loaded()
    x = random_activations(5, HIDDEN, torch.bfloat16)
    ids = torch.tensor([[3, 1]] * 5, dtype=torch.int32)
    weights = torch.rand(5, 2)
    host_ids, places = resident.split(0, ids)
    assert (host_ids == HOST_SHARE).all()
    assert_within(resident.compute(0, x, places, weights), layer.reference(x, ids, weights))


def test_what_does_not_belong_is_refused_and_changes_nothing(packed: list[torch.Tensor]) -> None:
    resident = ResidentExperts(mask_of([1, 4]), HIDDEN, INTERMEDIATE, CpuDevice())
    with pytest.raises(EngineError, match=r"slot 0, expert 2 is not one of those on cpu"):
        resident.load(0, 2, packed[2])
    with pytest.raises(EngineError, match=r"expected \d+ packed bytes, found torch.uint8 \(7,\)"):
        resident.load(0, 1, packed[1][:7])
    resident.load(0, 1, packed[1])
    with pytest.raises(EngineError, match=r"expert 1 was loaded before onto cpu"):
        resident.load(0, 1, packed[1])
    with pytest.raises(EngineError, match=r"layer slot 0, expert 4 was not loaded"):
        resident.check_loaded()
    resident.load(0, 4, packed[4])
    for leaving, entering, bytes_ in ((2, 3, packed[3]), (1, 4, packed[4]), (1, 3, packed[3][1:])):
        with pytest.raises(EngineError, match=f"expert {entering}"):
            resident.replace(0, leaving, entering, bytes_)
    assert np.array_equal(resident.mask(), mask_of([1, 4]))
    assert torch.equal(resident.panel(0, 1), packed[1])
    assert torch.equal(resident.panel(0, 4), packed[4])


def test_a_token_that_is_not_finite_spoils_only_itself(
    layer: RandomLayer, packed: list[torch.Tensor]
) -> None:
    resident = residents(mask_of(list(range(EXPERTS))), packed)
    x = random_activations(6, HIDDEN, torch.bfloat16)
    ids, weights = random_routing(6, EXPERTS, TOP_K)
    places = resident.split(0, ids)[1]
    sound = resident.compute(0, x, places, weights)
    x[2] = float("nan")
    spoiled = resident.compute(0, x, places, weights)
    others = [0, 1, 3, 4, 5]
    assert spoiled[2].isnan().all()
    assert torch.equal(spoiled[others], sound[others])

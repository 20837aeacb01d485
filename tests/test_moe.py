"""Who computes a routed expert, and when, is a matter of place: sums are those of a layer alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybridk2.checkpoint import Checkpoint
from hybridk2.device import CpuDevice
from hybridk2.experts.host import HostExperts
from hybridk2.experts.loading import load_experts
from hybridk2.experts.router import HOST_SHARE, PendingExperts, ThreadRouter
from hybridk2.kv_cache import PagedLatentCache
from hybridk2.model.decode_batch import DecodeBatch
from hybridk2.model.k2 import K2Model
from hybridk2.model.loading import load_model
from hybridk2.model.moe import MixtureOfExperts, RoutedExperts

TOKENS, ROWS = 3, 4


class Spy(ThreadRouter):
    """Keeps what the host was given: (slot, ids)."""

    def __init__(self, experts: HostExperts) -> None:
        super().__init__(experts, CpuDevice())
        self.given: list[tuple[int, Tensor]] = []

    def submit(self, slot: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> PendingExperts:
        self.given.append((slot, expert_ids.clone()))
        return super().submit(slot, x, expert_ids, weights)


class Residents:
    """Experts as if they lived on the device; the host's memory lends them."""

    def __init__(self, experts: HostExperts, mask: Tensor) -> None:
        """mask: (MoE layers, experts) bool."""
        self._experts = experts
        self._mask = mask

    def split(self, slot: int, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        here = self._mask[slot][expert_ids.clamp(min=0).long()] & (expert_ids != HOST_SHARE)
        return expert_ids.where(~here, HOST_SHARE), expert_ids.where(here, HOST_SHARE)

    def compute(self, slot: int, x: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        return self._experts.wait(self._experts.submit(slot, x, places, weights))

    def is_resident(self, slot: int, expert: int) -> bool:
        return bool(self._mask[slot, expert])


class Workbench:
    """Small models over one set of experts."""

    def __init__(self, folder: Path) -> None:
        self._checkpoint = Checkpoint.open(folder)
        config = self.config = self._checkpoint.config
        self.experts = HostExperts.of_model(
            config,
            threads=1,
        )
        load_experts(self._checkpoint, self.experts, lambda progress: None)

    def model(self, routed: RoutedExperts) -> K2Model:
        device = CpuDevice()
        return load_model(self._checkpoint, self.experts, device, torch.float32, routed=routed)

    def layers(self, routed: RoutedExperts) -> list[MixtureOfExperts]:
        return [layer.moe for layer in self.model(routed).layers if layer.moe is not None]

    def batch(self) -> DecodeBatch:
        """TOKENS tokens after a past of one each, and padding."""
        cache = PagedLatentCache(self.config, 1024, 64, CpuDevice(), torch.float32)
        sequences = [cache.open([n, n], repeatable=False) for n in range(TOKENS)]
        for sequence in sequences:
            sequence.reserve(2)
            sequence.advance([1])
        batch = DecodeBatch(self.config, ROWS, cache, CpuDevice(), torch.float32)
        batch.fill(torch.zeros(TOKENS, self.config.hidden_size), sequences)
        return batch

    def rows(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(ROWS, self.config.hidden_size, generator=generator)

    def routed_sum(self, slot: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.experts.wait(self.experts.submit(slot, x, ids, weights))

    def close(self) -> None:
        self.experts.close()
        self._checkpoint.close()


@pytest.fixture(scope="module")
def workbench(small_checkpoint: Path) -> Iterator[Workbench]:
    made = Workbench(small_checkpoint)
    yield made
    made.close()


def assert_sums(found: Tensor, wanted: Tensor) -> None:
    # The same fp32 terms of order 1, a handful of them added in another order.
    torch.testing.assert_close(found[:TOKENS], wanted[:TOKENS], rtol=0, atol=1e-5)


def test_no_expert_works_for_padding(workbench: Workbench) -> None:
    spy = Spy(workbench.experts)
    (first, _) = workbench.layers(RoutedExperts(spy))
    first.decode(workbench.rows(0), workbench.batch())
    ((_, ids),) = spy.given
    assert bool((ids[:TOKENS] >= 0).all())
    assert bool((ids[TOKENS:] == HOST_SHARE).all())


@pytest.mark.parametrize("seed", range(6))
def test_any_share_on_the_device_gives_the_sums_of_the_host_alone(
    workbench: Workbench, seed: int
) -> None:
    config = workbench.config
    generator = torch.Generator().manual_seed(seed)
    shape = (config.num_moe_layers, config.n_routed_experts)
    mask = torch.rand(shape, generator=generator) < seed / 5
    spy = Spy(workbench.experts)
    residents = Residents(workbench.experts, mask)
    alone = workbench.layers(RoutedExperts(ThreadRouter(workbench.experts, CpuDevice())))
    shared_out = workbench.layers(RoutedExperts(spy, resident=residents))
    for slot in range(config.num_moe_layers):
        x = workbench.rows(10 * seed + slot)
        found, wanted = (side[slot].decode(x, workbench.batch()) for side in (shared_out, alone))
        assert_sums(sum(found), sum(wanted))
    for slot, ids in spy.given:
        on_host = ids[ids != HOST_SHARE].long()
        assert not bool(mask[slot][on_host].any()), "the host was given an expert of the device"


def test_the_hosts_share_is_counted(workbench: Workbench) -> None:
    config = workbench.config
    mask = torch.zeros(config.num_moe_layers, config.n_routed_experts, dtype=torch.bool)
    mask[:, :3] = True
    routed = RoutedExperts(Spy(workbench.experts), resident=Residents(workbench.experts, mask))
    moe = workbench.layers(routed)[0]
    moe.note_decoded(torch.tensor([[0, 5], [5, 7], [2, HOST_SHARE]]))
    assert (moe.experts_read, moe.host_experts_read) == (4, 2)


@pytest.mark.parametrize("deferred", [1, 2])
def test_deferred_experts_are_added_one_layer_later_and_the_last_layer_defers_none(
    workbench: Workbench, deferred: int
) -> None:
    """Against sums put together by hand, pick by pick."""
    spy = Spy(workbench.experts)
    first, last = workbench.layers(RoutedExperts(spy, deferred=deferred))
    x, y = workbench.rows(1), workbench.rows(2)
    batch = workbench.batch()
    found = [sum(first.decode(x, batch)), sum(last.decode(y, batch))]
    assert batch.deferred is None

    ids, weights = first.router(x)
    now, later = ids.clone(), ids.clone()
    for token in range(TOKENS):
        order = sorted(range(ids.shape[1]), key=lambda pick: float(weights[token, pick]))
        for pick in range(ids.shape[1]):
            (now if pick in order[:deferred] else later)[token, pick] = HOST_SHARE
    late = workbench.routed_sum(0, x, later, weights)
    assert_sums(found[0], first.shared_expert(x) + workbench.routed_sum(0, x, now, weights))
    own = workbench.routed_sum(1, y, *last.router(y))
    assert_sums(found[1], last.shared_expert(y) + own + late)
    assert [slot for slot, _ in spy.given] == [0, 0, 1]


def test_a_prompt_is_never_deferred(workbench: Workbench) -> None:
    spy = Spy(workbench.experts)
    first, _ = workbench.layers(RoutedExperts(spy, deferred=2))
    first.forward(workbench.rows(3))
    ((_, ids),) = spy.given
    assert bool((ids >= 0).all())

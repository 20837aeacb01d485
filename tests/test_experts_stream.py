"""Experts through the ring: whole when they are read, copied beside the work, never overwritten."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hybridk2.device import CpuDevice
from hybridk2.errors import EngineError
from hybridk2.experts.host import ExpertRegion, HostExperts
from hybridk2.experts.stream import ExpertStream, PinnedLayers, page_ranges

from .delayed_queue import DelayedDevice, DelayedQueue
from .expert_weights import EXPERTS, HIDDEN, INTERMEDIATE, RandomLayer

EXPERT_BYTES = 4096


class Memory:
    """Stands in for HostExperts: expert e of layer l is full of bytes of its own, in pieces."""

    expert_bytes = EXPERT_BYTES

    def __init__(self, layers: int = 3, experts: int = 40) -> None:
        numbers = torch.arange(layers * experts, dtype=torch.int64).view(layers, experts, 1)
        columns = torch.arange(EXPERT_BYTES)
        self.bytes = ((numbers * 31 + columns * 7 + numbers * columns) % 251).to(torch.uint8)

    def expert_regions(self, slot: int, expert: int) -> tuple[ExpertRegion, ...]:
        begin = self.bytes[slot, expert].data_ptr()
        cuts = [0, 1000, 1000 + 7 * expert, EXPERT_BYTES]
        return tuple(
            ExpertRegion(begin + first, last - first, first)
            for first, last in itertools.pairwise(cuts)
            if first < last
        )


def pass_through(
    memory: Memory, device: DelayedDevice, slots: int, layers: list[list[int]]
) -> DelayedQueue:
    """Streams experts of layer after layer; work on each checks every byte, twice."""
    stream = ExpertStream(memory, device, slots)

    def check(panel: Tensor, slot: int, expert: int) -> None:
        wrong = (panel != memory.bytes[slot, expert]).sum().item()
        assert not wrong, f"layer {slot}, expert {expert}: {wrong} bytes are another's"

    for slot, experts in enumerate(layers):
        seen = []
        for expert, panel in stream.panels(slot, experts):
            seen.append(expert)
            device.queue.work((slot, expert), lambda p=panel, s=slot, e=expert: check(p, s, e))
        assert seen == experts
    return device.queue


def random_layers(seed: int) -> list[list[int]]:
    chooser = random.Random(seed)
    return [chooser.sample(range(40), chooser.choice([0, 1, 2, 7, 25])) for _ in range(3)]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("slots", [2, 3, 16])
def test_work_finds_each_expert_whole_whatever_the_delays(slots: int, seed: int) -> None:
    copy_seconds, work_seconds = [(1e-3, 1e-3), (1e-3, 1e-4), (1e-4, 1e-3)][seed % 3]
    device = DelayedDevice(seed, copy_seconds, work_seconds)
    pass_through(Memory(), device, slots, random_layers(seed)).finish()


@pytest.mark.parametrize(
    ("forgotten", "copy_seconds", "work_seconds"),
    [("copies_wait", 1e-4, 3e-3), ("work_waits", 3e-3, 1e-4)],
)
def test_a_queue_that_does_not_wait_is_caught_by_these_tests(
    forgotten: str, copy_seconds: float, work_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DelayedQueue, forgotten, lambda self, mark: None)
    device = DelayedDevice(0, copy_seconds, work_seconds)
    queue = pass_through(Memory(), device, 2, [list(range(20))])
    with pytest.raises(AssertionError, match="bytes are another's"):
        queue.finish()


def test_copies_run_ahead_beside_the_work_and_in_the_order_that_was_asked_for() -> None:
    device = DelayedDevice(1, 4e-3, 4e-3)
    experts = [5, 3, 30, 1, 0, 22, 9, 8, 7, 6]
    queue = pass_through(Memory(), device, 4, [experts])
    queue.finish()
    copies = [event for event in queue.events if event.what == "copy"]
    work = [event for event in queue.events if event.what == "work"]
    assert [event.label for event in work] == [(0, expert) for expert in experts]
    assert all(before.ended <= after.began for before, after in itertools.pairwise(copies))
    beside = sum(any(event.overlaps(other) for other in copies) for event in work)
    # All but the last slots' worth of work have an expert to be copied behind them.
    assert beside >= len(experts) - 4
    # The first expert's work began before all of the ring was filled, let alone the rest copied.
    assert work[0].began < copies[-1].began


def test_nothing_keeps_the_caller_waiting_for_the_work() -> None:
    """Two layers through two slots are given to the device before any of their work has begun."""
    device = DelayedDevice(2, work_seconds=1e-3)
    stream = ExpertStream(Memory(), device, 2)
    gate = device.queue.hold_work()
    seen = [expert for slot in range(2) for expert, _ in stream.panels(slot, range(6))]
    assert seen == [*range(6), *range(6)]
    gate.set()
    device.queue.finish()


@pytest.mark.parametrize("read", [0, 1, 3])
def test_an_iteration_that_is_left_early_leaves_a_ring_that_works(read: int) -> None:
    device = DelayedDevice(3)
    memory = Memory()
    stream = ExpertStream(memory, device, 3)

    def some() -> Iterator[tuple[int, Tensor]]:
        panels = stream.panels(0, range(10))
        for _, pair in zip(range(read), panels, strict=False):
            yield pair
        panels.close()  # type: ignore[attr-defined]

    for expert, panel in some():
        assert torch.equal(panel, memory.bytes[0, expert])
    for slot in range(3):
        for expert, panel in stream.panels(slot, [9, 2, 4, 7, 1]):
            assert torch.equal(panel, memory.bytes[slot, expert])
    stream.wait()
    device.queue.finish()


def test_what_cannot_be_copied_is_an_error_and_the_ring_goes_on_working() -> None:
    layer = RandomLayer(EXPERTS, HIDDEN, INTERMEDIATE)
    with HostExperts(1, EXPERTS, HIDDEN, INTERMEDIATE, threads=2, simulated_nodes=2) as experts:
        stream = ExpertStream(experts, CpuDevice(), 2)
        for expert in range(EXPERTS - 1):
            experts.load_expert(0, expert, *layer.experts[expert])
        for asked in ([0, EXPERTS - 1], [EXPERTS - 1], [0, 1, 2, 3, EXPERTS - 1]):
            with pytest.raises(EngineError, match=f"expert {EXPERTS - 1} is not loaded"):
                list(stream.panels(0, asked))
        for expert, panel in stream.panels(0, range(EXPERTS - 1)):
            assert torch.equal(panel, experts.pack_expert(*layer.experts[expert]))


def test_a_ring_of_one_slot_is_refused() -> None:
    with pytest.raises(EngineError, match="ring of 1 slots: expected 2 or more"):
        ExpertStream(Memory(), CpuDevice(), 1)


def test_no_copy_crosses_the_edge_of_a_pinned_range() -> None:
    memory = Memory()
    first = memory.bytes.data_ptr()
    cuts = sorted({first + cut for cut in (0, 1, 999, 1000, 1001, 4096, 5000, 5001, 9000)})
    crossings: list[tuple[int, int]] = []

    class Device(CpuDevice):
        def copy_queue(self):  # type: ignore[no-untyped-def]
            queue = super().copy_queue()
            copy = queue.copy

            def watched(target: Tensor, source: Tensor) -> None:
                begin = source.data_ptr()
                crossings.extend(
                    (begin, cut) for cut in cuts if begin < cut < begin + source.numel()
                )
                copy(target, source)

            queue.copy = watched  # type: ignore[method-assign]
            return queue

    stream = ExpertStream(memory, Device(), 2, cuts)
    for expert, panel in stream.panels(0, range(4)):
        assert torch.equal(panel, memory.bytes[0, expert])
    assert not crossings


class FakePinning:
    """Notes what is pinned; refuses overlaps, as the driver does, and more than `most_bytes`."""

    def __init__(self, most_bytes: int = 1 << 60) -> None:
        self.ranges: dict[int, int] = {}
        self.most_bytes = most_bytes

    def pin(self, address: int, num_bytes: int) -> None:
        end = address + num_bytes
        assert all(end <= begin or last <= address for begin, last in self.ranges.items())
        held = sum(last - begin for begin, last in self.ranges.items())
        if held + num_bytes > self.most_bytes:
            raise EngineError("the driver says no")
        self.ranges[address] = end

    def unpin(self, address: int) -> None:
        del self.ranges[address]


def test_layers_are_pinned_as_whole_pages_each_once_and_unpinned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer = RandomLayer(EXPERTS, HIDDEN, INTERMEDIATE)
    with HostExperts(3, EXPERTS, HIDDEN, INTERMEDIATE, threads=2, simulated_nodes=2) as experts:
        for slot in range(3):
            layer.load_into(experts, slot)
        pinning = FakePinning()
        pinned = PinnedLayers(experts, [range(EXPERTS)] * 3, pinning)
        assert len(pinning.ranges) == 6, "one for each layer on each node"
        assert sorted(pinning.ranges) == list(pinned.cuts)
        for slot in range(3):
            for expert in range(EXPERTS):
                for address, num_bytes, _ in experts.expert_regions(slot, expert):
                    for byte in (address, address + num_bytes - 1):
                        assert any(b <= byte < e for b, e in pinning.ranges.items())
        assert pinned.pinned_bytes == pinned.total_bytes
        assert pinned.total_bytes <= experts.weight_bytes + 2 * 4096
        pinned.close()
        pinned.close()
        assert not pinning.ranges
        assert not caplog.text

        refused = FakePinning(most_bytes=pinned.total_bytes // 2)
        some = PinnedLayers(experts, [range(EXPERTS)] * 3, refused)
        assert 0 < some.pinned_bytes <= refused.most_bytes < some.total_bytes
        assert "copies the rest more slowly: the driver says no" in caplog.text
        some.close()
        assert not refused.ranges


def test_pages_belong_to_one_range_and_a_layers_neighbours_become_one() -> None:
    page = 4096
    assert page_ranges([[(0, page), (page, 2 * page)], [(2 * page, 3 * page)]]) == [
        (0, 2 * page),
        (2 * page, 3 * page),
    ]
    # The layers meet within a page; in the second one's middle an expert is missing.
    assert page_ranges([[(100, 5000)], [(5000, 9000), (30_000, 30_001)]]) == [
        (0, 2 * page),
        (2 * page, 3 * page),
        (7 * page, 8 * page),
    ]
    # A layer that lies within a page of another needs no range of its own.
    assert page_ranges([[(0, 5000)], [(5000, 6000)], [(6000, 9000)]]) == [
        (0, 2 * page),
        (2 * page, 3 * page),
    ]

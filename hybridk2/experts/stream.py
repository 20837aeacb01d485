"""Experts of the host passing through the device: a ring of slots, filled ahead of their use.

Owns the ring, the order of copies and work around it, and the pinning of the host's memory. What is
computed from a slot, and which experts pass, the caller decides. Copies run in a queue of their own
(`device.CopyQueue`); a slot is filled again only after the work that read it, and read only after
the copies that filled it.
"""

from __future__ import annotations

import ctypes
import logging
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hybridk2.device import Device
from hybridk2.errors import EngineError
from hybridk2.experts.host import ExpertRegion

logger = logging.getLogger(__name__)

_PAGE_BYTES = 4096


class ExpertMemory(Protocol):
    """Where experts lie in host memory: `HostExperts`, as far as the stream sees it."""

    expert_bytes: int

    def expert_regions(self, slot: int, expert: int) -> tuple[ExpertRegion, ...]: ...


class Pinning(Protocol):
    """Keeps host memory in place for a card, so that copies from it run beside other work."""

    def pin(self, address: int, num_bytes: int) -> None:
        """Raises EngineError when the system refuses."""

    def unpin(self, address: int) -> None:
        """Of a range that was pinned, by its first byte."""


class ExpertStream:
    """Copies experts to the device, a few ahead of the one that is computed."""

    def __init__(
        self, experts: ExpertMemory, device: Device, slots: int, cuts: Sequence[int] = ()
    ) -> None:
        """slots: experts of device memory that the ring takes; two at least overlap. cuts: host
        addresses, ascending, that no copy crosses: where `PinnedLayers` begins a range."""
        if slots < 2:
            raise EngineError(f"a ring of {slots} slots: expected 2 or more")
        self._experts = experts
        self._cuts = cuts
        self._queue = device.copy_queue()
        self._ring = torch.empty(
            slots, experts.expert_bytes, dtype=torch.uint8, device=device.torch_device
        )
        # Slots that nobody holds, those free for longest first, and the work that read each last.
        self._free: deque[tuple[int, Any]] = deque((slot, None) for slot in range(slots))

    def panels(self, layer_slot: int, experts: Iterable[int]) -> Generator[tuple[int, Tensor]]:
        """Each expert of a layer in the given order, with its panels on the device.

        Yields (expert, uint8 (expert_bytes,)). Work on the panels must be given to the device
        before the next expert is asked for; then the slot is filled again. As many experts as there
        are slots are copied ahead. One iteration at a time; it may be left early.
        """
        assert len(self._free) == len(self._ring), "another iteration has not ended"
        left = iter(experts)
        ahead: deque[tuple[int, int, Any]] = deque()
        used: int | None = None
        try:
            while True:
                while self._free and (expert := next(left, None)) is not None:
                    place, mark = self._fill(layer_slot, expert)
                    ahead.append((expert, place, mark))
                if not ahead:
                    return
                expert, used, mark = ahead.popleft()
                self._queue.work_waits(mark)
                yield expert, self._ring[used]
                self._free.append((used, self._queue.mark_work()))
                used = None
        finally:
            if used is not None:
                self._free.append((used, self._queue.mark_work()))
            # Nobody read these; later copies into them come after the present ones anyway.
            self._free.extend((place, None) for _, place, _ in ahead)

    def _fill(self, layer_slot: int, expert: int) -> tuple[int, Any]:
        """Enqueue an expert's copies into the next free slot: the slot, and when it is filled."""
        regions = self._experts.expert_regions(layer_slot, expert)
        place, last_use = self._free.popleft()
        if last_use is not None:
            self._queue.copies_wait(last_use)
        for region in regions:
            for begin, end in self._pieces(region.address, region.address + region.bytes):
                target = begin - region.address + region.offset
                slot_bytes = self._ring[place, target : target + end - begin]
                self._queue.copy(slot_bytes, host_bytes(begin, end - begin))
        return place, self._queue.mark_copies()

    def _pieces(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """[begin, end) cut where a copy must not cross: one piece nearly always."""
        for cut in self._cuts[bisect_right(self._cuts, begin) : bisect_left(self._cuts, end)]:
            yield begin, cut
            begin = cut
        yield begin, end

    def wait(self) -> None:
        """Return once all copies have been done: before the host's experts are closed."""
        self._queue.wait()


class PinnedLayers:
    """The memory of host experts, pinned layer by layer; unpinned by `close`.

    A layer's range on a node is one registration: recent drivers refuse one of 512 GiB. Where the
    system refuses at all, copies are as right as before and slower, and the log says so.
    pinned_bytes, total_bytes: what is pinned, and what should be. cuts: where ranges begin, for
    `ExpertStream`.
    """

    def __init__(
        self, experts: ExpertMemory, layers: Sequence[Sequence[int]], pinning: Pinning
    ) -> None:
        """layers: of each MoE layer the experts that the host has loaded."""
        self._pinning = pinning
        self._pinned: list[int] = []
        ranges = page_ranges(
            [
                (region.address, region.address + region.bytes)
                for expert in ids
                for region in experts.expert_regions(slot, expert)
            ]
            for slot, ids in enumerate(layers)
        )
        self.total_bytes = sum(end - begin for begin, end in ranges)
        self.cuts = [begin for begin, _ in ranges]
        self.pinned_bytes = 0
        for begin, end in ranges:
            try:
                pinning.pin(begin, end - begin)
            except EngineError as error:
                logger.warning(
                    "host experts: %.1f of %.1f GB are pinned for the card, which copies the rest "
                    "more slowly: %s",
                    self.pinned_bytes / 1e9,
                    self.total_bytes / 1e9,
                    error,
                )
                return
            self._pinned.append(begin)
            self.pinned_bytes += end - begin

    def close(self) -> None:
        """Unpin: after `ExpertStream.wait`, before the experts are closed."""
        while self._pinned:
            self._pinning.unpin(self._pinned.pop())


def page_ranges(layers: Iterable[Iterable[tuple[int, int]]]) -> list[tuple[int, int]]:
    """Whole pages over each layer's address ranges [begin, end), no page in two: a page that two
    layers share goes to the first. A layer's ranges that touch, or share a page, become one."""
    pages: list[tuple[int, int]] = []
    for layer in layers:
        taken = len(pages)
        for begin, end in sorted(layer):
            first = begin // _PAGE_BYTES * _PAGE_BYTES
            last = -(-end // _PAGE_BYTES) * _PAGE_BYTES
            if len(pages) > taken and first <= pages[-1][1]:
                pages[-1] = pages[-1][0], max(last, pages[-1][1])
            else:
                pages.append((first, last))
    return _without_overlap(pages)


def _without_overlap(pages: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in ascending order, each cut where the one before it ends."""
    cut: list[tuple[int, int]] = []
    for first, last in sorted(pages):
        begin = max(first, cut[-1][1]) if cut else first
        if begin < last:
            cut.append((begin, last))
    return cut


def host_bytes(address: int, num_bytes: int) -> Tensor:
    """Host memory as a uint8 tensor, without a copy, for as long as its owner keeps it."""
    memory = (ctypes.c_ubyte * num_bytes).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8)

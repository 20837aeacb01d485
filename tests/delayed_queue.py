"""A device whose copies, and if asked whose work, are done later, by threads that take their time.

What a card's streams do: two orders, each done in turn with random delays, and marks by which one
waits for the other. Everything that begins or ends is noted, so that tests can see what overlapped
and who read what.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hybridk2.device import CopyQueue, CpuDevice

# Far more than any delay: who waits so long waits for ever.
DEADLOCK_SECONDS = 20.0


@dataclass(frozen=True)
class Event:
    """what: "copy" or "work", label: of the work. Seconds of time.perf_counter."""

    what: str
    label: object
    began: float
    ended: float

    def overlaps(self, other: Event) -> bool:
        return self.began < other.ended and other.began < self.ended


class _Order:
    """Things to do one after the other, on a thread of their own. After one that failed only marks
    are set, so that nobody waits for them in vain."""

    def __init__(self) -> None:
        self._todo: queue.SimpleQueue[Callable[[], None] | threading.Event | None]
        self._todo = queue.SimpleQueue()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def give(self, step: Callable[[], None]) -> None:
        self._todo.put(step)

    def mark(self) -> threading.Event:
        mark = threading.Event()
        self._todo.put(mark)
        return mark

    def _run(self) -> None:
        while (step := self._todo.get()) is not None:
            if isinstance(step, threading.Event):
                step.set()
            elif self.failure is None:
                try:
                    step()
                except BaseException as error:  # noqa: BLE001 - raised by finish()
                    self.failure = error

    def finish(self) -> None:
        """End when all is done. Raises what failed."""
        self._todo.put(None)
        self._thread.join(DEADLOCK_SECONDS)
        assert not self._thread.is_alive(), "a wait that nothing ends"
        if self.failure is not None:
            raise self.failure


def _await(mark: threading.Event) -> None:
    assert mark.wait(DEADLOCK_SECONDS), "a wait that nothing ends"


class DelayedQueue:
    """A CopyQueue. Without work_seconds the device's work is the caller's own, done at once; with
    them it is what `work` is given. Delays are up to so many seconds, twice for each."""

    def __init__(self, seed: int, copy_seconds: float, work_seconds: float | None) -> None:
        self._random = random.Random(seed)
        self._copy_seconds = copy_seconds
        self._work_seconds = work_seconds
        self._copies = _Order()
        self._work = None if work_seconds is None else _Order()
        self.events: list[Event] = []

    def copy(self, target: Tensor, source: Tensor) -> None:
        # In two halves, with a delay between: who reads too early sees a half.
        half = target.numel() // 2
        delays = [self._copy_seconds * self._random.random() for _ in range(2)]

        def step() -> None:
            began = time.perf_counter()
            target[:half].copy_(source[:half])
            time.sleep(delays[0])
            target[half:].copy_(source[half:])
            time.sleep(delays[1])
            self.events.append(Event("copy", target.data_ptr(), began, time.perf_counter()))

        self._copies.give(step)

    def work(self, label: object, step: Callable[[], None]) -> None:
        """The device's work on a panel, which takes its time."""
        assert self._work is not None
        assert self._work_seconds is not None
        delay = self._work_seconds * self._random.random() * 2

        def timed() -> None:
            began = time.perf_counter()
            step()
            time.sleep(delay)
            step()  # what it read is still there
            self.events.append(Event("work", label, began, time.perf_counter()))

        self._work.give(timed)

    def hold_work(self) -> threading.Event:
        """Work that is given from now on begins when the result is set."""
        assert self._work is not None
        gate = threading.Event()
        self._work.give(lambda: _await(gate))
        return gate

    def mark_copies(self) -> threading.Event:
        return self._copies.mark()

    def mark_work(self) -> threading.Event:
        if self._work is not None:
            return self._work.mark()
        mark = threading.Event()
        mark.set()
        return mark

    def work_waits(self, mark: threading.Event) -> None:
        if self._work is None:
            _await(mark)
        else:
            self._work.give(lambda: _await(mark))

    def copies_wait(self, mark: threading.Event) -> None:
        self._copies.give(lambda: _await(mark))

    def wait(self) -> None:
        _await(self.mark_copies())

    def finish(self) -> None:
        """All is done, and the threads have ended. Raises what failed in them."""
        for order in (self._copies, self._work):
            if order is not None:
                order.finish()


class DelayedDevice(CpuDevice):
    """A CPU device that copies through one DelayedQueue, which `queue` is."""

    def __init__(
        self, seed: int, copy_seconds: float = 0.001, work_seconds: float | None = None
    ) -> None:
        self.queue = DelayedQueue(seed, copy_seconds, work_seconds)

    def copy_queue(self) -> CopyQueue:
        return self.queue

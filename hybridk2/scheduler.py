"""Who computes, who waits, and whose turn it is.

Owns the bounded queue, the set of running requests and every rule of order between them. Pure: it
knows neither tensors nor memory nor clocks. Whether a request fits is the engine's question; which
one is asked about next is answered here.

The order: interactive requests before background ones, each kind by submission. So that no stream
of interactive requests starves the others, every time that a background request was passed over
eight times in a row it has a turn. Requests that run share each step of decoding; their prompts are
read one after the other.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Literal, Protocol, TypeVar

from hybridk2.errors import QueueFullError

Priority = Literal["interactive", "background"]

# How often interactive requests may go before a background request that is ready.
_PASSED_OVER = 8


class Request(Protocol):
    """What the scheduler has to know of a request, and the two places where it writes."""

    @property
    def priority(self) -> Priority:
        """Which kind it is."""

    @property
    def reading(self) -> bool:
        """Whether a part of its prompt is still to be read."""

    number: int  # by submission, set here
    queue_position: int | None  # how many requests start before it; None when it does not wait


R = TypeVar("R", bound=Request)


class _Turns:
    """Interactive first, with a turn for background requests now and then."""

    def __init__(self) -> None:
        self._passed_over = 0

    def choose(self, interactive: R | None, background: R | None) -> R | None:
        """Whose turn it is, of the first of each kind."""
        if interactive is None or (background is not None and self._passed_over >= _PASSED_OVER):
            return background
        return interactive

    def took(self, chosen: Request, *, other_waits: bool) -> None:
        """The chosen one had its turn. other_waits: while one of the other kind was ready."""
        passed_over = chosen.priority == "interactive" and other_waits
        self._passed_over = self._passed_over + 1 if passed_over else 0


class Scheduler(Generic[R]):
    """The requests of one engine. Not thread-safe."""

    def __init__(self, max_running: int, max_queued: int) -> None:
        self.max_running = max_running
        self.max_queued = max_queued
        self.running: list[R] = []
        self._waiting: dict[Priority, list[R]] = {"interactive": [], "background": []}
        self._submitted = 0
        self._admissions = _Turns()
        self._reading_turns = _Turns()

    def waiting(self, priority: Priority) -> int:
        """How many requests of a kind wait."""
        return len(self._waiting[priority])

    def requests(self) -> Iterator[R]:
        """All that run or wait."""
        yield from self.running
        for queue in self._waiting.values():
            yield from queue

    def submit(self, request: R) -> None:
        """Queue a request. Raises QueueFullError when `max_queued` wait beyond those that may run.

        A place that a running request is about to leave free counts as taken.
        """
        inside = sum(1 for _ in self.requests())
        if inside >= self.max_running + self.max_queued:
            raise QueueFullError(
                f"{len(self.running)} requests run and {inside - len(self.running)} wait, as many "
                "as may. Try again later, or allow more to wait"
            )
        request.number = self._submitted
        self._submitted += 1
        self._wait(request)

    def candidate(self) -> R | None:
        """The request that starts next, None when none waits or as many run as may."""
        if len(self.running) >= self.max_running:
            return None
        return self._admissions.choose(*self._first_waiting())

    def start(self, candidate: R) -> None:
        """The candidate runs from now on."""
        interactive, background = self._first_waiting()
        self._admissions.took(candidate, other_waits=None not in (interactive, background))
        self._waiting[candidate.priority].remove(candidate)
        candidate.queue_position = None
        self.running.append(candidate)
        self._number_the_queue()

    def preempt(self, request: R) -> None:
        """A running request waits again, in front of all that came after it."""
        self.running.remove(request)
        self._wait(request)

    def remove(self, request: R) -> None:
        """The request has ended, wherever it was."""
        if request in self.running:
            self.running.remove(request)
            return
        self._waiting[request.priority].remove(request)
        request.queue_position = None
        self._number_the_queue()

    def decoding(self) -> list[R]:
        """The running requests whose prompts are read, oldest first."""
        return [request for request in _by_age(self.running) if not request.reading]

    def next_to_read(self) -> R | None:
        """The running request that reads the next chunk of its prompt; this is its turn."""
        interactive, background = (
            next((r for r in _by_age(self.running) if r.reading and r.priority == priority), None)
            for priority in self._waiting
        )
        chosen = self._reading_turns.choose(interactive, background)
        if chosen is not None:
            other_waits = None not in (interactive, background)
            self._reading_turns.took(chosen, other_waits=other_waits)
        return chosen

    def youngest(self, holds_memory: Callable[[R], bool]) -> R:
        """Of the running requests that hold memory, the one to give it up: background ones before
        interactive ones, the latest first."""
        holders = filter(holds_memory, self.running)
        return max(holders, key=lambda request: (request.priority == "background", request.number))

    def _first_waiting(self) -> tuple[R | None, R | None]:
        interactive, background = self._waiting["interactive"], self._waiting["background"]
        return next(iter(interactive), None), next(iter(background), None)

    def _wait(self, request: R) -> None:
        insort(self._waiting[request.priority], request, key=lambda other: other.number)
        self._number_the_queue()

    def _number_the_queue(self) -> None:
        """Positions in the order of starting, the turns of background requests left aside."""
        position = 0
        for queue in self._waiting.values():
            for request in queue:
                request.queue_position = position
                position += 1


def _by_age(requests: Iterable[R]) -> list[R]:
    return sorted(requests, key=lambda request: request.number)

"""The one thread that uses the model, so that the terminal always answers.

The chat hands it jobs (load, reply, warm) and reads what they emit. Ctrl-C therefore never lands in
the middle of a step of the engine: the person's thread stops listening at once, and the job ends
when it next looks. Knows nothing of what a job does.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


_SIGNAL_TURN_SECONDS = 0.1  # how late Ctrl-C may be at worst; a wakeup costs microseconds


class _End:
    """Put in the queue when nothing more will come, or be listened to."""


class Job(Generic[Item, Result]):
    """Work under way in the worker. Iterating gives what it emits, then raises its error if any."""

    def __init__(self, function: Callable[[Job[Item, Result]], Result]) -> None:
        self._function = function
        self._items: SimpleQueue[Item | _End] = SimpleQueue()  # its put is safe in a signal handler
        self._finished = threading.Event()
        self._result: Result | None = None
        self._error: BaseException | None = None
        self.stopped = False  # which the function is to look at, and return

    def emit(self, item: Item) -> None:
        """Say something to who iterates over the job. Any thread may call it."""
        self._items.put(item)

    def stop(self) -> None:
        """Ask the function to return, and end the iteration now. Safe in a signal handler."""
        self.stopped = True
        self._items.put(_End())

    def __iter__(self) -> Iterator[Item]:
        while not isinstance(item := self._next(), _End):
            yield item
        if not self.stopped and self._error is not None:
            raise self._error

    def _next(self) -> Item | _End:
        """Wait in short turns: a signal that comes just before a wait is only seen after it."""
        while True:
            try:
                return self._items.get(timeout=_SIGNAL_TURN_SECONDS)
            except Empty:
                continue

    @property
    def finished(self) -> bool:
        return self._finished.is_set()

    def result(self) -> Result:
        """Wait for the end; what the function returned. Raises what it raised."""
        self._finished.wait()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # the function returned, so it is one

    def run(self) -> None:
        """Do the work, in the thread that calls."""
        try:
            self._result = self._function(self)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that listens
            self._error = error
        finally:
            self._finished.set()
            self._items.put(_End())


class Worker:
    """A daemon thread that runs jobs one after the other."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job[Any, Any]] = SimpleQueue()
        self._current: Job[Any, Any] | None = None
        self._last: Job[Any, Any] | None = None
        self._thread = threading.Thread(target=self._run, name="assistant", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[Job[Item, Result]], Result]) -> Job[Item, Result]:
        """Queue `function`, which is given its job: to emit with, and to see whether to stop."""
        job = Job(function)
        self._jobs.put(job)
        return job

    def close(self, last: Callable[[], None] | None, timeout_seconds: float) -> bool:
        """Stop the job under way, forget the queued ones, call `last` in the thread and end it.

        False when that takes longer than `timeout_seconds`; the thread is then left to itself.
        """
        self._last = Job[None, None](lambda job: last() if last else None)
        if self._current is not None:
            self._current.stop()
        self._jobs.put(self._last)
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        job = None
        while job is None or job is not self._last:
            job = self._jobs.get()
            if self._last is None or job is self._last:
                self._current = job
                job.run()


@contextmanager
def stopped_by_ctrl_c(job: Job[Any, Any]) -> Iterator[None]:
    """While inside, Ctrl-C stops the job instead of the program; a second one interrupts."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        if job.stopped:
            raise KeyboardInterrupt
        job.stop()

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)

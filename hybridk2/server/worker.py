"""The one thread that owns the assistant, and how the event loop reaches it.

Owns loading, the step loop, the number of requests that may be under way, and the way of a reply's
events from the engine's thread to the event loop. Prompts are tokenised in threads of their own, so
that a long one holds up neither the engine nor the loop. Knows no HTTP and no API.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

from hybridk2.chat.events import Event, PromptProgress, PromptScored, TokenScored
from hybridk2.errors import EngineError, QueueFullError, RequestError

if TYPE_CHECKING:
    from hybridk2.assistant import Assistant, ReplyInProgress
    from hybridk2.checkpoint import LoadProgress
    from hybridk2.scheduler import Priority

logger = logging.getLogger(__name__)

State: TypeAlias = Literal["loading", "ready", "failed", "closed"]
Load: TypeAlias = "Callable[[Callable[[LoadProgress], None]], Assistant]"
Start: TypeAlias = "Callable[[Assistant], ReplyInProgress]"

Result = TypeVar("Result")

# What a client that does not read may leave lying here before its request is ended. With what is
# already on its way to the socket it costs less than 1 MB.
MAX_UNREAD_BYTES = 512 << 10
_TAKEN_BYTES = 64 << 10  # at once: what was taken counts as read, and waits in a buffer instead

_PROMPT_THREADS = 2  # so that a long prompt does not make the short ones behind it wait
_MEAN_OVER = 16  # replies that the mean of their seconds follows


class NotReadyError(RequestError):
    """The model is not there to answer: it is being loaded, or its thread has ended."""


class RemoteReply:
    """One reply, seen from the event loop: wait until something `arrived`, then `take` it."""

    def __init__(self, worker: EngineWorker) -> None:
        self._worker = worker
        self._unread: deque[Event] = deque()
        self._unread_bytes = 0
        self._error: BaseException | None = None
        self._reply: ReplyInProgress | None = None
        self._cancelled = False
        self.arrived = asyncio.Event()  # set while `take` has something to give, or raise
        self.ended = False  # nothing more will arrive
        self.progress: PromptProgress | None = None  # how much of the prompt is read
        self.first_output_seconds: float | None = None
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the reply was admitted."""
        return time.monotonic() - self._started

    @property
    def finished(self) -> bool:
        """Whether everything was taken, and nothing more will arrive."""
        return self.ended and not self._unread and self._error is None

    @property
    def queue_position(self) -> int | None:
        """How many requests start before this one; None once it has started."""
        return self._reply.queue_position if self._reply is not None else None

    @property
    def prompt_tokens(self) -> int:
        assert self._reply is not None, "asked before the reply began"
        return self._reply.prompt_tokens

    def take(self) -> list[Event]:
        """The next of what arrived. Raises the reply's error, after all that came first."""
        if not self._unread and self._error is not None:
            raise self._error
        events: list[Event] = []
        taken_bytes = 0
        while self._unread and taken_bytes < _TAKEN_BYTES:
            events.append(self._unread.popleft())
            taken_bytes += _bytes_of(events[-1])
        self._unread_bytes -= taken_bytes
        if not self._unread and not self.ended:
            self.arrived.clear()
        return events

    def cancel(self) -> None:
        """End the reply, in whatever state it is; nothing more arrives. Harmless when ended."""
        self._cancelled = True
        self._worker.wake()

    def deliver(self, events: Sequence[Event], error: BaseException | None, ended: bool) -> None:
        """Take over what the engine's thread has for this reply. In the event loop only."""
        if self.ended:
            return
        for event in events:
            if isinstance(event, PromptProgress):
                self.progress = event
            elif self.first_output_seconds is None:
                self.first_output_seconds = self.seconds
        self._unread.extend(events)
        self._unread_bytes += sum(map(_bytes_of, events))
        if self._unread_bytes > MAX_UNREAD_BYTES and not ended:
            error = RequestError("the client does not read its reply; the reply was ended")
            self._unread.clear()
            self._unread_bytes = 0
            self.cancel()
        if error is not None or ended:
            self._error = error
            self.ended = True
            self._worker.reply_ended(self)
        self.arrived.set()


class EngineWorker:
    """Loads an assistant in a thread of its own, and runs replies there."""

    def __init__(
        self,
        load: Load,
        capacity: int,
        on_reply_end: Callable[[RemoteReply], None] = lambda reply: None,
        *,
        reserved: int = 0,
    ) -> None:
        """load: makes the assistant, and tells how far it is. capacity: replies that may be under
        way, running and waiting together. on_reply_end: called in the event loop. reserved: how
        many of those places background replies leave free for interactive ones."""
        self.capacity = capacity
        self._reserved = reserved
        self.mean_reply_seconds = 1.0  # of late
        self.state: State = "loading"
        self.failure: BaseException | None = None
        self.load_progress: LoadProgress | None = None
        self.ready = threading.Event()  # set when loading ended, well or badly
        self._load = load
        self._on_reply_end = on_reply_end
        self._assistant: Assistant | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._under_way: set[RemoteReply] = set()  # in the event loop
        self._begun: SimpleQueue[tuple[RemoteReply, ReplyInProgress] | None] = SimpleQueue()
        self._running: list[tuple[RemoteReply, ReplyInProgress]] = []
        self._closing = False
        self._prompts = ThreadPoolExecutor(_PROMPT_THREADS, thread_name_prefix="prompt")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self.state == "ready"

    @property
    def under_way(self) -> int:
        """Replies that were admitted and have not ended."""
        return len(self._under_way)

    @property
    def assistant(self) -> Assistant:
        """Raises NotReadyError while there is none."""
        if self.state != "ready" or self._assistant is None:
            raise NotReadyError(f"the model cannot answer: it is {self.state}")
        return self._assistant

    def places(self, priority: Priority) -> int:
        """As many replies as may be under way, of both kinds, once one of this kind begins."""
        return self.capacity - (self._reserved if priority == "background" else 0)

    async def begin_all(
        self, starts: Sequence[Start], priority: Priority = "interactive"
    ) -> list[RemoteReply]:
        """Begin several replies, or none of them. Each of `starts` is called in a thread and
        returns what `Assistant.begin` does.

        Raises what they raise, QueueFullError at once when too many are under way, RequestError for
        more at once than there are places, NotReadyError.
        """
        assistant = self.assistant
        places = self.places(priority)
        if len(starts) > places:
            raise RequestError(
                f"{len(starts)} answers are asked for at once, and this server begins at most "
                f"{places}"
            )
        if self.under_way + len(starts) > places:
            raise QueueFullError(
                f"{self.under_way} requests run and wait, and {places} may; come again later"
            )
        self._loop = loop = asyncio.get_running_loop()
        replies = [RemoteReply(self) for _ in starts]
        self._under_way.update(replies)
        try:
            for reply, start in zip(replies, starts, strict=True):
                await loop.run_in_executor(self._prompts, self._start, reply, start, assistant)
        except BaseException:
            for reply in replies:
                reply.cancel()
                reply.deliver([], None, ended=True)
            raise
        return replies

    async def in_thread(self, function: Callable[[], Result]) -> Result:
        """The result of something that takes a while with a prompt: only so many at once."""
        return await asyncio.get_running_loop().run_in_executor(self._prompts, function)

    def wake(self) -> None:
        """Let the engine's thread look at what changed."""
        self._begun.put(None)

    def reply_ended(self, reply: RemoteReply) -> None:
        """A reply gives its place back. In the event loop only."""
        self._under_way.discard(reply)
        self.mean_reply_seconds += (reply.seconds - self.mean_reply_seconds) / _MEAN_OVER
        self._on_reply_end(reply)

    def end(self) -> None:
        """Cut all replies off and have the thread end, without waiting for it."""
        self._closing = True
        self.wake()
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cut_off)

    def _cut_off(self) -> None:
        error = NotReadyError("the server is shutting down; the reply was cut off")
        for reply in list(self._under_way):
            reply.deliver([], error, ended=True)

    def close(self, timeout_seconds: float) -> bool:
        """The same, and wait; whether the thread ended in time."""
        self.end()
        self._prompts.shutdown(wait=False, cancel_futures=True)
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _start(self, reply: RemoteReply, start: Start, assistant: Assistant) -> None:
        """In a thread: begin the reply and hand it to the engine's thread."""
        if reply._cancelled:
            return
        reply._reply = start(assistant)
        self._begun.put((reply, reply._reply))

    def _run(self) -> None:
        try:
            self._assistant = self._load(self._note_progress)
        except BaseException as error:  # noqa: BLE001 - kept, for who asks why nothing answers
            self._fail(error)
            return
        if not self._closing:
            self.state = "ready"
            self.ready.set()
        try:
            self._step_until_closed(self._assistant)
        except BaseException as error:
            logger.critical("the engine's thread ended", exc_info=error)
            self._fail(error)
            self._refuse_until_closed(error)
        else:
            self.state = "closed"
        self._assistant.close()

    def _note_progress(self, progress: LoadProgress) -> None:
        self.load_progress = progress

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.state = "failed"
        self.ready.set()

    def _step_until_closed(self, assistant: Assistant) -> None:
        busy = False
        while not self._closing:
            self._take_begun(wait=not busy)
            self._cancel_unwanted()
            busy = assistant.step()
            self._deliver()
        for _, reply in self._running:
            reply.cancel()

    def _refuse_until_closed(self, error: BaseException) -> None:
        """After a crash: every reply, begun or still to begin, ends with an error."""
        failure = EngineError(f"the engine's thread ended: {type(error).__name__}")
        while not self._closing:
            for remote, _ in self._running:
                self._hand_over(remote, [], failure, ended=True)
            self._running.clear()
            self._take_begun(wait=True)

    def _take_begun(self, wait: bool) -> None:
        """Take over what was begun; wait for something if there is nothing to do."""
        try:
            while True:
                begun = self._begun.get(block=wait)
                wait = False
                if begun is not None:
                    self._running.append(begun)
        except Empty:
            return

    def _cancel_unwanted(self) -> None:
        for remote, reply in self._running:
            if remote._cancelled:
                reply.cancel()

    def _deliver(self) -> None:
        """Hand what the step made to the event loop; forget the replies that ended."""
        still_running = []
        for remote, reply in self._running:
            events: list[Event] = []
            error: BaseException | None = None
            try:
                events = reply.poll()
            except Exception as failure:  # noqa: BLE001 - the reply's own, raised to its reader
                error = failure
            ended = reply.done or error is not None
            if events or ended:
                self._hand_over(remote, events, error, ended)
            if not ended:
                still_running.append((remote, reply))
        self._running = still_running

    def _hand_over(
        self, remote: RemoteReply, events: list[Event], error: BaseException | None, ended: bool
    ) -> None:
        assert self._loop is not None, "a reply was begun in a loop"
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(remote.deliver, events, error, ended)


def _bytes_of(event: Event) -> int:
    """About what an event that waits costs: the object, and the texts in it.

    A scored prompt does not count: it comes once, in one piece, and says nothing of who reads.
    """
    match event:
        case PromptScored():
            return 0
        case TokenScored():
            return 200 + 150 * len(event.top)
    return 100 + len(getattr(event, "text", ""))

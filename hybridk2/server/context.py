"""What every API's endpoints stand on: the worker, the settings, the model's names, constraints."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridk2.chat.constraints import Constraints
from hybridk2.chat.template import count_tool_calls
from hybridk2.errors import QueueFullError
from hybridk2.server.errors import ApiError
from hybridk2.server.metrics import ServerMetrics
from hybridk2.server.worker import EngineWorker, RemoteReply, Start

if TYPE_CHECKING:
    from hybridk2.assistant import Assistant
    from hybridk2.sampling import TokenConstraint
    from hybridk2.scheduler import Priority
    from hybridk2.tokenizer import Tokenizer

# Where a call or a JSON value must follow the thought, half of the tokens are kept for it, or this
# many: more than all but the longest arguments have.
_ANSWER_TOKENS = 4096

_LOADING_SECONDS = 5  # to wait before the next attempt


@dataclass(frozen=True)
class ServerSettings:
    """The user's choices. model_names: what clients may call the model, the first is shown.

    request_seconds: from a request's arrival to its end, None for no bound.
    """

    model_names: tuple[str, ...]
    cors_origins: tuple[str, ...] = ()
    request_seconds: float | None = None


class ServerContext:
    """Shared by all endpoints of one server; used in its event loop."""

    def __init__(
        self, worker: EngineWorker, settings: ServerSettings, metrics: ServerMetrics
    ) -> None:
        self.worker = worker
        self.settings = settings
        self.metrics = metrics
        self.created = int(time.time())
        self.draining = False
        self.open_requests = 0  # of those that a drain waits for
        self._constraints: Constraints | None = None
        self._constraints_lock = threading.Lock()
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.watch(worker)

    @property
    def model_name(self) -> str:
        return self.settings.model_names[0]

    @property
    def assistant(self) -> Assistant:
        """Raises ApiError while nothing can be answered."""
        self.refuse_unless_ready()
        return self.worker.assistant

    def refuse_unless_ready(self) -> None:
        """Raises ApiError while nothing can be answered."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", "draining", retry_after_seconds=30)
        state = self.worker.state
        if state == "loading":
            message = "the model is still being loaded; /health says how far it is"
            raise ApiError(503, message, "model_loading", retry_after_seconds=_LOADING_SECONDS)
        if state != "ready":
            message = f"the model cannot answer any more: it is {state}; restart the server"
            raise ApiError(503, message, "model_unavailable", retry_after_seconds=120)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.assistant.tokenizer

    async def begin_all(
        self, starts: Sequence[Start], priority: Priority = "interactive"
    ) -> list[RemoteReply]:
        """Begin several replies, or none of them. Raises what `EngineWorker.begin_all` raises, and
        ApiError while nothing can be answered, or no more."""
        self.refuse_unless_ready()
        try:
            return await self.worker.begin_all(starts, priority)
        except QueueFullError as error:
            raise self._queue_full(priority) from error

    def refuse_without_place(self) -> None:
        """Raises ApiError while a request has no chance: checked before its body is even read, so
        that in a rush the refusals cost next to nothing."""
        self.refuse_unless_ready()
        if self.worker.under_way >= self.worker.capacity:
            raise self._queue_full("interactive")

    def _queue_full(self, priority: Priority) -> ApiError:
        worker = self.worker
        message = f"{worker.under_way} requests run and wait, and {worker.places(priority)} may"
        seconds = math.ceil(worker.mean_reply_seconds)
        return ApiError(503, message, "queue_full", retry_after_seconds=seconds)

    def constraint(
        self,
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: str | Mapping[str, Any] | None,
        parallel_tool_calls: bool,
        response_format: Mapping[str, Any] | None,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int | None,
    ) -> TokenConstraint | None:
        """What a reply is held to, None for nothing. Takes a while: call it in a thread.

        All in OpenAI's form. Raises RequestError for a form or a schema that cannot be held.
        """
        plain = response_format is None or response_format.get("type") == "text"
        if not tools and plain and tool_choice in (None, "auto", "none"):
            return None
        assistant = self.worker.assistant
        room = assistant.context_tokens - assistant.count_prompt_tokens(messages, tools)
        answer_tokens = max(min(room, room if max_tokens is None else max_tokens), 1)
        left_for_the_answer = min(answer_tokens // 2, _ANSWER_TOKENS)
        with self._constraints_lock:
            if self._constraints is None:
                self._constraints = Constraints(assistant.tokenizer)
            return self._constraints.for_reply(
                tools,
                tool_choice,
                parallel_tool_calls,
                response_format,
                tool_calls_in_history=count_tool_calls(messages),
                max_tokens=answer_tokens,
                max_think_tokens=answer_tokens - left_for_the_answer,
            )

    def seconds_left(self, arrived: float) -> float | None:
        """Until the deadline of a request that arrived at this time.monotonic(); None: no end."""
        if self.settings.request_seconds is None:
            return None
        return max(self.settings.request_seconds - (time.monotonic() - arrived), 0.001)

    def check_model(self, name: str) -> None:
        """Raises ApiError for a model that is not served here."""
        if name not in self.settings.model_names:
            raise ApiError(
                404,
                f"that model is not served here; the one that is: {self.model_name}",
                "model_not_found",
                "model",
            )

    def health(self) -> dict[str, Any]:
        """What /health says: status is ok, loading, draining, failed or closed."""
        state = self.worker.state
        status = {"ready": "draining" if self.draining else "ok"}.get(state, state)
        body: dict[str, Any] = {"status": status, "model": self.model_name}
        progress = self.worker.load_progress
        if state == "loading" and progress is not None:
            body["loading"] = {
                "stage": progress.stage,
                "done_bytes": progress.done_bytes,
                "total_bytes": progress.total_bytes,
                "seconds_left": progress.eta_seconds,
            }
        return body

    @contextlib.contextmanager
    def open_request(self) -> Iterator[None]:
        """While inside, a drain waits."""
        self.open_requests += 1
        self.metrics.open_requests.inc()
        self._idle.clear()
        try:
            yield
        finally:
            self.open_requests -= 1
            self.metrics.open_requests.dec()
            if not self.open_requests:
                self._idle.set()

    async def idle(self) -> None:
        """Wait until no request is open."""
        await self._idle.wait()

"""An assistant for the server whose replies a test wrote down, one event a step."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridk2.chat.events import Event, Finished, PromptProgress, TextDelta, Usage
from hybridk2.engine import EngineStats
from hybridk2.tokenizer import Tokenizer

USAGE = Usage(prompt_tokens=5, cached_tokens=2, completion_tokens=3)

NANO_FOLDER = Path(__file__).parents[1] / "hybridk2" / "nano" / "checkpoint"

Step = Event | Exception


def words(*texts: str) -> list[Step]:
    """A whole reply of these pieces of text."""
    return [PromptProgress(5, 5), *map(TextDelta, texts), Finished("stop", USAGE)]


ENDLESS = "endless"  # a reply that goes on until it is cancelled


class ScriptedReply:
    """Stands for ReplyInProgress."""

    def __init__(self, steps: Sequence[Step] | str, options: dict[str, Any]) -> None:
        self.steps = list(steps) if not isinstance(steps, str) else None
        self.options = options
        self.prompt_tokens = 5
        self.queue_position: int | None = 0
        self.done = False
        self.cancelled = False
        self._waiting: list[Step] = []

    def advance(self) -> None:
        self.queue_position = None
        if self.steps is None:
            self._waiting.append(TextDelta("and on "))
        elif self.steps:
            self._waiting.append(self.steps.pop(0))

    def cancel(self) -> None:
        self.cancelled = True

    def poll(self) -> list[Event]:
        steps, self._waiting = self._waiting, []
        if self.cancelled:
            self.done = True
            return [Finished("cancelled", USAGE)]
        for step in steps:
            if isinstance(step, Exception):
                self.done = True
                raise step
        events = [step for step in steps if not isinstance(step, Exception)]
        self.done = bool(events) and isinstance(events[-1], Finished)
        return events


class ScriptedEngine:
    """Stands for Assistant: `max_running` replies advance, one event a step each."""

    def __init__(self, max_running: int = 8, step_seconds: float = 0.001) -> None:
        self.context_tokens = 4096
        self.tokenizer = Tokenizer.from_folder(NANO_FOLDER)
        self.scripts: list[Sequence[Step] | str] = []
        self.default: Sequence[Step] | str = words("hello ", "world")
        self.replies: list[ScriptedReply] = []
        self.begin_error: Exception | None = None
        self.crash: BaseException | None = None
        self.going = threading.Event()  # while clear, steps wait
        self.going.set()
        self.closed = False
        self._max_running = max_running
        self._step_seconds = step_seconds
        self._lock = threading.Lock()

    def begin(self, messages: Any, tools: Any = None, params: Any = None, **options: Any) -> Any:
        if self.begin_error is not None:
            raise self.begin_error
        asked = {"messages": messages, "tools": tools, "params": params, **options}
        with self._lock:
            script = self.scripts.pop(0) if self.scripts else self.default
            reply = ScriptedReply(script, asked)
            self.replies.append(reply)
        return reply

    def count_prompt_tokens(self, messages: Any, tools: Any = None) -> int:
        return 5

    def step(self) -> bool:
        self.going.wait(30)
        if self.crash is not None:
            raise self.crash
        time.sleep(self._step_seconds)
        with self._lock:
            active = [reply for reply in self.replies if not reply.done]
        for reply in active[: self._max_running]:
            reply.advance()
        return bool(active)

    @property
    def running(self) -> int:
        return sum(not reply.done for reply in self.replies)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self.running,
            waiting_interactive=0,
            waiting_background=0,
            max_running=self._max_running,
            max_queued=64,
            cache_tokens_used=0,
            cache_tokens_capacity=4096,
            prompt_tokens_total=0,
            cached_tokens_total=0,
            completion_tokens_total=0,
            requests_total={"stop": 1},
            steps_total=0,
            step_seconds_total=0.0,
            expert_bytes_total=0,
            host_expert_share=1.0,
        )

    def close(self) -> None:
        self.closed = True


def until(condition: Any, seconds: float = 30.0) -> bool:
    """Wait for a condition; whether it came true before this could be called a hang."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True

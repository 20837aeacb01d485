"""An assistant that says what a test wrote down, for tests of what stands on the assistant."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from hybridk2.chat.events import (
    Event,
    Finished,
    ReasoningDelta,
    ReasoningEnd,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    Usage,
)
from hybridk2.checkpoint import LoadProgress
from hybridk2.config import EngineConfig
from hybridk2.sampling import SamplingParams

USAGE = Usage(
    prompt_tokens=30,
    cached_tokens=10,
    completion_tokens=21,
    reasoning_tokens=8,
    prefill_seconds=0.5,
    decode_seconds=2.0,
    context_tokens=51,
    context_limit=4096,
)
STATUS = "prefill 40.0 tok/s · decode 10.0 tok/s · context 51 of 4,096 · reused 10 tokens"

Step = Event | Exception | Callable[[], None]


def says(text: str, thinking: str = "") -> list[Step]:
    """A whole reply, thought included, in one piece per word."""
    steps: list[Step] = [ReasoningDelta(word + " ") for word in thinking.split()]
    if thinking:
        steps.append(ReasoningEnd())
    steps += [TextDelta(piece) for piece in text.splitlines(keepends=True)]
    return [*steps, Finished("stop", USAGE)]


def calls(name: str, arguments: str, number: int = 0) -> list[Step]:
    """A reply that is one tool call."""
    return [
        ToolCallStart(0, f"functions.{name}:{number}", name),
        ToolCallArguments(0, arguments),
        ToolCallEnd(0, arguments),
        Finished("tool_calls", USAGE),
    ]


def press_ctrl_c() -> None:
    """What the terminal does on Ctrl-C, and time for it to arrive."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)
    time.sleep(0.3)


class ScriptedAssistant:
    """Answers each request with the next script; keeps what it was asked."""

    def __init__(self, *scripts: Sequence[Step]) -> None:
        self.model_name = "scripted"
        self.context_tokens = 4096
        self.scripts = list(scripts)
        self.asked: list[list[dict[str, Any]]] = []
        self.tools: list[list[dict[str, Any]] | None] = []
        self.params: list[SamplingParams] = []
        self.warmed: list[list[dict[str, Any]]] = []
        self.warm_error: Exception | None = None
        self.choices: EngineConfig | None = None
        self.load_error: Exception | None = None
        self.cancelled = 0
        self.closed = False

    def load(
        self, choices: EngineConfig, on_progress: Callable[[LoadProgress], None]
    ) -> ScriptedAssistant:
        """Stands for Assistant.load, which is a class method."""
        self.choices = choices
        if self.load_error is not None:
            raise self.load_error
        on_progress(LoadProgress("loading experts", 2_000_000_000, 8_000_000_000, 1.0))
        on_progress(LoadProgress("loading experts", 8_000_000_000, 8_000_000_000, 4.0))
        return self

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def reply(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        params: SamplingParams | None = None,
    ) -> Generator[Event, None, None]:
        self.asked.append(messages)
        self.tools.append(tools)
        self.params.append(params or SamplingParams())
        script = self.scripts.pop(0)
        try:
            for step in script:
                if isinstance(step, Exception):
                    raise step
                if callable(step):
                    step()
                else:
                    yield step
        except GeneratorExit:
            self.cancelled += 1
            raise

    def warm(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.warmed.append(messages)
        if self.warm_error is not None:
            raise self.warm_error

    def close(self) -> None:
        self.closed = True

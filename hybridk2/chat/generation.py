"""From a stream of tokens to a finished reply: stop strings, the end, the whole message.

Owns stop strings and the collecting of events into one assistant message. Works over any iterator
of token ids; does not know the engine that makes them.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from hybridk2.chat.events import (
    Event,
    Finished,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallStart,
    Usage,
)
from hybridk2.chat.parser import EndReason, OutputParser
from hybridk2.errors import RequestError


def stream(
    tokens: Iterator[int],
    parser: OutputParser,
    stop_strings: Sequence[str] = (),
    *,
    end_reason: Callable[[], EndReason] = lambda: "length",
    usage: Callable[[], Usage] | None = None,
) -> Generator[Event, None, None]:
    """Parse tokens into events, until the message ends, a stop string appears or tokens run out.

    stop_strings: the first to be complete in visible text ends the reply, and is not shown.
    Reasoning and tool calls are not searched. end_reason: asked when the tokens run out before the
    message ends by a control token. usage: asked once, for Finished. The iterator of tokens is
    closed before Finished, when the caller closes this generator, and when a token fails.
    """
    search = _StopSearch(stop_strings)
    finish_reason: FinishReason = "stop"
    try:
        for event in _parse(tokens, parser, end_reason):
            if isinstance(event, Finished):
                finish_reason = event.reason
                continue
            if not isinstance(event, TextDelta):
                yield from search.release()
                yield event
                continue
            yield from search.push(event.text)
            if search.found:
                break
        else:
            yield from search.release()
    finally:
        close = getattr(tokens, "close", None)
        if close is not None:
            close()
    yield Finished(finish_reason, usage() if usage is not None else None)


def _parse(
    tokens: Iterator[int], parser: OutputParser, end_reason: Callable[[], EndReason]
) -> Iterator[Event]:
    for token_id in tokens:
        yield from parser.push(token_id)
        if parser.ended:
            break
    yield from parser.finish("stop" if parser.ended else end_reason())


class Reply(NamedTuple):
    """A whole reply. content is None when there is no visible text."""

    reasoning: str
    content: str | None
    tool_calls: list[dict[str, Any]]
    finish: Finished

    @property
    def message(self) -> dict[str, Any]:
        """The assistant message to append to the conversation, in OpenAI's form."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message


def collect(events: Iterable[Event]) -> Reply:
    """All events of one reply as a whole; the same text, to the letter, as they stream.

    Events that end without Finished were cancelled.
    """
    reasoning: list[str] = []
    text: list[str] = []
    tool_calls: list[dict[str, Any]] = []
    arguments: list[list[str]] = []
    finish = Finished("cancelled")
    for event in events:
        match event:
            case ReasoningDelta(delta):
                reasoning.append(delta)
            case TextDelta(delta):
                text.append(delta)
            case ToolCallStart(_, call_id, name):
                function = {"name": name}
                tool_calls.append({"id": call_id, "type": "function", "function": function})
                arguments.append([])
            case ToolCallArguments(index, delta):
                arguments[index].append(delta)
            case Finished():
                finish = event
    for call, parts in zip(tool_calls, arguments, strict=True):
        call["function"]["arguments"] = "".join(parts)
    return Reply("".join(reasoning), "".join(text) or None, tool_calls, finish)


class _StopSearch:
    """Finds the first complete stop string in a text that comes in pieces.

    First is the one that ends first, of two that end together the one that begins first: so it is
    the same one however the text is cut. Holds back only what may be the beginning of one.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        if not all(stop_strings):
            raise RequestError("stop: a stop string is empty; expected at least one character.")
        self._stop_strings = tuple(stop_strings)
        self._held = ""
        self.found = False

    def push(self, text: str) -> Iterator[TextDelta]:
        """The text that is certainly shown. Once `found`, nothing more is."""
        text = self._held + text
        matches = [
            (start + len(stop), start)
            for stop in self._stop_strings
            if (start := text.find(stop)) >= 0
        ]
        if matches:
            self.found = True
            _, shown = min(matches)
            self._held = ""
        else:
            shown = self._first_possible_start(text)
            self._held = text[shown:]
        if shown:
            yield TextDelta(text[:shown])

    def release(self) -> Iterator[TextDelta]:
        """The text that was held back: no stop string came of it."""
        text, self._held = self._held, ""
        if text:
            yield TextDelta(text)

    def _first_possible_start(self, text: str) -> int:
        """Where the longest end of text that begins some stop string starts; len(text) if none."""
        first = len(text)
        for stop in self._stop_strings:
            start = text.find(stop[0], max(len(text) - len(stop) + 1, 0), first)
            while start >= 0 and not stop.startswith(text[start:]):
                start = text.find(stop[0], start + 1, first)
            if start >= 0:
                first = start
        return first

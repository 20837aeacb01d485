"""From tokens to a finished reply: stop strings, scores, the end, the whole message.

Owns stop strings and the collecting of events into one assistant message. Is given token ids one by
one; does not know the engine that makes them.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from hybridk2.chat.events import (
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    TokenScored,
    ToolCallArguments,
    ToolCallStart,
    Usage,
)
from hybridk2.chat.parser import EndReason
from hybridk2.errors import RequestError
from hybridk2.tokenizer import IncrementalDecoder, Tokenizer


class ReplyParser(Protocol):
    """What reads the tokens of a reply: OutputParser, or PlainTextParser."""

    @property
    def ended(self) -> bool:
        """Whether the model ended its reply."""

    def shows(self, token_id: int) -> bool:
        """Whether this token, if it comes next, is part of the visible text."""

    def push(self, token_id: int) -> list[Event]:
        """What this token adds to the reply."""

    def finish(self, reason: EndReason) -> list[Event]:
        """End the reply: close what is open, then Finished."""


class PlainTextParser:
    """Reads a completion: all of it is visible text, and control tokens stand for nothing.

    `<think>` and what belongs to tool calls is text here, as no other place shows it.
    """

    reasoning_tokens = 0
    ended = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._base_size = tokenizer.base_size
        self._decoder = IncrementalDecoder(tokenizer)
        control = tokenizer.control
        self._written = {control.think, control.end_think}
        self._written |= {control.tool_calls_section_begin, control.tool_calls_section_end}
        self._written |= {control.tool_call_begin, control.tool_call_argument_begin}
        self._written.add(control.tool_call_end)

    def shows(self, token_id: int) -> bool:
        """Whether this token is part of the text."""
        return token_id < self._base_size or token_id in self._written

    def push(self, token_id: int) -> list[Event]:
        """The text that this token completes."""
        return self._text(self._decoder.push(token_id)) if self.shows(token_id) else []

    def finish(self, reason: EndReason) -> list[Event]:
        """Finished, after an unfinished character if the model ended there by itself."""
        events = self._text(self._decoder.flush()) if reason == "stop" else []
        return [*events, Finished(reason)]

    def _text(self, text: str) -> list[Event]:
        return [TextDelta(text)] if text else []


class ReplyStream:
    """Events of one reply, from its tokens as they come.

    stop_strings: the first to be complete in visible text ends the reply, and is not shown.
    Reasoning and tool calls are not searched.
    """

    def __init__(self, parser: ReplyParser, stop_strings: Sequence[str] = ()) -> None:
        self._parser = parser
        self._search = _StopSearch(stop_strings)
        self._scores = _HeldScores()

    @property
    def ended(self) -> bool:
        """Whether the reply ended, by the model's will or at a stop string: push nothing more."""
        return self._search.found is not None or self._parser.ended

    def push(self, token_id: int, score: TokenScored | None = None) -> list[Event]:
        """What this token adds to the reply. score: its own, passed on if it is visible text."""
        if score is not None and self._parser.shows(token_id):
            self._scores.hold(score)
        return self._searched(self._parser.push(token_id))

    def finish(self, reason: EndReason, usage: Usage | None = None) -> list[Event]:
        """End the reply: what was held back, then Finished.

        reason: what ended the tokens, where the reply itself did not: see `ended`.
        """
        if self._search.found is not None:
            return [Finished("stop", usage, self._search.found)]
        *events, finished = self._parser.finish("stop" if self._parser.ended else reason)
        assert isinstance(finished, Finished)
        shown = self._searched(events)
        if self._search.found is not None:
            return [*shown, Finished("stop", usage, self._search.found)]
        shown += [*self._shown(self._search.release()), *self._scores.release()]
        return [*shown, Finished(finished.reason, usage)]

    def _searched(self, events: Iterable[Event]) -> list[Event]:
        shown: list[Event] = []
        for event in events:
            if not isinstance(event, TextDelta):
                shown += [*self._shown(self._search.release()), event]
                continue
            shown += self._shown(self._search.push(event.text))
            if self._search.found is not None:
                break
        return shown

    def _shown(self, deltas: Iterable[TextDelta]) -> Iterator[Event]:
        for delta in deltas:
            yield from self._scores.release(len(delta.text.encode()))
            yield delta


class _HeldScores:
    """Scores of text tokens until the text that they begin is shown."""

    def __init__(self) -> None:
        self._held: deque[tuple[int, TokenScored]] = deque()  # with the byte that it begins at
        self._pushed_bytes = 0
        self._shown_bytes = 0

    def hold(self, score: TokenScored) -> None:
        self._held.append((self._pushed_bytes, score))
        self._pushed_bytes += len(score.text_bytes)

    def release(self, shown_bytes: int | None = None) -> Iterator[TokenScored]:
        """Scores of tokens that begin within the next shown bytes; None: all that are held."""
        self._shown_bytes += shown_bytes or 0
        while self._held and (shown_bytes is None or self._held[0][0] < self._shown_bytes):
            yield self._held.popleft()[1]


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
        self.found: str | None = None

    def push(self, text: str) -> Iterator[TextDelta]:
        """The text that is certainly shown. Once `found`, nothing more is."""
        text = self._held + text
        matches = [
            (start + len(stop), start, stop)
            for stop in self._stop_strings
            if (start := text.find(stop)) >= 0
        ]
        if matches:
            _, shown, self.found = min(matches)
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

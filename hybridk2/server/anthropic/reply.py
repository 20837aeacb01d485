"""A reply in Anthropic's terms: its typed stream events, and the whole message.

Owns Anthropic's side of the translation on the way out. The whole message is folded from the very
events that a stream sends, so streamed equals unstreamed. Knows nothing of HTTP.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic_core import from_json

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
from hybridk2.errors import EngineError
from hybridk2.server.anthropic.request import Thinking
from hybridk2.server.carried_reasoning import carry

StreamEvent = dict[str, Any]

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
PING: StreamEvent = {"type": "ping"}


class MessageEvents:
    """Translates the events of one reply. One per reply; events go in in their order.

    Tool ids: Claude's clients take an id for unique in all their conversations and allow no dots or
    colons in it, which K2's `functions.{name}:{n}` is not. Every call gets an id of Anthropic's
    form; the template gives it K2's back by its place when the client returns it.
    """

    def __init__(self, model: str, prompt_tokens: int, thinking: Thinking | None = None) -> None:
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._is_thinking_hidden = thinking is not None and thinking.type == "disabled"
        self._is_thinking_carried = thinking is not None and thinking.display == "omitted"
        self._num_blocks = 0
        self._open_block: str | None = None
        self._reasoning: list[str] = []

    def start(self) -> list[StreamEvent]:
        """What a stream begins with, before anything is computed."""
        message: StreamEvent = {
            "id": _new_id("msg"),
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage(prompt_tokens=self._prompt_tokens)),
        }
        return [{"type": "message_start", "message": message}]

    def push(self, event: Event) -> list[StreamEvent]:
        """What this event adds to the stream. Raises EngineError for a reply that was given up."""
        return list(self._translate(event))

    def _translate(self, event: Event) -> Iterator[StreamEvent]:
        match event:
            case ReasoningDelta(text):
                yield from self._think(text)
            case ReasoningEnd():
                yield from self._close()
            case TextDelta(text):
                if self._open_block != "text":
                    yield from self._open("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": text})
            case ToolCallStart(_, _, name):
                block = {"type": "tool_use", "id": _new_id("toolu"), "name": name, "input": {}}
                yield from self._open("tool_use", block)
            case ToolCallArguments(_, text):
                yield self._delta({"type": "input_json_delta", "partial_json": text})
            case ToolCallEnd():
                yield from self._close()
            case Finished():
                yield from self._close()
                yield from self._finish(event)

    def _think(self, text: str) -> Iterator[StreamEvent]:
        if self._is_thinking_hidden:
            return
        if self._open_block != "thinking":
            block = {"type": "thinking", "thinking": "", "signature": ""}
            yield from self._open("thinking", block)
        self._reasoning.append(text)
        if not self._is_thinking_carried:
            yield self._delta({"type": "thinking_delta", "thinking": text})

    def _open(self, block_type: str, block: dict[str, Any]) -> Iterator[StreamEvent]:
        yield from self._close()
        self._open_block = block_type
        yield {
            "type": "content_block_start",
            "index": self._num_blocks,
            "content_block": block,
        }

    def _close(self) -> Iterator[StreamEvent]:
        if self._open_block is None:
            return
        if self._open_block == "thinking":
            # Clients drop a thinking block that has no signature.
            reasoning = "".join(self._reasoning) if self._is_thinking_carried else ""
            self._reasoning.clear()
            yield self._delta({"type": "signature_delta", "signature": carry(reasoning)})
        yield {"type": "content_block_stop", "index": self._num_blocks}
        self._num_blocks += 1
        self._open_block = None

    def _delta(self, delta: dict[str, Any]) -> StreamEvent:
        return {"type": "content_block_delta", "index": self._num_blocks, "delta": delta}

    def _finish(self, finished: Finished) -> Iterator[StreamEvent]:
        if finished.reason == "cancelled":
            raise EngineError("The reply was cut off before its end. Send the request again.")
        usage = finished.usage or Usage(prompt_tokens=self._prompt_tokens)
        stop_reason = _STOP_REASONS[finished.reason]
        if finished.stop_string is not None:
            stop_reason = "stop_sequence"
        elif finished.reason == "length" and 0 < usage.context_limit <= usage.context_tokens:
            stop_reason = "model_context_window_exceeded"
        yield {
            "type": "message_delta",
            "delta": {"stop_reason": stop_reason, "stop_sequence": finished.stop_string},
            "usage": _usage(usage),
        }
        yield {"type": "message_stop"}


def whole_message(events: Iterable[StreamEvent]) -> dict[str, Any]:
    """The message that a stream of events amounts to: the body of a request without stream.

    The input of a call that was cut off is what could be read of it, as Anthropic's own clients
    read a stream that ends there.
    """
    message: dict[str, Any] = {}
    pieces: list[str] = []
    for event in events:
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                message["content"].append(event["content_block"])
                pieces = []
            case "content_block_delta":
                match event["delta"]:
                    case {"signature": signature}:
                        message["content"][-1]["signature"] = signature
                    case {"text": text} | {"thinking": text} | {"partial_json": text}:
                        pieces.append(text)
            case "content_block_stop":
                block, whole = message["content"][-1], "".join(pieces)
                if block["type"] == "tool_use":
                    block["input"] = _read_input(whole)
                else:
                    block[block["type"]] = whole
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    return message


def _read_input(arguments: str) -> dict[str, Any]:
    try:
        value = from_json(arguments or "{}", allow_partial=True, allow_inf_nan=False)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts cached tokens apart: the prompt is the sum of the three."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex[:24]}"

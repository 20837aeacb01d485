"""A reply in the terms of the Responses API: its numbered stream events, and the whole response.

Owns this API's side of the translation on the way out. The last event of a stream holds the whole
response, and that is also the body of a request without stream. Knows nothing of HTTP.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
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
from hybridk2.errors import EngineError
from hybridk2.server.carried_reasoning import carry
from hybridk2.server.responses.request import ENCRYPTED_REASONING, FunctionTool, ResponsesRequest

StreamEvent = dict[str, Any]


class ResponseEvents:
    """Translates the events of one reply. One per reply; events go in in their order.

    `response` is the response so far.
    """

    def __init__(self, request: ResponsesRequest, model: str) -> None:
        self._carries_reasoning = ENCRYPTED_REASONING in (request.include or ())
        self._next_number = 0
        self._item: dict[str, Any] | None = None
        self._pieces: list[str] = []
        self.response = _response(request, model)

    def start(self) -> list[StreamEvent]:
        """What a stream begins with, before anything is computed."""
        return [self._lifecycle("response.created"), self._lifecycle("response.in_progress")]

    def push(self, event: Event) -> list[StreamEvent]:
        """What this event adds to the stream. Raises EngineError for a reply that was given up."""
        return list(self._translate(event))

    def fail(self, message: str) -> list[StreamEvent]:
        """The end of a stream that an error cut off."""
        self.response["status"] = "failed"
        self.response["error"] = {"code": "server_error", "message": message}
        return [self._lifecycle("response.failed")]

    def _translate(self, event: Event) -> Iterator[StreamEvent]:
        match event:
            case ReasoningDelta(text):
                if not self._is_open("reasoning"):
                    item = {"id": _new_id("rs"), "type": "reasoning", "summary": [], "content": []}
                    yield from self._open(item, {"type": "reasoning_text", "text": ""})
                yield self._add("response.reasoning_text.delta", text, content_index=0)
            case TextDelta(text):
                if not self._is_open("message"):
                    item = {"id": _new_id("msg"), "type": "message", "role": "assistant"}
                    yield from self._open(item | {"content": []}, _text_part(""))
                yield self._add("response.output_text.delta", text, content_index=0, logprobs=[])
            case ToolCallStart(_, call_id, name):
                item = {"id": _new_id("fc"), "type": "function_call", "call_id": call_id}
                yield from self._open(item | {"name": name, "arguments": ""}, None)
            case ToolCallArguments(_, text):
                yield self._add("response.function_call_arguments.delta", text)
            case ReasoningEnd() | ToolCallEnd():
                yield from self._close("completed")
            case Finished():
                was_cut = event.reason == "length"
                yield from self._close("incomplete" if was_cut else "completed")
                yield self._finish(event)

    def _is_open(self, item_type: str) -> bool:
        return self._item is not None and self._item["type"] == item_type

    def _open(self, item: dict[str, Any], part: dict[str, Any] | None) -> Iterator[StreamEvent]:
        """Begin an item, and the one part of its content, if it has any."""
        yield from self._close("completed")
        self._item = {**item, "status": "in_progress"}
        self._pieces.clear()
        yield self._event(
            "response.output_item.added", output_index=self._output_index, item=dict(self._item)
        )
        if part is not None:
            yield self._item_event("response.content_part.added", content_index=0, part=part)

    def _add(self, event_type: str, text: str, **fields: Any) -> StreamEvent:
        self._pieces.append(text)
        return self._item_event(event_type, delta=text, **fields)

    def _close(self, status: str) -> Iterator[StreamEvent]:
        if self._item is None:
            return
        item, text = self._item, "".join(self._pieces)
        if item["type"] == "function_call":
            item["arguments"] = text
            yield self._item_event("response.function_call_arguments.done", arguments=text)
        elif item["type"] == "reasoning":
            yield from self._close_part(
                "response.reasoning_text.done", {"type": "reasoning_text", "text": text}
            )
            if self._carries_reasoning:
                item["encrypted_content"] = carry(text)
        else:
            yield from self._close_part("response.output_text.done", _text_part(text), logprobs=[])
        item["status"] = status
        yield self._event("response.output_item.done", output_index=self._output_index, item=item)
        self.response["output"].append(item)
        self._item = None

    def _close_part(
        self, event_type: str, part: dict[str, Any], **fields: Any
    ) -> Iterator[StreamEvent]:
        assert self._item is not None
        self._item["content"] = [part]
        yield self._item_event(event_type, content_index=0, text=part["text"], **fields)
        yield self._item_event("response.content_part.done", content_index=0, part=part)

    def _finish(self, finished: Finished) -> StreamEvent:
        if finished.reason == "cancelled":
            raise EngineError("The reply was cut off before its end. Send the request again.")
        self.response["usage"] = _usage(finished.usage or Usage())
        if finished.reason == "length":
            self.response["status"] = "incomplete"
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
            return self._lifecycle("response.incomplete")
        self.response["status"] = "completed"
        self.response["completed_at"] = int(time.time())
        return self._lifecycle("response.completed")

    @property
    def _output_index(self) -> int:
        return len(self.response["output"])

    def _lifecycle(self, event_type: str) -> StreamEvent:
        return self._event(
            event_type, response=self.response | {"output": [*self.response["output"]]}
        )

    def _item_event(self, event_type: str, **fields: Any) -> StreamEvent:
        assert self._item is not None, f"{event_type} outside an item"
        return self._event(
            event_type, item_id=self._item["id"], output_index=self._output_index, **fields
        )

    def _event(self, event_type: str, **fields: Any) -> StreamEvent:
        number = self._next_number
        self._next_number += 1
        return {"type": event_type, "sequence_number": number, **fields}


def _response(request: ResponsesRequest, model: str) -> dict[str, Any]:
    tools = [
        {**tool.model_dump(), "strict": bool(tool.strict)}
        for tool in request.tools or ()
        if isinstance(tool, FunctionTool)
    ]
    text_format = {"type": "text"}
    if request.text is not None and request.text.format is not None:
        text_format = request.text.format.model_dump(by_alias=True, exclude_none=True)
    return {
        "id": _new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": text_format},
        "tool_choice": request.tool_choice or "auto",
        "tools": tools,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"

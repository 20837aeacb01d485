"""The endpoint of the Responses API: POST /v1/responses."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hybridk2.chat.events import Event
from hybridk2.server.context import ServerContext
from hybridk2.server.conversation import begin
from hybridk2.server.errors import ApiError
from hybridk2.server.limits import described_body, validated_body
from hybridk2.server.openai import json_response
from hybridk2.server.responses.reply import ResponseEvents, StreamEvent
from hybridk2.server.responses.request import ResponsesRequest, read_conversation
from hybridk2.server.sse import ReplyStream, collect_events, comment_frame, data_frame
from hybridk2.server.worker import RemoteReply

if TYPE_CHECKING:
    from hybridk2.engine import Priority

REQUESTS = (ResponsesRequest,)


def router(context: ServerContext) -> APIRouter:
    """The endpoint of the Responses API."""
    routes = APIRouter()

    @routes.post("/v1/responses", openapi_extra=described_body(ResponsesRequest))
    async def responses(request: Request) -> Response:
        """Answer a conversation, at once or as a stream of numbered events."""
        arrived = time.monotonic()
        body = await validated_body(request, ResponsesRequest)
        context.check_model(body.model)
        reply = await _begin(context, body, arrived)
        events = ResponseEvents(body, context.model_name)
        if body.stream:
            return ReplyStream([reply], ResponseEncoder(events))
        (collected,) = await collect_events(request, [reply])
        for event in collected:
            events.push(event)
        return json_response(events.response)

    return routes


async def _begin(context: ServerContext, body: ResponsesRequest, arrived: float) -> RemoteReply:
    sampling: dict[str, Any] = {"max_tokens": body.max_output_tokens}
    if body.temperature is not None:
        sampling["temperature"] = body.temperature
    if body.top_p is not None:
        sampling["top_p"] = body.top_p
    priority: Priority = "background" if body.service_tier == "flex" else "interactive"
    return await begin(context, lambda: read_conversation(body), sampling, arrived, priority)


class ResponseEncoder:
    """Events to typed frames."""

    def __init__(self, events: ResponseEvents) -> None:
        self._events = events

    def start(self) -> bytes:
        return _frames(self._events.start())

    def event(self, choice: int, event: Event) -> bytes:
        return _frames(self._events.push(event))

    def ping(self, comment: str) -> bytes:
        return comment_frame(comment)

    def error(self, error: ApiError) -> bytes:
        return _frames(self._events.fail(error.message))

    def end(self) -> bytes:
        return b""


def _frames(events: Iterable[StreamEvent]) -> bytes:
    return b"".join(data_frame(event, event["type"]) for event in events)

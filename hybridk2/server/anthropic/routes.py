"""The endpoints of Anthropic's Messages: /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hybridk2.chat.events import Event
from hybridk2.errors import ContextLengthError
from hybridk2.server.anthropic.reply import PING, MessageEvents, StreamEvent, whole_message
from hybridk2.server.anthropic.request import (
    CountTokensRequest,
    MessagesRequest,
    read_conversation,
)
from hybridk2.server.context import ServerContext
from hybridk2.server.conversation import begin
from hybridk2.server.errors import ApiError
from hybridk2.server.limits import described_body, validated_body
from hybridk2.server.openai import json_response
from hybridk2.server.sse import ReplyStream, collect_events, data_frame
from hybridk2.server.worker import RemoteReply

if TYPE_CHECKING:
    from hybridk2.engine import Priority

REQUESTS = (MessagesRequest, CountTokensRequest)


def router(context: ServerContext) -> APIRouter:
    """The endpoints of Anthropic's Messages."""
    routes = APIRouter()

    @routes.post("/v1/messages", openapi_extra=described_body(MessagesRequest))
    async def messages(request: Request) -> Response:
        """Answer a conversation, at once or as a stream of typed events."""
        arrived = time.monotonic()
        body = await validated_body(request, MessagesRequest)
        _check_model(context, body.model)
        reply = await _begin(context, body, arrived)
        events = MessageEvents(context.model_name, reply.prompt_tokens, body.thinking)
        if body.stream:
            return ReplyStream([reply], MessageEncoder(events))
        (collected,) = await collect_events(request, [reply])
        sent = events.start()
        for event in collected:
            sent += events.push(event)
        return json_response(whole_message(sent))

    @routes.post("/v1/messages/count_tokens", openapi_extra=described_body(CountTokensRequest))
    async def count_tokens(request: Request) -> dict[str, int]:
        """How many tokens the prompt of a conversation has."""
        body = await validated_body(request, CountTokensRequest)
        _check_model(context, body.model)
        assistant = context.assistant

        def count() -> int:
            asked = read_conversation(body)
            return assistant.count_prompt_tokens(asked.messages, asked.tools)

        return {"input_tokens": await asyncio.to_thread(count)}

    return routes


def _check_model(context: ServerContext, name: str) -> None:
    """Claude's names are taken too: its clients ask for several, and one model serves here."""
    if not name.startswith("claude-"):
        context.check_model(name)


async def _begin(context: ServerContext, body: MessagesRequest, arrived: float) -> RemoteReply:
    sampling: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "max_tokens": body.max_tokens,
        "stop": tuple(body.stop_sequences or ()),
    }
    # Claude Code asks its smallest model for titles and summaries, which nobody waits for.
    priority: Priority = "background" if "haiku" in body.model else "interactive"
    try:
        return await begin(context, lambda: read_conversation(body), sampling, arrived, priority)
    except ContextLengthError as error:
        # Claude Code shortens a conversation of its own accord when it reads these words.
        found, most = error.prompt_tokens, error.context_tokens
        message = f"prompt is too long: {found} tokens > {most} maximum"
        raise ApiError(400, message, "context_length_exceeded") from error


class MessageEncoder:
    """Events to typed frames. A silence is filled with pings, as Anthropic's own streams are."""

    def __init__(self, events: MessageEvents) -> None:
        self._events = events

    def start(self) -> bytes:
        return _frames([*self._events.start(), PING])

    def event(self, choice: int, event: Event) -> bytes:
        return _frames(self._events.push(event))

    def ping(self, comment: str) -> bytes:
        return _frames([PING])

    def error(self, error: ApiError) -> bytes:
        return _frames([error.anthropic_body()])

    def end(self) -> bytes:
        return b""


def _frames(events: Iterable[StreamEvent]) -> bytes:
    return b"".join(data_frame(event, event["type"]) for event in events)

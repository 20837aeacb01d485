"""OpenAI's Chat Completions: requests to conversations, events to chunks and to whole answers."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response

from hybridk2 import __version__
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
from hybridk2.chat.generation import collect
from hybridk2.server.context import ServerContext
from hybridk2.server.errors import ApiError
from hybridk2.server.limits import described_body, validated_body
from hybridk2.server.protocol import ChatCompletionRequest
from hybridk2.server.sse import ReplyStream, collect_events, comment_frame, data_frame

if TYPE_CHECKING:
    from hybridk2.assistant import Assistant, ReplyInProgress

REQUESTS = (ChatCompletionRequest,)

DONE_FRAME = b"data: [DONE]\n\n"
FINGERPRINT = f"hybridk2-{__version__}"


def router(context: ServerContext) -> APIRouter:
    """The endpoint of chat completions."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", openapi_extra=described_body(ChatCompletionRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, at once or as a stream of chunks."""
        arrived = time.monotonic()
        body = await validated_body(request, ChatCompletionRequest)
        context.check_model(body.model)
        starts = [_start(context, body, choice, arrived) for choice in range(body.n or 1)]
        replies = await context.begin_all(starts, body.priority)
        head = answer_head("chatcmpl", "chat.completion", context.model_name)
        if body.stream:
            return ReplyStream(replies, ChatEncoder(head, body.includes_usage))
        answers = await collect_events(request, replies)
        return json_response(chat_completion(head, answers))

    return routes


def _start(
    context: ServerContext, body: ChatCompletionRequest, choice: int, arrived: float
) -> Callable[[Assistant], ReplyInProgress]:
    def start(assistant: Assistant) -> ReplyInProgress:
        tools = body.tool_dicts
        constraint = context.constraint(
            tools=tools,
            tool_choice=body.tool_choice,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            response_format=body.response_format_dict,
            messages=body.messages,
            max_tokens=body.answer_tokens,
        )
        return assistant.begin(
            body.messages,
            tools,
            body.sampling_params(body.answer_tokens, body.reported_logprobs, choice),
            constraint=constraint,
            priority=body.priority,
            deadline_seconds=context.seconds_left(arrived),
        )

    return start


def answer_head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """What every answer, and every chunk of one, begins with."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": FINGERPRINT,
    }


def json_response(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")


def chat_completion(head: dict[str, Any], answers: Sequence[Sequence[Event]]) -> dict[str, Any]:
    """The whole answer, of all events of all choices."""
    choices, usages = [], []
    for index, events in enumerate(answers):
        reply = collect(events)
        message = {"refusal": None, **reply.message}
        if reply.reasoning:
            message["reasoning"] = reply.reasoning
        scores = [event for event in events if isinstance(event, TokenScored)]
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": {"content": list(map(score_entry, scores))} if scores else None,
                "finish_reason": reply.finish.reason,
            }
        )
        usages.append(reply.finish.usage or Usage())
    return {**head, "choices": choices, "usage": usage_body(usages, len(usages))}


class ChatEncoder:
    """Events to `chat.completion.chunk` frames: role, content, finish, usage, [DONE]."""

    def __init__(self, head: dict[str, Any], includes_usage: bool) -> None:
        self._head = {**head, "object": "chat.completion.chunk"}
        self._includes_usage = includes_usage
        self._begun: set[int] = set()
        self._scores: dict[int, list[TokenScored]] = {}
        self._usages: dict[int, Usage] = {}

    def start(self) -> bytes:
        return b""

    def event(self, choice: int, event: Event) -> bytes:
        match event:
            case TokenScored():
                self._scores.setdefault(choice, []).append(event)
                return b""
            case ReasoningDelta(text):
                delta: dict[str, Any] = {"reasoning_content": text, "reasoning": text}
            case TextDelta(text):
                delta = {"content": text}
            case ToolCallStart(index, call_id, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": call_id, "type": "function", "function": function}
                delta = {"tool_calls": [call]}
            case ToolCallArguments(index, text):
                delta = {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case Finished(reason, usage):
                self._usages[choice] = usage or Usage()
                return self._opening(choice) + self._chunk(choice, {}, reason)
            case _:
                return b""
        return self._opening(choice) + self._chunk(choice, delta)

    def ping(self, comment: str) -> bytes:
        return comment_frame(comment)

    def error(self, error: ApiError) -> bytes:
        return data_frame(error.openai_body()) + DONE_FRAME

    def end(self) -> bytes:
        if not self._includes_usage:
            return DONE_FRAME
        usage = usage_body([*self._usages.values()], len(self._usages))
        return data_frame({**self._head, "choices": [], "usage": usage}) + DONE_FRAME

    def _opening(self, choice: int) -> bytes:
        """The role, before the first thing that a choice says."""
        if choice in self._begun:
            return b""
        self._begun.add(choice)
        return self._chunk(choice, {"role": "assistant", "content": ""})

    def _chunk(self, choice: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
        scores = self._scores.pop(choice, None) if "role" not in delta else None
        chunk: dict[str, Any] = {
            "index": choice,
            "delta": delta,
            "logprobs": {"content": list(map(score_entry, scores))} if scores else None,
            "finish_reason": reason,
        }
        frame = {**self._head, "choices": [chunk]}
        if self._includes_usage:
            frame["usage"] = None
        return data_frame(frame)


def usage_body(usages: Sequence[Usage], choices_per_prompt: int) -> dict[str, Any]:
    """What all choices cost together; those of one prompt stand side by side."""
    prompts = usages[::choices_per_prompt]
    prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)},
        "completion_tokens_details": {
            "reasoning_tokens": sum(usage.reasoning_tokens for usage in usages)
        },
    }


def score_entry(score: TokenScored) -> dict[str, Any]:
    """A token's log-probability and its alternatives'."""
    return {
        **_token_entry(score.text_bytes, score.logprob or 0.0),
        "top_logprobs": [_token_entry(text, logprob) for _, text, logprob in score.top],
    }


def _token_entry(text: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(text)}

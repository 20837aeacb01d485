"""What an API asks for in the form of OpenAI's chat completions, and the reply to it begun.

The other APIs' requests are translated into it; chat.template renders it and chat.constraints
holds the reply to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hybridk2.errors import ChatError
from hybridk2.server.context import ServerContext
from hybridk2.server.worker import RemoteReply

if TYPE_CHECKING:
    from hybridk2.assistant import Assistant, ReplyInProgress
    from hybridk2.engine import Priority


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, tools, and the form that the reply is held to."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    response_format: dict[str, Any] | None


@dataclass(slots=True)
class AssistantTurn:
    """An assistant's message that other APIs send in pieces: thoughts, texts, tool calls."""

    reasoning: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    def call(self, call_id: str, name: str, arguments: Any) -> None:
        """Add a tool call. arguments: a JSON string or an object."""
        function = {"name": name, "arguments": arguments}
        self.tool_calls.append({"id": call_id, "type": "function", "function": function})

    @property
    def message(self) -> dict[str, Any]:
        """The whole message."""
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(self.texts),
            "reasoning_content": "".join(self.reasoning),
        }
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message


async def begin(
    context: ServerContext,
    read: Callable[[], Conversation],
    sampling: Mapping[str, Any],
    arrived: float,
    priority: Priority = "interactive",
) -> RemoteReply:
    """Begin the reply to a conversation.

    read: makes it of the request; called in a thread, as a long one takes a while. sampling: fields
    of SamplingParams. arrived: the request's time.monotonic(). Raises what `read` and
    `ServerContext.begin_all` raise.
    """

    def start(assistant: Assistant) -> ReplyInProgress:
        from hybridk2.sampling import SamplingParams  # loads torch; by now the model has

        asked = read()
        constraint = context.constraint(
            tools=asked.tools,
            tool_choice=asked.tool_choice,
            parallel_tool_calls=asked.parallel_tool_calls,
            response_format=asked.response_format,
            messages=asked.messages,
            max_tokens=sampling.get("max_tokens"),
        )
        return assistant.begin(
            asked.messages,
            asked.tools,
            SamplingParams(**sampling),
            constraint=constraint,
            priority=priority,
            deadline_seconds=context.seconds_left(arrived),
        )

    (reply,) = await context.begin_all([start], priority)
    return reply


def check_names(tools: list[dict[str, Any]]) -> None:
    """Raises ChatError for tools that could not be told apart."""
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) != len(names):
        raise ChatError("tools: two tools have the same name.")

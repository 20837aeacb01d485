"""What any of the APIs asks for, in one form: OpenAI's chat completions.

The other APIs' requests are translated into it; chat.template renders it and chat.constraints
holds the reply to it.
"""

from dataclasses import dataclass, field
from typing import Any


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

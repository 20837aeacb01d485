"""One reply as it grows: events in, and out of them a message for the history and figures.

Owns what is kept of a reply that was cut off, so that the history stays one the model can continue:
a tool call that is not whole, or that the person stopped, is not kept. Knows nothing of terminals.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hybridk2.chat.events import (
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCallEnd,
    ToolCallStart,
    Usage,
)
from hybridk2.errors import HybridK2Error


@dataclass
class Reply:
    """What has come so far. `finish_reason` stays "cancelled" until the reply says how it ended.

    error: why it ended before that, where it was the engine and not the person who ended it.
    """

    reasoning: str = ""
    content: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str = "cancelled"
    usage: Usage | None = None
    error: HybridK2Error | None = None
    thinking_seconds: float = 0.0
    _thinking_since: float | None = field(default=None, init=False)
    _open_calls: dict[int, ToolCallStart] = field(default_factory=dict, init=False)

    def add(self, event: Event, now_seconds: float) -> None:
        """Take one event that arrived at `now_seconds` of any steady clock."""
        if isinstance(event, ReasoningDelta):
            self.reasoning += event.text
            if self._thinking_since is None:
                self._thinking_since = now_seconds
            return
        if self._thinking_since is not None:
            self.thinking_seconds += now_seconds - self._thinking_since
            self._thinking_since = None
        if isinstance(event, TextDelta):
            self.content += event.text
        elif isinstance(event, ToolCallStart):
            self._open_calls[event.index] = event
        elif isinstance(event, ToolCallEnd):
            start = self._open_calls.pop(event.index)
            function = {"name": start.name, "arguments": event.arguments}
            self.tool_calls.append({"id": start.id, "type": "function", "function": function})
        elif isinstance(event, Finished):
            self.finish_reason = event.reason
            self.usage = event.usage

    def thinking_seconds_at(self, now_seconds: float) -> float:
        """How long the model has thought, the thought under way included."""
        if self._thinking_since is None:
            return self.thinking_seconds
        return self.thinking_seconds + now_seconds - self._thinking_since

    def message(self) -> dict[str, Any] | None:
        """The assistant's message for the history; None when nothing came."""
        calls = [] if self.finish_reason == "cancelled" else self.tool_calls
        if not (self.reasoning or self.content or calls):
            return None
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if calls:
            message["tool_calls"] = calls
        return message

    def as_json(self, model: str) -> dict[str, Any]:
        """The reply under the names of OpenAI's API, with the speeds beside it."""
        usage = self.usage or Usage()
        return {
            "model": model,
            "reasoning_content": self.reasoning,
            "content": self.content,
            "tool_calls": self.tool_calls,
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
                "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            },
            "speeds": {
                "prefill_tokens_per_second": round(usage.prefill_tokens_per_second, 2),
                "decode_tokens_per_second": round(usage.decode_tokens_per_second, 2),
                "prefill_seconds": round(usage.prefill_seconds, 4),
                "decode_seconds": round(usage.decode_seconds, 4),
            },
        }


def status_line(reply: Reply) -> str:
    """The line under a reply: how it ended if it was cut off, speeds, context, what was reused."""
    parts = []
    if reply.finish_reason == "cancelled":
        parts.append("stopped")
    elif reply.finish_reason == "length":
        parts.append("cut off at the token limit")
    usage = reply.usage
    if usage is not None:
        if usage.prefill_seconds > 0:
            parts.append(f"prefill {usage.prefill_tokens_per_second:.1f} tok/s")
        if usage.decode_seconds > 0:
            parts.append(f"decode {usage.decode_tokens_per_second:.1f} tok/s")
        parts.append(f"context {usage.context_tokens:,} of {usage.context_limit:,}")
        if usage.cached_tokens:
            parts.append(f"reused {usage.cached_tokens:,} tokens")
        if usage.host_expert_share < 1:
            parts.append(f"experts on GPU {1 - usage.host_expert_share:.0%}")
    return " · ".join(parts)


def thought_line(seconds: float, tokens: int) -> str:
    return f"thought {seconds:.1f} s, {tokens:,} tokens"

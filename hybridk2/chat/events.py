"""What a reply is made of, as it arrives: the events between the model and whoever shows it.

Owns the event types and the usage record, nothing else. The parser emits events, the server and the
terminal render them; neither knows the other.

Order within one reply: PromptProgress as the prompt is read, PromptScored if that was asked for,
then any number of reasoning runs (deltas, then ReasoningEnd) and text runs, then tool calls, each
ToolCallStart, ToolCallArguments..., ToolCallEnd; exactly one Finished comes last. Where
log-probabilities were asked for, the TokenScored of a text's tokens come before the delta that they
begin in.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """So much of the prompt is read; `read_tokens` includes what was cached."""

    read_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TokenScored:
    """A token of the visible text, or of a prompt, and what the model gave it.

    text_bytes: its bytes, which need not be whole characters. logprob: natural logarithm, None for
    the first token of a prompt. top: (id, bytes, logprob) of the likeliest, likeliest first.
    """

    id: int
    text_bytes: bytes
    logprob: float | None
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Every token of the prompt, in order."""

    tokens: tuple[TokenScored, ...]


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thinks. `text` is never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningEnd:
    """The model stopped thinking; also sent when a tool section or the end of the reply cut it."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the visible answer. `text` is never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A tool call opens. `index` is its position in this reply, `id` is `functions.{name}:{n}`."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the argument text of call `index`; `text` is never empty."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """Call `index` is complete; `arguments` equals all its ToolCallArguments joined."""

    index: int
    arguments: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What a reply cost.

    prompt_tokens includes cached_tokens, which were not computed again; completion_tokens includes
    reasoning_tokens. Times are wall-clock seconds. host_expert_share is the fraction of routed
    experts that host memory served, 0 to 1. context_tokens of context_limit are in use.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    context_tokens: int = 0
    context_limit: int = 0
    host_expert_share: float = 1.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens computed (not cached) per second; 0 when nothing was timed."""
        computed_tokens = self.prompt_tokens - self.cached_tokens
        return computed_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Decode steps per second; the first token comes out of prefill and is not counted."""
        decode_steps = max(self.completion_tokens - 1, 0)
        return decode_steps / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a reply. "length" and "cancelled" mean that it was cut off.

    stop_string: the one of the request's that ended it, None for any other end.
    """

    reason: FinishReason
    usage: Usage | None = None
    stop_string: str | None = None


Event: TypeAlias = (
    PromptProgress
    | PromptScored
    | TokenScored
    | ReasoningDelta
    | ReasoningEnd
    | TextDelta
    | ToolCallStart
    | ToolCallArguments
    | ToolCallEnd
    | Finished
)

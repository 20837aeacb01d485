"""One request to the engine on its way from prompt to last token.

Owns what a request asked for, what it has got so far, how long that took and where it stands in the
model. Knows no other request, and computes nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hybridk2.errors import ContextLengthError, HybridK2Error, RequestError
from hybridk2.kv_cache import PAGE_TOKENS, CacheSequence
from hybridk2.sampling import GeneratedToken, Sampler
from hybridk2.scheduler import Priority

FinishReason = Literal["stop", "length", "cancelled"]

# Pages are promised to a request for its prompt and so many tokens of its answer, not for all that
# it may write: an answer without a bound would otherwise keep the whole context to itself.
_PROMISED_ANSWER_TOKENS = 4 * PAGE_TOKENS


@dataclass(frozen=True)
class Task:
    """What a request asks for, checked.

    max_tokens: 0 reads the prompt and ends. repeatable: it named a seed, and is to repeat itself
    bit for bit. prompt_logprobs: alternatives to report per token of the prompt, None for no
    report. deadline: on the clock of time.monotonic, None for none.
    """

    prompt_ids: tuple[int, ...]
    stop_ids: frozenset[int]
    max_tokens: int
    repeatable: bool
    priority: Priority
    prompt_logprobs: int | None
    deadline: float | None


def check_prompt(
    prompt_ids: Sequence[int], vocab_size: int, context_tokens: int, max_tokens: int | None
) -> None:
    """Raises RequestError for a prompt that is empty or holds an id outside the vocabulary, and
    ContextLengthError for one that leaves no room in the context."""
    if not prompt_ids:
        raise RequestError("the prompt is empty: expected at least one token")
    if len(prompt_ids) >= context_tokens:  # first: looking at millions of ids takes a while
        raise ContextLengthError(len(prompt_ids), max_tokens, context_tokens)
    lowest, highest = min(prompt_ids), max(prompt_ids)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise RequestError(f"token id {wrong} is not in the vocabulary of {vocab_size} tokens")


class Generation:
    """A request on its way. The engine's thread writes it, any thread may read it.

    cached_tokens: of the prompt, taken from the cache. prefilled_tokens: of the prompt, read or
    taken from the cache; it never falls. prompt_scores: as long as the prompt once all of it was
    read, if that was asked for; the first has no log-probability. prefill_seconds, decode_seconds:
    wall time of the steps that did something for the request.
    """

    def __init__(self, task: Task, sampler: Sampler) -> None:
        self.task = task
        self.number = -1
        self.queue_position: int | None = None
        self.finish_reason: FinishReason | None = None
        self.error: HybridK2Error | None = None
        self.cached_tokens = 0
        self.prefilled_tokens = 0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.prompt_scores: list[GeneratedToken] = []
        self.output: deque[GeneratedToken] = deque()  # sampled, and not yet taken
        self.cancelled = False  # asked for; the engine ends it between steps
        # The engine's own:
        self.sampler = sampler
        self.sequence: CacheSequence | None = None
        self.sampled_ids: list[int] = []
        # What is read in chunks before decoding: the prompt, after a preemption more.
        self.read_ids = task.prompt_ids
        # Sampled, and not yet run through the model: the latest, after a preemption more.
        self.pending_ids: deque[int] = deque()

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.task.prompt_ids

    @property
    def priority(self) -> Priority:
        return self.task.priority

    @property
    def completion_tokens(self) -> int:
        return len(self.sampled_ids)

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def reading(self) -> bool:
        """Whether a part of what precedes decoding is still to be read."""
        return self.sequence is None or self.sequence.length < len(self.read_ids)

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt is still to be scored, so that none of it may come from the cache."""
        wanted = self.task.prompt_logprobs is not None
        return wanted and len(self.prompt_scores) < len(self.prompt_ids)

    @property
    def promised_tokens(self) -> int:
        """Tokens of the cache that the request is to have before another one is let in."""
        left = self.task.max_tokens - self.completion_tokens
        known = len(self.prompt_ids) + self.completion_tokens
        return known + min(left, _PROMISED_ANSWER_TOKENS)

    def is_late(self) -> bool:
        return self.task.deadline is not None and time.monotonic() > self.task.deadline

    def give_up_pages(self) -> None:
        """Let go of the cache, to begin again later with the same tokens.

        What was sampled is read as if it had been part of the prompt. A repeatable request may not:
        a chunk rounds differently from a token decoded on its own. It reads its prompt in the
        chunks that it had, and decodes again what it had sampled.
        """
        assert self.sequence is not None, "there is nothing to give up"
        self.sequence.close()
        self.sequence = None
        self.pending_ids.clear()
        if self.task.repeatable:
            self.pending_ids.extend(self.sampled_ids)
        else:
            self.read_ids = (*self.prompt_ids, *self.sampled_ids)
        if self.scores_prompt:
            self.prompt_scores.clear()

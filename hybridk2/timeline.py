"""Where an engine's time goes: which phase of which layer, from when to when.

Owns the record of steps. The model and the engine fill it where they were given one; it knows
neither of them, and where none was given nothing is measured. All times are seconds on the clock of
time.perf_counter, which is the C++ side's steady clock too, so that both sides can be laid over one
another.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

StepKind = Literal["prefill", "decode"]
Phase = Literal[
    "embedding",
    "attention",  # with the norm before it, and reading and writing the cache
    "dense MLP",  # the feed-forward block of a layer without experts, with its norm
    "router",  # with the norm before it
    "handoff",  # rows and picks to the host's workers
    "shared expert",
    "waiting",  # for the host's experts
    "adding",  # the host's share, and the block to the hidden state
    "head",  # final norm and logits
    "recorded step",  # embedding to logits as one, where a device replays it
    "sampling",
]


@dataclass(frozen=True)
class Span:
    """What the thread that steps did, without a gap to the span before it. layer: None where it
    belongs to none."""

    phase: Phase
    layer: int | None
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True)
class HostCall:
    """What the host's workers did for one layer, by their own clock. experts: different ones."""

    layer: int
    experts: int
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass
class Step:
    """One pass through the model: `tokens` new ones on top of `past_tokens` of the longest past."""

    kind: StepKind
    tokens: int
    past_tokens: int
    began: float
    spans: list[Span] = field(default_factory=list)
    host_calls: list[HostCall] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return (self.spans[-1].ended if self.spans else self.began) - self.began


class Timeline:
    """The steps since it was given to a model. One thread fills it, between steps any may read."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._last_mark = 0.0

    def begin(self, kind: StepKind, tokens: int, past_tokens: int) -> None:
        """A step begins now."""
        self._last_mark = time.perf_counter()
        self.steps.append(Step(kind, tokens, past_tokens, self._last_mark))

    def mark(self, phase: Phase, layer: int | None = None) -> None:
        """What ran since the last mark, or since the step began, was this phase.

        Before the first step, as in a product that a check asks for, nothing is kept.
        """
        now = time.perf_counter()
        if self.steps:
            self.steps[-1].spans.append(Span(phase, layer, self._last_mark, now))
        self._last_mark = now

    def add_host_call(self, layer: int, experts: int, began: float, ended: float) -> None:
        """The workers' share of a layer of the step under way."""
        self.steps[-1].host_calls.append(HostCall(layer, experts, began, ended))

"""What an engine does and has done, in figures, for whoever watches it.

Owns the counters and the record that is made of them. Does not know where the figures come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EngineStats:
    """What the engine does now, and what it did since it was loaded."""

    running: int
    waiting_interactive: int
    waiting_background: int
    max_running: int
    max_queued: int
    cache_tokens_used: int  # held by running requests
    cache_tokens_capacity: int
    prompt_tokens_total: int
    cached_tokens_total: int  # of those, not computed again
    completion_tokens_total: int
    requests_total: Mapping[str, int]  # by finish reason, "error" among them
    steps_total: int
    step_seconds_total: float
    expert_bytes_total: int  # routed weights read by steps
    host_expert_share: float  # of the routed experts, how many host memory served


@dataclass
class Totals:
    """What was done since the engine was loaded."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    step_seconds: float = 0.0

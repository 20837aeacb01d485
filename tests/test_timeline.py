"""Measuring where the time goes changes no number, misses no moment, and costs nothing when off."""

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from hybridk2.config import EngineConfig
from hybridk2.engine import Engine
from hybridk2.sampling import SamplingParams
from hybridk2.timeline import HostCall, Step, Timeline

CHUNK = 64
PROMPT = tuple(range(3, 103))  # a chunk, and a part of one
TOKENS = 5
PARAMS = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=4)

MOE_PHASES = ["attention", "router", "handoff", "shared expert", "waiting", "adding"]


@pytest.fixture
def engine(small_checkpoint: Path) -> Iterator[Engine]:
    engine = Engine.load(
        EngineConfig(
            model=str(small_checkpoint),
            threads=2,
            context_tokens=512,
            prefill_chunk_tokens=CHUNK,
        )
    )
    yield engine
    engine.close()


def recorded(engine: Engine) -> Timeline:
    timeline = Timeline()
    engine.record_times(timeline)
    list(engine.generate(PROMPT, PARAMS, stop_ids=()))
    engine.record_times(None)
    return timeline


def host_call(step: Step, layer: int) -> HostCall:
    (call,) = (call for call in step.host_calls if call.layer == layer)
    return call


def test_measuring_does_not_change_a_bit(small_checkpoint: Path) -> None:
    replies = []
    for timeline in (None, Timeline()):
        choices = EngineConfig(
            model=str(small_checkpoint), context_tokens=512, prefill_chunk_tokens=CHUNK
        )
        engine = Engine.load(choices)
        engine.record_times(timeline)
        # Tokens with the log-probabilities of their alternatives: equal floats are equal bits.
        replies.append(list(engine.generate(PROMPT, PARAMS, stop_ids=())))
        engine.close()
    assert len(replies[0]) == TOKENS
    assert replies[0] == replies[1]


def test_every_step_is_there_with_its_tokens_and_its_past(engine: Engine) -> None:
    steps = [(step.kind, step.tokens, step.past_tokens) for step in recorded(engine).steps]
    assert steps == [
        ("prefill", 64, 0),
        ("prefill", 36, 64),
        *(("decode", 1, past) for past in range(100, 104)),
    ]


def test_a_step_passes_the_phases_of_every_layer_in_order_and_without_a_gap(
    engine: Engine,
) -> None:
    before = time.perf_counter()
    timeline = recorded(engine)
    after = time.perf_counter()
    step = timeline.steps[-1]
    assert [(span.phase, span.layer) for span in step.spans] == [
        ("embedding", None),
        ("attention", 0),
        ("dense MLP", 0),
        *((phase, layer) for layer in (1, 2) for phase in MOE_PHASES),
        ("head", None),
        ("sampling", None),
    ]
    for step in timeline.steps:
        assert before < step.began == step.spans[0].began
        assert all(left.ended == right.began for left, right in pairwise(step.spans))
        assert step.seconds == pytest.approx(sum(span.seconds for span in step.spans))
        assert step.spans[-1].ended < after


def test_the_workers_time_lies_between_the_handoff_and_the_end_of_the_waiting(
    engine: Engine,
) -> None:
    for step in recorded(engine).steps:
        assert [call.layer for call in step.host_calls] == [1, 2]
        for layer in (1, 2):
            call = host_call(step, layer)
            began = {span.phase: span.began for span in step.spans if span.layer == layer}
            # Both clocks are CLOCK_MONOTONIC: no tolerance is needed.
            assert began["handoff"] < call.began < call.ended < began["adding"]


def test_a_step_counts_the_different_experts_that_worked(engine: Engine) -> None:
    top_k, experts = engine.config.num_experts_per_tok, engine.config.n_routed_experts
    steps = recorded(engine).steps
    for step in steps:
        least, most = top_k, min(top_k * step.tokens, experts)
        assert all(least <= call.experts <= most for call in step.host_calls), step.kind
    assert sum(call.experts for step in steps for call in step.host_calls) == (
        engine._model.experts_read
    )


def test_a_timeline_that_was_taken_away_is_told_nothing_more(engine: Engine) -> None:
    timeline = recorded(engine)
    steps, spans = len(timeline.steps), len(timeline.steps[-1].spans)
    list(engine.generate(PROMPT, PARAMS, stop_ids=()))
    assert (len(timeline.steps), len(timeline.steps[-1].spans)) == (steps, spans)

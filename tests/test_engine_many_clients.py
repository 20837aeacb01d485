"""Many requests at once: each gets what it would get alone, and none leaves anything behind."""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from hybridk2.config import EngineConfig
from hybridk2.engine import Engine
from hybridk2.errors import DeadlineError, EngineError, OutOfMemoryError, QueueFullError
from hybridk2.kv_cache import PAGE_TOKENS
from hybridk2.request import Generation
from hybridk2.sampling import GeneratedToken, SamplingParams
from tests.reference import Reference
from tests.test_engine import ids, prompt

CONTEXT = 512
CHUNK = 64
MAX_RUNNING, MAX_QUEUED = 8, 64
Dtype = Literal["bfloat16", "float32"]
Load = Callable[..., Engine]


@pytest.fixture(scope="module")
def load(small_checkpoint: Path) -> Iterator[Load]:
    """Engines by dtype and size of the cache, each loaded once."""
    loaded: dict[tuple[Dtype, int], Engine] = {}

    def load(dtype: Dtype = "float32", kv_cache_tokens: int = 4 * CONTEXT) -> Engine:
        if (dtype, kv_cache_tokens) not in loaded:
            choices = EngineConfig(
                model=str(small_checkpoint),
                dtype=dtype,
                threads=2,
                context_tokens=CONTEXT,
                kv_cache_tokens=kv_cache_tokens,
                prefill_chunk_tokens=CHUNK,
                max_running=MAX_RUNNING,
                max_queued=MAX_QUEUED,
            )
            loaded[dtype, kv_cache_tokens] = Engine.load(choices)
        return loaded[dtype, kv_cache_tokens]

    yield load
    for engine in loaded.values():
        engine.close()


@pytest.fixture
def engine(load: Load) -> Iterator[Engine]:
    engine = load()
    yield engine
    left = list(engine._scheduler.requests())
    for generation in left:
        engine.cancel(generation)  # or the next test would find them
    assert not left
    assert_nothing_is_left(engine)


def assert_nothing_is_left(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting_interactive, stats.waiting_background) == (0, 0, 0)
    assert stats.cache_tokens_used == 0
    assert not engine.step()


def submit(engine: Engine, question: Sequence[int], **options: Any) -> Generation:
    """A request that no token ends before max_tokens."""
    submit_names = ("constraint", "priority", "deadline_seconds", "prompt_logprobs", "stop_ids")
    chosen = {name: options.pop(name) for name in submit_names if name in options}
    params = SamplingParams(**{"max_tokens": 12, **options})
    return engine.submit(question, params, **{"stop_ids": (), **chosen})


def run(engine: Engine) -> None:
    while engine.step():
        pass


def output(generation: Generation) -> list[GeneratedToken]:
    assert generation.error is None
    return list(generation.output)


def decoded(engine: Engine, *generations: Generation) -> None:
    """Step until each of them has begun to decode."""
    while any(generation.reading for generation in generations):
        engine.step()


# -- Company does not show ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_seeded_request_has_the_same_bits_alone_and_beside_seven_that_come_and_go(
    load: Load, dtype: Dtype
) -> None:
    engine = load(dtype)
    draw = random.Random(3)
    question = prompt(engine, 90, seed=1)
    wanted = {"seed": 7, "max_tokens": 60, "logprobs": 3}
    alone = submit(engine, question, **wanted)
    run(engine)
    for company in range(3):
        others = [
            submit(engine, prompt(engine, draw.randrange(1, 100), seed=10 * company + n))
            for n in range(company * 3)
        ]
        again = submit(engine, question, **wanted)
        seed = 0
        while not again.done:
            others = [other for other in others if not other.done]
            while len(others) < MAX_RUNNING - 1:
                seed += 1
                other = prompt(engine, draw.randrange(1, 100), seed=1000 + seed)
                tokens = draw.randrange(1, 9)
                others.append(submit(engine, other, max_tokens=tokens, temperature=2.0))
            if draw.random() < 0.3:
                engine.cancel(draw.choice(others))
            engine.step()
        for other in others:
            engine.cancel(other)
        # Log-probabilities too: an equal token may come of unequal bits.
        assert output(again) == output(alone)
    assert_nothing_is_left(engine)


def test_eight_requests_take_one_pass_through_the_model_per_token(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    generations = [submit(engine, prompt(engine, 5, seed=n), max_tokens=20) for n in range(8)]
    decoded(engine, *generations)
    rows: list[int] = []
    decode = engine._model.decode

    def count(token_ids: Sequence[int], *args: Any, **options: Any) -> torch.Tensor:
        rows.append(len(token_ids))
        return decode(token_ids, *args, **options)

    monkeypatch.setattr(engine._model, "decode", count)
    engine.step()
    engine.step()
    assert rows == [8, 8]
    run(engine)
    assert {len(output(generation)) for generation in generations} == {20}


def test_greedy_tokens_of_requests_in_company_equal_the_references(
    engine: Engine, small_checkpoint: Path
) -> None:
    reference = Reference(small_checkpoint, torch.float64)
    questions = [prompt(engine, 30 + 20 * n, seed=n) for n in range(4)]
    generations = [submit(engine, question, temperature=0.0) for question in questions]
    run(engine)
    for past, generation in zip(questions, generations, strict=True):
        for token in output(generation):
            logits = reference.forward(past).logits[-1]
            # Equal logits within fp32 noise may go either way.
            assert logits[token.id] >= logits.max() - 1e-3, f"after {len(past)} tokens"
            past = [*past, token.id]


# -- Whose turn it is -----------------------------------------------------------------------------


def test_a_stream_gets_a_token_in_every_step_while_long_prompts_are_read(engine: Engine) -> None:
    stream = submit(engine, prompt(engine, 10, seed=1), max_tokens=40)
    decoded(engine, stream)
    readers = [submit(engine, prompt(engine, 5 * CHUNK, seed=n), max_tokens=2) for n in (42, 43)]
    while any(reader.reading for reader in readers):
        before = stream.completion_tokens
        read = sum(reader.prefilled_tokens for reader in readers)
        engine.step()
        assert stream.completion_tokens == before + 1
        assert sum(reader.prefilled_tokens for reader in readers) == read + CHUNK
        assert readers[1].prefilled_tokens == 0 or not readers[0].reading, "one after the other"
    run(engine)
    assert len(output(stream)) == 40


def test_answers_without_a_bound_do_not_keep_the_context_to_themselves(engine: Engine) -> None:
    generations = [submit(engine, [1 + n], max_tokens=None) for n in range(10)]
    engine.step()
    # One page for prompt and first token, four for what follows.
    assert engine.stats().running == 4 * CONTEXT // (5 * PAGE_TOKENS)
    assert [g.queue_position for g in generations] == [None] * 6 + [0, 1, 2, 3]
    for generation in generations:
        engine.cancel(generation)


def test_a_request_waits_while_the_cache_is_promised_to_others(engine: Engine) -> None:
    long = [submit(engine, prompt(engine, 450, seed=n), max_tokens=None) for n in range(5)]
    engine.step()
    assert engine.stats().running == 4
    assert long[4].queue_position == 0
    engine.cancel(long[0])
    engine.step()
    assert long[4].queue_position is None
    for generation in long:
        engine.cancel(generation)


def test_the_queue_is_bounded_and_says_so(engine: Engine) -> None:
    generations = [submit(engine, [5], max_tokens=2) for _ in range(MAX_RUNNING + MAX_QUEUED)]
    with pytest.raises(QueueFullError):
        submit(engine, [5])
    run(engine)
    assert {len(output(generation)) for generation in generations} == {2}
    assert engine.cancel(submit(engine, [5])) is None


# -- Shared prefixes ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 3])
def test_a_prefix_that_several_requests_begin_with_is_computed_once(
    engine: Engine, seed: int | None
) -> None:
    prefix = prompt(engine, 4 * CHUNK, seed=50 + (seed or 0))
    before = engine.stats()
    generations = [submit(engine, [*prefix, n, n], seed=seed) for n in range(6)]
    run(engine)
    after = engine.stats()
    read = after.prompt_tokens_total - before.prompt_tokens_total
    cached = after.cached_tokens_total - before.cached_tokens_total
    assert read == 6 * (len(prefix) + 2)
    assert read - cached == len(prefix) + 6 * 2
    assert [g.cached_tokens for g in generations] == [0] + [len(prefix)] * 5


def test_a_prefix_that_was_overtaken_in_the_middle_is_still_computed_once(engine: Engine) -> None:
    prefix = prompt(engine, 6 * CHUNK, seed=60)
    before = engine.stats()
    background = submit(engine, [*prefix, 1], priority="background")
    engine.step()
    assert 0 < background.prefilled_tokens < len(prefix)
    interactive = submit(engine, [*prefix, 2])
    run(engine)
    after = engine.stats()
    read = after.prompt_tokens_total - before.prompt_tokens_total
    cached = after.cached_tokens_total - before.cached_tokens_total
    assert read - cached == len(prefix) + 2
    assert interactive.cached_tokens == CHUNK
    assert background.cached_tokens == len(prefix) - CHUNK


@pytest.mark.parametrize("seed", [None, 4])
def test_a_retry_after_a_cancel_in_mid_prefill_reads_on_where_it_was(
    engine: Engine, seed: int | None
) -> None:
    question = prompt(engine, 7 * CHUNK, seed=70 + (seed or 0))
    first = submit(engine, question, seed=seed)
    for _ in range(4):
        engine.step()
    read = first.prefilled_tokens
    assert read == 4 * CHUNK
    engine.cancel(first)
    retry = submit(engine, question, seed=seed)
    run(engine)
    assert retry.cached_tokens == read


# -- Ends -----------------------------------------------------------------------------------------


def test_a_cancel_frees_its_place_and_pages_in_any_state(engine: Engine) -> None:
    decoding = submit(engine, prompt(engine, 5, seed=1), max_tokens=None)
    decoded(engine, decoding)
    reading = submit(engine, prompt(engine, 300, seed=2))
    engine.step()
    assert reading.reading
    others = [submit(engine, [n]) for n in range(8)]
    engine.step()
    waiting = others[-1]
    assert waiting.queue_position is not None
    for generation in (decoding, reading, waiting):
        used = engine.stats().cache_tokens_used
        engine.cancel(generation)
        assert generation.finish_reason == "cancelled"
        held_pages = generation is not waiting
        assert (engine.stats().cache_tokens_used < used) == held_pages
    run(engine)
    assert {len(output(other)) for other in others[:-1]} == {12}


def test_nobody_waits_for_a_step_but_who_steps(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = submit(engine, prompt(engine, 5, seed=1), max_tokens=None)
    decoded(engine, running)
    inside, go_on = threading.Event(), threading.Event()
    decode = engine._model.decode

    def slow(*args: Any, **options: Any) -> torch.Tensor:
        inside.set()
        assert go_on.wait(30)
        return decode(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(engine._model, "decode", slow)
        stepper = threading.Thread(target=engine.step)
        stepper.start()
        assert inside.wait(30)
        waiting = submit(engine, [1])
        assert engine.stats().waiting_interactive == 1
        engine.cancel(waiting)
        assert waiting.finish_reason == "cancelled"
        engine.cancel(running)
        assert not running.done, "its step is under way"
        go_on.set()
        stepper.join()
    assert running.finish_reason == "cancelled"


def test_a_request_that_is_late_ends_and_the_others_go_on(engine: Engine) -> None:
    late = submit(engine, prompt(engine, 20, seed=1), max_tokens=None, deadline_seconds=0.2)
    in_time = submit(engine, prompt(engine, 20, seed=2), deadline_seconds=600)
    waiting_too_long = submit(engine, [3], deadline_seconds=0.0)
    run(engine)
    for generation in (late, waiting_too_long):
        assert isinstance(generation.error, DeadlineError)
    assert late.completion_tokens < CONTEXT - 20
    assert len(output(in_time)) == 12


@pytest.mark.parametrize("kind", [MemoryError, ZeroDivisionError])
def test_an_error_in_the_work_of_one_request_ends_that_one_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    questions = [prompt(engine, 20, seed=n) for n in range(4)]
    alone = []
    for question in questions:
        alone.append(submit(engine, question, seed=5))
        run(engine)
    together = [submit(engine, question, seed=5) for question in questions]
    decoded(engine, *together)
    victim = together[2].sequence
    attention = engine._model.layers[1].attention
    mix = attention._mix_latents

    def fail(q: torch.Tensor, sequence: object, start: int) -> torch.Tensor:
        if sequence is victim:
            raise kind("injected")
        return mix(q, sequence, start)

    monkeypatch.setattr(attention, "_mix_latents", fail)
    run(engine)
    expected = OutOfMemoryError if kind is MemoryError else EngineError
    assert type(together[2].error) is expected
    for index in (0, 1, 3):
        assert output(together[index]) == output(alone[index])


# -- Constraints ----------------------------------------------------------------------------------


class OnlyThese:
    """Allows some ids, and any in every third place; keeps the order of the calls."""

    def __init__(self, allowed: Sequence[int], vocab_size: int) -> None:
        self.allowed = np.zeros(vocab_size, dtype=bool)
        self.allowed[list(allowed)] = True
        self.calls: list[int | None] = []

    def mask(self) -> np.ndarray | None:
        self.calls.append(None)
        return None if len(self.calls) // 2 % 3 == 2 else self.allowed

    def accept(self, token_id: int) -> None:
        self.calls.append(token_id)


def test_a_constraint_is_asked_and_told_in_turns_and_what_it_forbids_never_comes(
    engine: Engine,
) -> None:
    held = OnlyThese([3, 5, 8], engine.config.vocab_size)
    generation = submit(engine, [1, 2], constraint=held, max_tokens=30, temperature=5.0)
    free = submit(engine, [1, 2], max_tokens=30)
    run(engine)
    came = [token.id for token in output(generation)]
    assert held.calls[::2] == [None] * 30
    assert held.calls[1::2] == came
    assert all(token_id in (3, 5, 8) for n, token_id in enumerate(came) if n % 3 != 2)
    assert len(output(free)) == 30


def test_the_stop_token_that_a_constraint_allows_ends_the_reply(engine: Engine) -> None:
    held = OnlyThese([9], engine.config.vocab_size)
    generation = submit(engine, [1, 2], constraint=held, stop_ids=[9])
    run(engine)
    assert (output(generation), generation.finish_reason) == ([], "stop")
    assert held.calls == [None, 9]


@pytest.mark.parametrize("method", ["mask", "accept"])
def test_a_constraint_that_fails_ends_its_own_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*args: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(OnlyThese, method, fail)
    held = OnlyThese([3], engine.config.vocab_size)
    generation = submit(engine, [1, 2], constraint=held)
    free = submit(engine, [1, 2])
    run(engine)
    assert isinstance(generation.error, EngineError)
    assert "KeyError" in str(generation.error)
    assert len(output(free)) == 12


def test_a_constraint_that_allows_nothing_is_an_error_and_not_a_token(engine: Engine) -> None:
    generation = submit(engine, [1], constraint=OnlyThese([], engine.config.vocab_size))
    run(engine)
    with pytest.raises(EngineError, match="allows no token"):
        ids(engine.tokens(generation))


# -- A full cache ---------------------------------------------------------------------------------


@pytest.fixture
def crowded(load: Load, monkeypatch: pytest.MonkeyPatch) -> Callable[[Dtype], Engine]:
    """An engine that lets requests of GROWING tokens in with 2 pages each, of 6; they grow to 4."""
    monkeypatch.setattr("hybridk2.request._PROMISED_ANSWER_TOKENS", PAGE_TOKENS)
    return lambda dtype: load(dtype, kv_cache_tokens=6 * PAGE_TOKENS)


GROWING_PROMPT, GROWING = 40, 4 * PAGE_TOKENS - 40


def run_and_count_preempted(engine: Engine, generations: Sequence[Generation]) -> int:
    preempted: set[int] = set()
    while engine.step():
        preempted |= {
            g.number for g in generations if g.queue_position is not None and g.sampled_ids
        }
    return len(preempted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_seeded_requests_that_outgrow_the_cache_together_all_come_out_as_alone(
    crowded: Callable[[Dtype], Engine], dtype: Dtype
) -> None:
    engine = crowded(dtype)
    questions = [prompt(engine, GROWING_PROMPT, seed=n) for n in range(3)]
    options = {"seed": 9, "max_tokens": GROWING, "logprobs": 2}
    alone = []
    for question in questions:
        alone.append(submit(engine, question, **options))
        run(engine)
    together = [submit(engine, question, **options) for question in questions]
    assert run_and_count_preempted(engine, together) == 2
    assert [output(generation) for generation in together] == [output(g) for g in alone]
    assert_nothing_is_left(engine)


def test_requests_without_a_seed_that_outgrow_the_cache_lose_and_repeat_nothing(
    crowded: Callable[[Dtype], Engine], small_checkpoint: Path
) -> None:
    engine = crowded("float32")
    questions = [prompt(engine, GROWING_PROMPT, seed=n) for n in range(3)]
    generations = [
        submit(engine, question, temperature=0.0, max_tokens=GROWING) for question in questions
    ]
    assert run_and_count_preempted(engine, generations) == 2
    reference = Reference(small_checkpoint, torch.float64)
    for question, generation in zip(questions, generations, strict=True):
        written = [token.id for token in output(generation)]
        assert len(written) == GROWING
        logits = reference.forward([*question, *written]).logits[len(question) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(written)[:, None])[:, 0]
        assert bool((chosen >= logits.amax(-1) - 1e-3).all()), "not what the model would say"
    assert_nothing_is_left(engine)


# -- Scores of a prompt ---------------------------------------------------------------------------


def test_scores_of_a_prompt_are_the_models_whatever_is_cached(
    engine: Engine, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = prompt(engine, 2 * CHUNK + 30, seed=80)
    run_alone = submit(engine, question)
    run(engine)
    assert output(run_alone)
    # Blocks of 7 rows, so that their edges fall inside chunks.
    monkeypatch.setattr("hybridk2.execution._SCORED_LOGIT_BYTES", 7 * 4 * engine.config.vocab_size)
    generation = submit(engine, question, prompt_logprobs=3)
    run(engine)
    expected = Reference(small_checkpoint, torch.float64).forward(question).logits.log_softmax(-1)
    first, *others = generation.prompt_scores
    assert first == GeneratedToken(question[0])
    assert [score.id for score in others] == question[1:]
    assert len(output(generation)) == 12
    for position, score in enumerate(others):
        row = expected[position]
        # fp32 noise of the whole model, as for its logits.
        assert score.logprob == pytest.approx(float(row[score.id]), abs=1e-3)
        values = [value for _, value in score.top_logprobs]
        assert values == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
        for token_id, value in score.top_logprobs:
            assert value == pytest.approx(float(row[token_id]), abs=1e-3)


# -- Nothing is left ------------------------------------------------------------------------------


def test_a_thousand_requests_cancelled_in_any_state_leave_nothing_behind(load: Load) -> None:
    engine = load("float32", kv_cache_tokens=14 * PAGE_TOKENS)
    draw = random.Random(1)
    threads = threading.active_count()
    prefixes = [prompt(engine, draw.randrange(1, 200), seed=n) for n in range(5)]
    live: list[Generation] = []
    ends = {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
    before = dict(engine.stats().requests_total)
    submitted = refused = 0
    while submitted < 1000 or live:
        if submitted < 1000 and draw.random() < 0.6:
            question = [*draw.choice(prefixes), *(draw.randrange(99) for _ in range(9))]
            submitted += 1
            try:
                live.append(
                    submit(
                        engine,
                        question,
                        seed=draw.choice((None, 1)),
                        max_tokens=draw.choice((1, 3, 20, None)),
                        stop_ids=range(0, 200, draw.choice((7, 50))),
                        priority=draw.choice(("interactive", "background")),
                        deadline_seconds=draw.choice((None, None, None, 0.01)),
                    )
                )
            except QueueFullError:
                refused += 1
        if live and draw.random() < 0.3:
            engine.cancel(draw.choice(live))
        engine.step()
        for generation in [generation for generation in live if generation.done]:
            live.remove(generation)
            ends[generation.finish_reason or "error"] += 1
            assert generation.sequence is None or generation.sequence._closed
    assert sum(ends.values()) + refused == 1000
    assert min(ends.values()) > 0, f"a kind of end was never reached: {ends}"
    after = engine.stats().requests_total
    assert {end: after[end] - before.get(end, 0) for end in ends} == ends
    assert threading.active_count() == threads
    assert_nothing_is_left(engine)

"""The engine gives each request its own tokens, the same ones whatever else it is doing."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hybridk2.checkpoint import Checkpoint
from hybridk2.config import EngineConfig
from hybridk2.engine import Engine
from hybridk2.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    HybridK2Error,
    OutOfMemoryError,
    RequestError,
)
from hybridk2.sampling import GeneratedToken, SamplingParams
from tests.reference import Reference

CONTEXT = 512
CHUNK = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def engine(small_checkpoint: Path) -> Iterator[Engine]:
    engine = Engine.load(
        EngineConfig(
            model=str(small_checkpoint),
            dtype="float32",
            threads=2,
            context_tokens=CONTEXT,
            kv_cache_tokens=4 * CONTEXT,
            prefill_chunk_tokens=CHUNK,
        )
    )
    yield engine
    engine.close()


def prompt(engine: Engine, tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(engine.config.vocab_size, (tokens,), generator=generator).tolist()


def ids(tokens: Iterator[GeneratedToken]) -> list[int]:
    return [token.id for token in tokens]


def test_greedy_tokens_equal_the_references(engine: Engine, small_checkpoint: Path) -> None:
    reference = Reference(small_checkpoint, torch.float64)
    past = prompt(engine, 70, seed=1)
    found = ids(engine.generate(past, GREEDY, stop_ids=()))
    for token in found:
        logits = reference.forward(past).logits[-1]
        # Equal logits within fp32 noise may go either way.
        assert logits[token] >= logits.max() - 1e-3, f"after {len(past)} tokens"
        past = [*past, token]
    assert len(found) == GREEDY.max_tokens


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128, 150])
def test_a_seeded_request_repeats_itself_exactly(engine: Engine, tokens: int) -> None:
    params = SamplingParams(seed=7, max_tokens=20, logprobs=2)
    question = prompt(engine, tokens, seed=tokens)
    cold = list(engine.generate(question, params, stop_ids=()))
    warm = list(engine.generate(question, params, stop_ids=()))
    # Leaves pages behind that were computed from an odd start on.
    list(engine.generate(question + [token.id for token in cold], GREEDY, stop_ids=()))
    after_others = list(engine.generate(question, params, stop_ids=()))
    assert cold == warm == after_others


def test_what_else_is_running_does_not_shift_a_request(engine: Engine) -> None:
    requests = [(prompt(engine, 30 + 41 * n, seed=n), SamplingParams(seed=n)) for n in range(4)]
    requests = [(p, SamplingParams(seed=s.seed, max_tokens=15)) for p, s in requests]
    alone = [list(engine.generate(p, params, stop_ids=())) for p, params in requests]
    together: list[list[GeneratedToken]] = [[] for _ in requests]

    def run(index: int) -> None:
        question, params = requests[index]
        together[index] = list(engine.generate(question, params, stop_ids=()))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_requests_without_a_seed_differ(engine: Engine) -> None:
    params = SamplingParams(temperature=2.0, max_tokens=20)
    question = prompt(engine, 10, seed=3)
    runs = {tuple(ids(engine.generate(question, params, stop_ids=()))) for _ in range(3)}
    assert len(runs) == 3


def test_the_next_turn_reads_only_what_is_new(engine: Engine) -> None:
    first = prompt(engine, 100, seed=11)
    answer = ids(engine.generate(first, GREEDY, stop_ids=()))
    generation = engine.submit([*first, *answer, 5, 6, 7], GREEDY, stop_ids=())
    assert len(ids(engine.tokens(generation))) == GREEDY.max_tokens
    # The last token of the answer was sampled but never run.
    assert generation.cached_tokens == len(first) + len(answer) - 1


def test_after_warming_only_the_last_token_is_read(engine: Engine) -> None:
    past = prompt(engine, 201, seed=12)
    engine.warm(past, lambda: False)
    generation = engine.submit([*past, 9], GREEDY, stop_ids=())
    assert len(ids(engine.tokens(generation))) == GREEDY.max_tokens
    assert generation.cached_tokens == len(past)


def test_warming_what_is_known_or_nothing_computes_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    past = prompt(engine, 150, seed=14)
    engine.warm(past, lambda: False)

    def fail(*args: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(engine._model, "forward", fail)
    engine.warm(past, lambda: False)
    engine.warm([], lambda: False)
    assert not engine.step()


def test_warming_stops_when_told(engine: Engine) -> None:
    past = prompt(engine, 201, seed=13)
    asked = []
    engine.warm(past, lambda: len(asked) == 1 or bool(asked.append(1)))
    generation = engine.submit([*past, 9], GREEDY, stop_ids=())
    list(engine.tokens(generation))
    assert generation.cached_tokens == CHUNK


def test_a_stop_token_ends_the_output_and_is_not_part_of_it(engine: Engine) -> None:
    question = prompt(engine, 20, seed=4)
    free = ids(engine.generate(question, GREEDY, stop_ids=()))
    stop = free[5]
    generation = engine.submit(question, GREEDY, stop_ids=[stop])
    assert ids(engine.tokens(generation)) == free[: free.index(stop)]
    assert generation.finish_reason == "stop"


def test_the_output_ends_at_max_tokens_and_at_the_context(engine: Engine) -> None:
    generation = engine.submit(prompt(engine, 20, seed=5), GREEDY, stop_ids=())
    assert len(ids(engine.tokens(generation))) == GREEDY.max_tokens
    assert generation.finish_reason == "length"
    nearly_full = prompt(engine, CONTEXT - 3, seed=6)
    generation = engine.submit(nearly_full, GREEDY, stop_ids=())
    assert len(ids(engine.tokens(generation))) == 3
    assert generation.finish_reason == "length"


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ([], "empty"),
        ([-1], "token id -1"),
        ([1, 10**6], "token id 1000000"),
        ([1] * CONTEXT, f"{CONTEXT} tokens and the context holds {CONTEXT}"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused(
    engine: Engine, question: list[int], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        engine.submit(question, GREEDY)


def test_a_prompt_beyond_the_context_is_refused_with_its_numbers(engine: Engine) -> None:
    with pytest.raises(ContextLengthError) as caught:
        engine.submit([1] * (CONTEXT + 5), GREEDY)
    error = caught.value
    assert (error.prompt_tokens, error.max_tokens) == (CONTEXT + 5, GREEDY.max_tokens)
    assert error.context_tokens == CONTEXT


@pytest.mark.parametrize("prompt_logprobs", [-1, 21])
def test_more_scores_than_are_kept_are_refused(engine: Engine, prompt_logprobs: int) -> None:
    with pytest.raises(RequestError, match=f"prompt_logprobs.*found {prompt_logprobs}"):
        engine.submit([1], GREEDY, prompt_logprobs=prompt_logprobs)


def test_a_context_longer_than_the_cache_is_cut_to_it(small_checkpoint: Path) -> None:
    choices = EngineConfig(model=str(small_checkpoint), context_tokens=500, kv_cache_tokens=200)
    engine = Engine.load(choices)
    try:
        assert engine.context_tokens == 256, "whole pages"
        generation = engine.submit([1] * 250, SamplingParams(), stop_ids=())
        assert len(ids(engine.tokens(generation))) == 6
    finally:
        engine.close()


def test_the_figures_of_an_engine_are_what_its_requests_did(engine: Engine) -> None:
    before = engine.stats()
    question = prompt(engine, 2 * CHUNK + 6, seed=90)
    list(engine.generate(question, GREEDY, stop_ids=()))
    list(engine.generate(question, GREEDY, stop_ids=()))
    after = engine.stats()
    assert after.prompt_tokens_total - before.prompt_tokens_total == 2 * len(question)
    assert after.cached_tokens_total - before.cached_tokens_total == len(question) - 1
    assert after.completion_tokens_total - before.completion_tokens_total == 24
    assert after.requests_total["length"] - before.requests_total.get("length", 0) == 2
    # Three chunks, then one for the last token; the first token of each answer comes of them.
    assert after.steps_total - before.steps_total == 3 + 1 + 2 * 11
    assert after.step_seconds_total > before.step_seconds_total
    config = engine.config
    expert_bytes = engine.experts.weight_bytes / (config.num_moe_layers * config.n_routed_experts)
    read = (after.expert_bytes_total - before.expert_bytes_total) / expert_bytes
    # One token needs top-k experts a layer, a chunk of many at most all of them.
    layers, top_k = config.num_moe_layers, config.num_experts_per_tok
    most = 3 * config.n_routed_experts + (1 + 22) * top_k
    assert layers * (3 + 1 + 22) * top_k <= read <= layers * most


def test_closing_the_iterator_frees_the_request(engine: Engine) -> None:
    before = engine._cache.available_tokens
    generation = engine.submit(prompt(engine, 50, seed=8), GREEDY, stop_ids=())
    tokens = engine.tokens(generation)
    next(tokens)
    assert engine._cache.available_tokens < before
    tokens.close()  # type: ignore[attr-defined]
    assert generation.finish_reason == "cancelled"
    assert engine._cache.available_tokens == before
    assert not engine.step()


@pytest.mark.parametrize(
    ("injected", "kind"), [(MemoryError, OutOfMemoryError), (ZeroDivisionError, EngineError)]
)
def test_a_failed_step_ends_its_request_and_not_the_engine(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    injected: type[Exception],
    kind: type[HybridK2Error],
) -> None:
    question = prompt(engine, 20, seed=9)
    wanted = ids(engine.generate(question, GREEDY, stop_ids=()))

    def fail(*args: object) -> None:
        raise injected("injected")

    before = engine._cache.available_tokens
    with monkeypatch.context() as patch:
        patch.setattr(engine._model.layers[1].attention, "forward", fail)
        with pytest.raises(kind, match=f"{injected.__name__}: injected"):
            ids(engine.generate(question, GREEDY, stop_ids=()))
    assert engine._cache.available_tokens == before
    assert ids(engine.generate(question, GREEDY, stop_ids=())) == wanted


def test_logits_that_are_not_finite_are_an_error_and_not_a_token(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned = engine._model._final_norm.clone()
    poisoned[3] = float("nan")
    monkeypatch.setattr(engine._model, "_final_norm", poisoned)
    with pytest.raises(EngineError, match="not finite"):
        ids(engine.generate(prompt(engine, 5, seed=10), GREEDY))


def test_a_context_beyond_the_models_is_refused(small_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="context"):
        Engine.load(EngineConfig(model=str(small_checkpoint), context_tokens=10**6))


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_loaded(
    small_checkpoint: Path,
) -> None:
    choices = EngineConfig(model=str(small_checkpoint), kv_cache_tokens=10**12)
    with pytest.raises(OutOfMemoryError, match="latent cache"):
        Engine.load(choices, lambda progress: pytest.fail("loading began"))


@pytest.mark.parametrize("huge_pages", [True, False])
def test_reserved_pages_count_as_room_for_the_experts_if_they_may_lie_there(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, huge_pages: bool
) -> None:
    """The kernel does not count reserved 1 GB pages as available memory."""
    with Checkpoint.open(small_checkpoint) as checkpoint:
        room_bytes = checkpoint.expert_bytes if huge_pages else 0
    offered: list[int] = []

    def refuse(checkpoint: Checkpoint, available_bytes: int, **needs: int) -> None:
        offered.append(available_bytes)
        raise OutOfMemoryError("as if it did not fit")

    monkeypatch.setattr("hybridk2.engine_parts.host.check_memory", refuse)
    monkeypatch.setattr("hybridk2.engine_parts.parts.reserved_page_bytes", lambda: 1 << 40)
    monkeypatch.setattr(
        "hybridk2.engine_parts.parts.psutil.virtual_memory", lambda: SimpleNamespace(available=1000)
    )
    with pytest.raises(OutOfMemoryError, match="as if"):
        Engine.load(EngineConfig(model=str(small_checkpoint), huge_pages=huge_pages))
    assert offered == [1000 + room_bytes]

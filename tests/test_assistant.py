"""An assistant is its tokenizer, chat format and engine, and nothing is lost between them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridk2.assistant import Assistant
from hybridk2.chat.events import Event, Finished, PromptProgress
from hybridk2.chat.generation import collect
from hybridk2.config import EngineConfig
from hybridk2.errors import ChatError, CheckpointError, RequestError, TokenizerError
from hybridk2.sampling import SamplingParams
from hybridk2.synthesis import config_for_tokenizer, synthesize, synthetic_config
from tests.small_vocabulary import write_vocabulary

CHUNK = 64
PARAMS = SamplingParams(seed=5, max_tokens=30)
QUESTION = [{"role": "user", "content": "which one is bigger, 9.11 or 9.9? " * 6}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with a vocabulary: what it says is noise, how it is said is not."""
    vocabulary = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(vocabulary)
    config = config_for_tokenizer(synthetic_config("tiny"), vocabulary)
    checkpoint = tmp_path_factory.mktemp("checkpoints") / "talking"
    synthesize(checkpoint, config, seed=3, tokenizer_folder=vocabulary)
    return checkpoint


@pytest.fixture(scope="module")
def assistant(folder: Path) -> Iterator[Assistant]:
    choices = EngineConfig(
        model=str(folder), context_tokens=2048, prefill_chunk_tokens=CHUNK, threads=2
    )
    assistant = Assistant.load(choices)
    yield assistant
    assistant.close()


def finished(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def test_a_reply_reports_its_prompt_then_its_content_then_its_cost(assistant: Assistant) -> None:
    events = list(assistant.reply(QUESTION, params=PARAMS))
    progress = [event for event in events if isinstance(event, PromptProgress)]
    assert events[: len(progress)] == progress, "the prompt is read before anything is said"
    assert [event.read_tokens for event in progress] == sorted({e.read_tokens for e in progress})
    usage = finished(events).usage
    assert usage is not None
    assert len(progress) == -(-usage.prompt_tokens // CHUNK)
    assert progress[-1].read_tokens == progress[-1].total_tokens == usage.prompt_tokens
    assert 0 < usage.completion_tokens <= 30
    assert usage.context_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.context_limit == 2048
    assert usage.prefill_tokens_per_second > 0


def test_the_same_request_with_the_same_seed_gives_the_same_events(assistant: Assistant) -> None:
    first = collect(assistant.reply(QUESTION, params=PARAMS))
    list(assistant.reply([*QUESTION, {"role": "assistant", "content": "?"}], params=PARAMS))
    again = collect(assistant.reply(QUESTION, params=PARAMS))
    assert first.message == again.message
    assert first.finish.reason == again.finish.reason


def test_after_warming_the_next_turn_reads_only_the_question(assistant: Assistant) -> None:
    params = SamplingParams(max_tokens=20)
    history = [{"role": "user", "content": "a turn of its own " * 20}]
    reply = collect(assistant.reply(history, params=params))
    history = [*history, {**reply.message, "content": "an answer " * 20}]
    assistant.warm(history)
    follow_up = [*history, {"role": "user", "content": "and now?"}]
    usage = collect(assistant.reply(follow_up, params=params)).finish.usage
    assert usage is not None
    question = assistant.count_tokens("and now?")
    # What is left to read: header, question, end of message, header of the answer.
    framing = 2 * (2 + assistant.count_tokens("assistant")) + 1
    assert usage.prompt_tokens - usage.cached_tokens <= question + framing


def test_closing_a_reply_while_the_prompt_is_read_frees_the_engine(assistant: Assistant) -> None:
    events = assistant.reply([{"role": "user", "content": "long " * 300}], params=PARAMS)
    assert isinstance(next(events), PromptProgress)
    events.close()
    assert not assistant._engine.step()


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(assistant: Assistant) -> None:
    with pytest.raises(RequestError, match=r"\d{4,} tokens and the context holds 2048"):
        next(assistant.reply([{"role": "user", "content": "long " * 3000}]))


def test_a_message_that_is_none_is_refused_by_its_place(assistant: Assistant) -> None:
    with pytest.raises(ChatError, match=r"messages\[0\]"):
        next(assistant.reply([{"role": "captain", "content": "hi"}]))


def test_a_folder_without_a_vocabulary_is_refused(small_checkpoint: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tiktoken\.model"):
        Assistant.load(EngineConfig(model=str(small_checkpoint)))


def test_a_vocabulary_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    config = config_for_tokenizer(synthetic_config("tiny"), folder)
    synthesize(mixed, synthetic_config("tiny"), seed=1)
    write_vocabulary(mixed)
    assert config.vocab_size != synthetic_config("tiny").vocab_size, "nothing to tell apart"
    with pytest.raises(CheckpointError, match="token ids"):
        Assistant.load(EngineConfig(model=str(mixed)))

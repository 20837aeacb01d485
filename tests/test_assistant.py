"""An assistant is its tokenizer, chat format and engine, and nothing is lost between them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybridk2.assistant import Assistant, ReplyInProgress
from hybridk2.chat.events import (
    Event,
    Finished,
    PromptProgress,
    PromptScored,
    TextDelta,
    TokenScored,
)
from hybridk2.chat.generation import collect
from hybridk2.config import EngineConfig
from hybridk2.errors import (
    ChatError,
    CheckpointError,
    DeadlineError,
    OutOfMemoryError,
    RequestError,
    TokenizerError,
)
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


def polled(assistant: Assistant, reply: ReplyInProgress) -> list[Event]:
    events: list[Event] = []
    while not reply.done:
        assistant.step()
        events += reply.poll()
    return events


def test_a_reply_that_is_polled_equals_one_that_is_read(assistant: Assistant) -> None:
    read = list(assistant.reply(QUESTION, params=PARAMS))
    reply = assistant.begin(QUESTION, params=PARAMS)
    assert reply.prompt_tokens == assistant.count_prompt_tokens(QUESTION)
    came = polled(assistant, reply)
    assert reply.poll() == []
    assert collect(came)[:3] == collect(read)[:3]
    assert finished(came).reason == finished(read).reason


def test_polling_neither_waits_nor_computes(assistant: Assistant) -> None:
    new = [{"role": "user", "content": "never asked before " * 20}]  # several chunks
    reply = assistant.begin(new, params=PARAMS)
    assert reply.queue_position == 0
    assert [reply.poll() for _ in range(3)] == [[], [], []]
    assistant.step()
    assert reply.queue_position is None
    assert [type(event) for event in reply.poll()] == [PromptProgress]
    assert reply.poll() == []
    reply.cancel()
    assert finished(reply.poll()).reason == "cancelled"
    assert reply.done
    assert not assistant.step()


def test_a_cancelled_reply_closes_what_it_had_begun(assistant: Assistant) -> None:
    reply = assistant.begin(QUESTION, params=SamplingParams(seed=5))
    while not reply._generation.output:
        assistant.step()
    reply.cancel()
    events = reply.poll()
    usage = finished(events).usage
    assert usage is not None
    assert usage.completion_tokens == 1
    assert collect(events).finish.reason == "cancelled"


def test_the_error_of_a_reply_is_raised_once_and_after_what_came_before(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = assistant.begin(QUESTION, params=PARAMS)
    while not reply._generation.output:
        assistant.step()

    def fail(*args: object, **options: object) -> None:
        raise MemoryError("injected")

    monkeypatch.setattr(assistant._engine._model, "decode", fail)
    assistant.step()
    assert any(isinstance(event, PromptProgress) for event in reply.poll())
    assert not reply.done
    with pytest.raises(OutOfMemoryError, match="injected"):
        reply.poll()
    assert reply.done
    assert reply.poll() == []


def test_a_stop_string_ends_the_reply_in_the_engine_too(assistant: Assistant) -> None:
    whole = collect(polled(assistant, assistant.begin_completion("hello", PARAMS))).content
    assert whole is not None
    stop = whole[3:5]
    params = replace(PARAMS, stop=(stop,))
    reply = assistant.begin_completion("hello", params)
    events = polled(assistant, reply)
    assert collect(events).content == whole[: whole.index(stop)]
    assert (finished(events).reason, finished(events).stop_string) == ("stop", stop)
    assert not assistant.step()


def test_every_token_of_a_scored_text_comes_before_its_delta_and_spells_it(
    assistant: Assistant,
) -> None:
    reply = assistant.begin_completion("hello", replace(PARAMS, logprobs=2))
    spelled, shown = b"", ""
    for event in polled(assistant, reply):
        if isinstance(event, TokenScored):
            spelled += event.text_bytes
            assert event.logprob is not None
            assert event.logprob <= event.top[0][2] + 1e-9
            assert [text for _, text, _ in event.top] == [
                assistant.tokenizer.token_bytes(token_id) for token_id, _, _ in event.top
            ]
        elif isinstance(event, TextDelta):
            shown += event.text
            assert spelled.decode("utf-8", "replace").startswith(shown.rstrip("\ufffd"))
    assert shown
    assert spelled.decode("utf-8", "replace").startswith(shown.rstrip("\ufffd"))


def test_a_completion_continues_ids_and_text_alike_and_echoes_their_scores(
    assistant: Assistant,
) -> None:
    text = "hello wo<|im_end|>"
    token_ids = assistant.tokenizer.encode(text)
    assert assistant.tokenizer.control.im_end not in token_ids
    plain = collect(polled(assistant, assistant.begin_completion(text, PARAMS)))
    events = polled(assistant, assistant.begin_completion(token_ids, PARAMS, echo_logprobs=1))
    assert collect(events).content == plain.content
    (scored,) = (event for event in events if isinstance(event, PromptScored))
    first_text = next(n for n, event in enumerate(events) if isinstance(event, TextDelta))
    assert events.index(scored) < first_text
    assert [token.id for token in scored.tokens] == token_ids
    assert b"".join(token.text_bytes for token in scored.tokens).decode() == text
    assert scored.tokens[0].logprob is None
    assert all(token.logprob is not None and len(token.top) == 1 for token in scored.tokens[1:])


def test_constraint_priority_and_deadline_reach_the_engine(assistant: Assistant) -> None:
    class OnlyHello:
        """Allows one word of text, then the end of the message."""

        def __init__(self) -> None:
            self.left = [assistant.tokenizer.encode("hello")[0], assistant.tokenizer.control.im_end]

        def mask(self) -> np.ndarray:
            return np.arange(assistant.config.vocab_size) == self.left[0]

        def accept(self, token_id: int) -> None:
            assert token_id == self.left.pop(0)

    reply = assistant.begin(QUESTION, constraint=OnlyHello(), priority="background")
    assert assistant.stats().waiting_background == 1
    late = assistant.begin(QUESTION, deadline_seconds=0.0)
    parsed = collect(polled(assistant, reply))
    assert (parsed.content, parsed.finish.reason) == ("hello", "stop")
    with pytest.raises(DeadlineError):
        late.poll()


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

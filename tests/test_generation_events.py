"""From tokens to a finished reply: stop strings, reasons, cancelling, and the collected message."""

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridk2.chat.events import (
    Event,
    Finished,
    PromptProgress,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    Usage,
)
from hybridk2.chat.generation import Reply, collect, stream
from hybridk2.chat.parser import OutputParser
from hybridk2.chat.template import render
from hybridk2.errors import EngineError, RequestError
from tests.small_vocabulary import small_tokenizer

SMALL = small_tokenizer()
END = "<|im_end|>"
CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>f:0<|tool_call_argument_begin|>"
    '{"a": "stop"}<|tool_call_end|><|tool_calls_section_end|>'
)


class Tokens:
    """An iterator of tokens that knows how far it was read and whether it was closed."""

    def __init__(self, written: str, error_at_end: Exception | None = None) -> None:
        self._ids = iter(SMALL.encode_with_control(written))
        self._error_at_end = error_at_end
        self.num_read = 0
        self.is_closed = False

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        token_id = next(self._ids, None)
        if token_id is None:
            raise self._error_at_end or StopIteration
        self.num_read += 1
        return token_id

    def close(self) -> None:
        self.is_closed = True


def events_of(written: str, stop_strings: Sequence[str] = ()) -> list[Event]:
    return list(stream(Tokens(written), OutputParser(SMALL), stop_strings))


def reply(written: str, stop_strings: Sequence[str] = ()) -> Reply:
    return collect(events_of(written, stop_strings))


# --- why it ended ----------------------------------------------------------------------------


def test_a_message_that_the_model_ends_finishes_with_stop() -> None:
    assert reply(f"<think>a</think>b{END}") == Reply("a", "b", [], Finished("stop"))


def test_tokens_that_run_out_finish_with_length_unless_told_otherwise() -> None:
    assert reply("<think>a</think>b").finish.reason == "length"
    for reason in ("stop", "length", "cancelled"):
        events = stream(Tokens("b"), OutputParser(SMALL), end_reason=lambda r=reason: r)
        assert collect(events).finish.reason == reason


def test_a_complete_reply_with_a_call_finishes_with_tool_calls() -> None:
    assert reply(CALL + END).finish.reason == "tool_calls"
    assert reply(CALL).finish.reason == "length"
    events = stream(Tokens(CALL), OutputParser(SMALL), end_reason=lambda: "stop")
    assert collect(events).finish.reason == "tool_calls"


def test_no_token_is_read_after_the_end_and_the_tokens_are_closed() -> None:
    tokens = Tokens(f"ab{END}cd")
    collect(stream(tokens, OutputParser(SMALL)))
    assert (tokens.num_read, tokens.is_closed) == (3, True)


def test_a_plain_iterator_of_ids_will_do() -> None:
    assert collect(stream(iter(SMALL.encode("hello")), OutputParser(SMALL))).content == "hello"


def test_usage_is_asked_once_and_after_the_tokens_are_closed() -> None:
    tokens = Tokens(f"ab{END}")
    asked: list[bool] = []

    def usage() -> Usage:
        asked.append(tokens.is_closed)
        return Usage(prompt_tokens=3)

    events = list(stream(tokens, OutputParser(SMALL), usage=usage))
    assert asked == [True]
    assert events[-1] == Finished("stop", Usage(prompt_tokens=3))


def test_closing_the_stream_closes_the_tokens() -> None:
    tokens = Tokens("<think>a</think>hello you")
    events = stream(tokens, OutputParser(SMALL))
    assert next(events) == ReasoningDelta("a")
    events.close()
    assert tokens.is_closed
    assert tokens.num_read == 2


def test_an_error_in_the_tokens_comes_through_and_closes_them() -> None:
    tokens = Tokens("hello", EngineError("step 3 failed"))
    with pytest.raises(EngineError, match="step 3"):
        list(stream(tokens, OutputParser(SMALL)))
    assert tokens.is_closed


# --- stop strings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("hello", ["l"], "he"),
        ("hello", ["ll"], "he"),
        ("hello", ["hello"], ""),
        ("hello", ["lx"], "hello"),
        ("hello", ["o!"], "hello"),
        ("aXbX", ["X"], "a"),
        ("aaab", ["aab"], "a"),
        ("abc", ["bc", "c"], "a"),  # both end here: the one that begins first
        ("abcd", ["abcd", "c"], "ab"),  # "c" is complete first
        ("one\n\ntwo", ["\n\n"], "one"),
        ("a👩‍👩b", ["👩"], "a"),
        ("hello", [], "hello"),
    ],
)
def test_a_stop_string_ends_the_text_before_it(text: str, stops: list[str], shown: str) -> None:
    parsed = reply(text + END, stops)
    assert parsed.content == (shown or None)
    assert parsed.finish.reason == "stop"


def test_a_stop_string_stops_the_reading_of_tokens() -> None:
    tokens = Tokens("abSTOPcd")
    parsed = collect(stream(tokens, OutputParser(SMALL), ["STOP"]))
    assert parsed == Reply("", "ab", [], Finished("stop"))
    assert tokens.num_read == 6
    assert tokens.is_closed


def test_thoughts_and_calls_are_not_searched_for_stop_strings() -> None:
    parsed = reply(f"<think>a stop</think>b{CALL}{END}", ["stop"])
    assert parsed.reasoning == "a stop"
    assert parsed.tool_calls[0]["function"]["arguments"] == '{"a": "stop"}'
    assert parsed.finish.reason == "tool_calls"


def test_text_held_for_a_stop_string_comes_before_what_follows_it() -> None:
    events = events_of(f"b st{CALL}{END}", ["stop"])
    kinds = [type(event) for event in events]
    last_text = len(kinds) - 1 - kinds[::-1].index(TextDelta)
    assert last_text < kinds.index(ToolCallStart)
    assert collect(events).content == "b st"


def test_text_is_held_back_no_longer_than_needed() -> None:
    events = events_of(f"x stab{END}", ["stop"])
    assert events[:4] == [TextDelta("x"), TextDelta(" "), TextDelta("sta"), TextDelta("b")]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="stop"):
        next(stream(Tokens("a"), OutputParser(SMALL), ["x", ""]))


def _stopped_at_once(text: str, stops: list[str]) -> str:
    """Read character by character, look only backwards."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@settings(max_examples=300, deadline=None)
@given(
    st.text("abé", max_size=30),
    st.lists(st.text("abé", min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(1, 5), min_size=30, max_size=30),
)
def test_stop_strings_do_not_depend_on_how_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    assert (reply(text, stops).content or "") == _stopped_at_once(text, stops)
    pieces: list[Event] = []
    rest = text
    for cut in cuts:
        if rest:
            pieces.append(TextDelta(rest[:cut]))
            rest = rest[cut:]

    class Parser(OutputParser):
        """Gives prepared pieces of text, one per token."""

        def push(self, token_id: int) -> list[Event]:
            return [pieces[token_id]]

    events = stream(iter(range(len(pieces))), Parser(SMALL), stops)
    assert (collect(events).content or "") == _stopped_at_once(text, stops)


# --- the whole reply -------------------------------------------------------------------------


def test_the_collected_message_is_ready_for_the_next_turn() -> None:
    parsed = reply(f"<think>why</think>b{CALL}{END}")
    function = {"name": "f", "arguments": '{"a": "stop"}'}
    assert parsed.message == {
        "role": "assistant",
        "content": "b",
        "reasoning_content": "why",
        "tool_calls": [{"id": "functions.f:0", "type": "function", "function": function}],
    }
    result = {"role": "tool", "tool_call_id": "functions.f:0", "content": "ok"}
    prompt = render([{"role": "user", "content": "hi"}, parsed.message, result], None, SMALL)
    assert "<think>why</think>b" in SMALL.decode(prompt)


def test_an_empty_reply_is_a_message_with_no_content() -> None:
    assert reply(END).message == {"role": "assistant", "content": None}


def test_events_without_an_end_were_cancelled() -> None:
    parsed = collect([PromptProgress(1, 2), ReasoningDelta("a"), TextDelta("b")])
    assert parsed == Reply("a", "b", [], Finished("cancelled"))


def test_a_call_that_was_never_closed_keeps_the_arguments_that_came() -> None:
    events = [ToolCallStart(0, "functions.f:0", "f"), ToolCallArguments(0, '{"a"')]
    assert collect(events).tool_calls[0]["function"]["arguments"] == '{"a"'
    closed = collect([*events, ToolCallEnd(0, '{"a"')])
    assert closed.tool_calls == collect(events).tool_calls


def test_rates_of_usage() -> None:
    usage = Usage(
        prompt_tokens=110,
        cached_tokens=10,
        completion_tokens=21,
        prefill_seconds=2.0,
        decode_seconds=4.0,
    )
    assert usage.prefill_tokens_per_second == 50.0
    assert usage.decode_tokens_per_second == 5.0
    assert Usage().prefill_tokens_per_second == 0.0
    assert Usage().decode_tokens_per_second == 0.0

"""From tokens to a finished reply: stop strings, reasons, cancelling, and the collected message."""

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridk2.chat.events import (
    Event,
    Finished,
    PromptProgress,
    ReasoningDelta,
    TextDelta,
    TokenScored,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    Usage,
)
from hybridk2.chat.generation import PlainTextParser, Reply, ReplyParser, ReplyStream, collect
from hybridk2.chat.parser import EndReason, OutputParser
from hybridk2.chat.template import render
from hybridk2.errors import RequestError
from tests.small_vocabulary import small_tokenizer

SMALL = small_tokenizer()
END = "<|im_end|>"
CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>f:0<|tool_call_argument_begin|>"
    '{"a": "stop"}<|tool_call_end|><|tool_calls_section_end|>'
)


def events_of(
    written: str | Iterable[int],
    stop_strings: Sequence[str] = (),
    reason: EndReason = "length",
    parser: ReplyParser | None = None,
) -> list[Event]:
    """Push token by token until the reply has ended, as an engine does."""
    ids = SMALL.encode_with_control(written) if isinstance(written, str) else written
    stream = ReplyStream(parser or OutputParser(SMALL), stop_strings)
    events: list[Event] = []
    for token_id in ids:
        events += stream.push(token_id)
        if stream.ended:
            break
    return events + stream.finish(reason)


def reply(written: str, stop_strings: Sequence[str] = ()) -> Reply:
    return collect(events_of(written, stop_strings))


# --- why it ended ----------------------------------------------------------------------------


def test_a_message_that_the_model_ends_finishes_with_stop() -> None:
    assert reply(f"<think>a</think>b{END}") == Reply("a", "b", [], Finished("stop"))


def test_tokens_that_run_out_finish_with_what_ended_them() -> None:
    assert reply("<think>a</think>b").finish.reason == "length"
    reasons: tuple[EndReason, ...] = ("stop", "length", "cancelled")
    for reason in reasons:
        assert collect(events_of("b", reason=reason)).finish.reason == reason


def test_a_complete_reply_with_a_call_finishes_with_tool_calls() -> None:
    assert reply(CALL + END).finish.reason == "tool_calls"
    assert reply(CALL).finish.reason == "length"
    assert collect(events_of(CALL, reason="stop")).finish.reason == "tool_calls"


def test_a_reply_has_ended_at_the_message_s_end_and_not_before() -> None:
    stream = ReplyStream(OutputParser(SMALL))
    ended = []
    for token_id in SMALL.encode_with_control(f"ab{END}"):
        stream.push(token_id)
        ended.append(stream.ended)
    assert ended == [False, False, True]


def test_the_end_carries_what_the_reply_cost() -> None:
    stream = ReplyStream(OutputParser(SMALL), ["b"])
    usage = Usage(prompt_tokens=3)
    assert stream.push(ord("b")) == []
    assert stream.finish("cancelled", usage) == [Finished("stop", usage, "b")]


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


def test_a_reply_has_ended_once_a_stop_string_is_complete() -> None:
    stream = ReplyStream(OutputParser(SMALL), ["STOP"])
    events: list[Event] = []
    for token_id in SMALL.encode("abSTO"):
        events += stream.push(token_id)
    assert not stream.ended
    events += stream.push(ord("P"))
    assert stream.ended
    assert collect([*events, *stream.finish("length")]) == Reply(
        "", "ab", [], Finished("stop", stop_string="STOP")
    )


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
        ReplyStream(OutputParser(SMALL), ["x", ""])


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

    events = events_of(range(len(pieces)), stops, parser=Parser(SMALL))
    assert (collect(events).content or "") == _stopped_at_once(text, stops)


# --- scores ----------------------------------------------------------------------------------


def scored_events(parser: ReplyParser, written: str, stops: Sequence[str] = ()) -> list[Event]:
    stream = ReplyStream(parser, stops)
    events: list[Event] = []
    for token_id in SMALL.encode_with_control(written):
        score = TokenScored(token_id, SMALL.token_bytes(token_id), -1.0)
        events += stream.push(token_id, score)
        if stream.ended:
            break
    return events + stream.finish("length")


def scored_bytes(events: Iterable[Event]) -> bytes:
    return b"".join(event.text_bytes for event in events if isinstance(event, TokenScored))


def test_only_tokens_of_the_visible_text_are_scored() -> None:
    events = scored_events(OutputParser(SMALL), f"<think>why</think>é<|im_middle|>b{CALL}{END}")
    assert scored_bytes(events) == "éb".encode()


def test_scores_come_before_the_delta_that_their_text_begins_in() -> None:
    events = scored_events(OutputParser(SMALL), f"x st\u4f60ab{END}", ["stop"])
    shown = 0
    for number, event in enumerate(events):
        if isinstance(event, TextDelta):
            shown += len(event.text.encode())
            assert len(scored_bytes(events[:number])) >= shown
    assert scored_bytes(events) == "x st\u4f60ab".encode()


def test_tokens_of_a_stop_string_are_not_scored() -> None:
    events = scored_events(OutputParser(SMALL), "abSTOPcd", ["STOP"])
    assert scored_bytes(events) == b"ab"


# --- completions -----------------------------------------------------------------------------


def test_a_completion_is_all_text_without_the_tokens_that_frame_messages() -> None:
    written = f"a<think>b</think>{CALL}<|im_middle|>[BOS]c{END}"
    expected = written.replace("<|im_middle|>", "").replace("[BOS]", "").replace(END, "")
    events = scored_events(PlainTextParser(SMALL), written)
    assert collect(events).content == expected
    assert scored_bytes(events).decode() == expected


def test_a_character_that_a_completion_was_cut_off_in_is_dropped() -> None:
    ids = SMALL.encode("a\u4f60")[:-1]
    for reason, shown in (("length", "a"), ("stop", "a\ufffd")):
        events = events_of(ids, reason=reason, parser=PlainTextParser(SMALL))  # type: ignore[arg-type]
        assert collect(events) == Reply("", shown, [], Finished(reason))  # type: ignore[arg-type]


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

"""The output parser: what the model should write, every known way in which it does not, noise."""

import re
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridk2.chat.events import (
    Event,
    Finished,
    ReasoningDelta,
    ReasoningEnd,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from hybridk2.chat.generation import Reply, collect
from hybridk2.chat.parser import EndReason, OutputParser
from hybridk2.chat.template import render
from hybridk2.errors import TokenizerError
from hybridk2.tokenizer import PUBLISHED_CONTROL_TOKENS, Tokenizer
from tests.small_vocabulary import BASE_TOKENS, small_tokenizer

SMALL = small_tokenizer()
BASE = SMALL.base_size

SECTION = "<|tool_calls_section_begin|>"
SECTION_END = "<|tool_calls_section_end|>"
CALL = "<|tool_call_begin|>"
ARGUMENTS = "<|tool_call_argument_begin|>"
CALL_END = "<|tool_call_end|>"
END = "<|im_end|>"
SINGULAR = "<|tool_call_section_begin|>"
SINGULAR_END = "<|tool_call_section_end|>"


def tool(name: str, *arguments: str, required: tuple[str, ...] = ()) -> dict[str, Any]:
    parameters = {
        "properties": {argument: {} for argument in arguments},
        "required": list(required),
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def parse_ids(ids: list[int], reason: EndReason = "length", **options: Any) -> list[Event]:
    parser = OutputParser(SMALL, **options)
    events = [event for token_id in ids for event in parser.push(token_id)]
    return [*events, *parser.finish("stop" if parser.ended else reason)]


def parse(written: str, reason: EndReason = "length", **options: Any) -> list[Event]:
    """Parse what the model wrote, names of control tokens in it being control tokens."""
    return parse_ids(SMALL.encode_with_control(written), reason, **options)


def reply(written: str, reason: EndReason = "length", **options: Any) -> Reply:
    return collect(parse(written, reason, **options))


def calls(parsed: Reply) -> list[tuple[str, str, str]]:
    return [
        (call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in parsed.tool_calls
    ]


# --- as it should be -------------------------------------------------------------------------


def test_reasoning_then_text() -> None:
    parsed = reply(f"<think>Let me think.</think>Hello you.{END}")
    assert parsed == Reply("Let me think.", "Hello you.", [], Finished("stop"))


def test_events_stream_in_order() -> None:
    written = f'<think>he</think>in{SECTION}{CALL}functions.f:0{ARGUMENTS}{{"a":1}}{CALL_END}'
    assert parse(f"{written}{SECTION_END}{END}") == [
        ReasoningDelta("he"),
        ReasoningEnd(),
        TextDelta("in"),
        ToolCallStart(0, "functions.f:0", "f"),
        *(ToolCallArguments(0, character) for character in '{"a":1}'),
        ToolCallEnd(0, '{"a":1}'),
        Finished("tool_calls"),
    ]


def test_several_calls_in_a_section_and_several_sections() -> None:
    def section(*names: str) -> str:
        inner = "".join(f'{CALL}functions.{n}:7{ARGUMENTS}{{"{n}":0}}{CALL_END}' for n in names)
        return f"{SECTION}{inner}{SECTION_END}"

    parsed = reply(f"<think></think>{section('f', 'g')}{section('h')}{END}")
    assert calls(parsed) == [
        ("functions.f:0", "f", '{"f":0}'),
        ("functions.g:1", "g", '{"g":0}'),
        ("functions.h:2", "h", '{"h":0}'),
    ]
    assert parsed.finish.reason == "tool_calls"
    assert parsed.content is None


def test_ids_count_on_from_the_history_and_indices_do_not() -> None:
    written = f"{SECTION}{CALL}f:0{ARGUMENTS}{{}}{CALL_END}{CALL}f:1{ARGUMENTS}{{}}{CALL_END}"
    events = parse(f"{written}{SECTION_END}{END}", tool_calls_in_history=5)
    starts = [event for event in events if isinstance(event, ToolCallStart)]
    assert starts == [
        ToolCallStart(0, "functions.f:5", "f"),
        ToolCallStart(1, "functions.f:6", "f"),
    ]


def test_a_reply_in_a_tool_run_renders_back_to_the_tokens_that_were_generated() -> None:
    user = {"role": "user", "content": "hi"}
    prompt = render([user], None, SMALL)
    written = (
        f'<think> in\n\n</think>\n he{SECTION}{CALL}functions.f:0{ARGUMENTS}{{"a": 1}}{CALL_END}'
    )
    generated = SMALL.encode_with_control(f"{written}{SECTION_END}{END}")
    history = [user, collect(parse_ids(generated)).message]
    assert render(history, None, SMALL, add_generation_prompt=False) == prompt + generated


def test_counts_for_usage() -> None:
    parser = OutputParser(SMALL)
    for token_id in SMALL.encode_with_control(
        f"<think>hello</think>hellohello{SECTION}{CALL}x{END}"
    ):
        parser.push(token_id)
    assert parser.reasoning_tokens == 3
    assert parser.text_tokens == len(SMALL.encode("hellohello"))
    assert parser.completion_tokens == 3 + parser.text_tokens + 4


# --- reasoning -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "reasoning", "content"),
    [
        ("Hello.", "", "Hello."),  # no thought at all
        ("<think></think>Hello.", "", "Hello."),
        ("<think>\n \n</think>Hello.", "", "Hello."),
        ("\n <think>a</think>Hello.", "a", "Hello."),
        ("<think><think>a</think>b", "a", "b"),
        ("<think>a<think>b</think>c", "ab", "c"),
        ("<think>a</think></think>b", "a", "b"),
        ("<think>a", "a", None),  # never closed: all of it is thought
        ("<think>a</think>b<think>c</think>d", "ac", "bd"),
        ("<think>a</think>\n\n", "a", None),  # white space alone is no text
        ("<think>a</think>\n\nb \n", "a", "\n\nb \n"),  # and otherwise stays as written
        ("a</think>b", "", "ab"),
        ("", "", None),
    ],
)
@pytest.mark.parametrize("end", [END, ""])
def test_thought_and_text_are_told_apart(
    written: str, reasoning: str, content: str | None, end: str
) -> None:
    parsed = reply(written + end)
    assert (parsed.reasoning, parsed.content, parsed.tool_calls) == (reasoning, content, [])
    assert parsed.finish.reason == ("stop" if end else "length")


@pytest.mark.parametrize("written", ["<think>a", "<think>", f"<think>a{SECTION}", f"<think>{CALL}"])
def test_every_thought_is_ended_by_an_event(written: str) -> None:
    assert parse(written).count(ReasoningEnd()) == 1


def test_a_reply_without_thought_has_no_end_of_thought() -> None:
    assert ReasoningEnd() not in parse(f"Hello{END}")


# --- tool sections ---------------------------------------------------------------------------

ONE_CALL = f'{CALL}functions.f:0{ARGUMENTS}{{"a":1}}{CALL_END}'
EXPECTED_CALL = [("functions.f:0", "f", '{"a":1}')]


@pytest.mark.parametrize(
    ("written", "reasoning", "content"),
    [
        (f"<think>a{SECTION}{ONE_CALL}{SECTION_END}{END}", "a", None),  # thought left open
        (f"{SECTION}{ONE_CALL}{SECTION_END}{END}", "", None),  # straight to the section
        (f"b{SECTION}{ONE_CALL}{SECTION_END}{END}", "", "b"),
        (f"<think>a</think>b{SECTION}\nx{ONE_CALL}y{SECTION_END}z{END}", "a", "b"),
        (f"<think>a</think>{SECTION}{ONE_CALL}{SECTION_END}<think>z</think>z{END}", "a", None),
        (f"<think>a</think>{ONE_CALL}{END}", "a", None),  # no section markers
        (f"<think>a{ONE_CALL}{END}", "a", None),
        (f"<think>a</think>{SECTION}{ONE_CALL}{END}", "a", None),
        (
            f"<think>a</think>{SECTION}{ONE_CALL.removesuffix(CALL_END)}{SECTION_END}{END}",
            "a",
            None,
        ),
        (f"<think>a</think>{SECTION}{ONE_CALL.removesuffix(CALL_END)}{END}", "a", None),
        (f"b{SECTION}{SECTION}{ONE_CALL}{SECTION_END}{SECTION_END}{END}", "", "b"),
        (f"b{SECTION}{SECTION_END}b{SECTION}{ONE_CALL}{END}", "", "bb"),
        (f"b{SECTION}{ONE_CALL}{CALL_END}{ARGUMENTS}{SECTION_END}{END}", "", "b"),
    ],
)
def test_a_call_is_found_however_its_surroundings_are_broken(
    written: str, reasoning: str, content: str | None
) -> None:
    parsed = reply(written)
    assert calls(parsed) == EXPECTED_CALL
    assert (parsed.reasoning, parsed.content) == (reasoning, content)
    assert parsed.finish.reason == "tool_calls"


@pytest.mark.parametrize("begin", [SINGULAR, SINGULAR + " \n", SECTION])
@pytest.mark.parametrize("end", [SINGULAR_END, SECTION_END, SINGULAR_END + "\n", ""])
@pytest.mark.parametrize("call", [ONE_CALL, ONE_CALL.removesuffix(CALL_END)])
@pytest.mark.parametrize("before", ["<think>he", "<think>he</think>", "he"])
def test_section_markers_spelled_out_in_letters_never_show(
    begin: str, end: str, call: str, before: str
) -> None:
    ids = [
        *SMALL.encode_with_control(before),
        *SMALL.encode(begin),
        *SMALL.encode_with_control(call),
        *SMALL.encode(end),
        SMALL.control.im_end,
    ]
    parsed = collect(parse_ids(ids))
    assert calls(parsed) == EXPECTED_CALL
    assert (parsed.reasoning or parsed.content) == "he"


def test_a_section_marker_the_model_writes_about_is_text() -> None:
    for marker in (SINGULAR, SECTION):
        text = f"The marker {marker} opens, <|tool_call is cut and {SINGULAR_END} closes."
        ids = SMALL.encode(text)
        assert collect(parse_ids(ids)).content == text
        arguments = [
            *SMALL.encode_with_control(f"{CALL}f:0{ARGUMENTS}"),
            *SMALL.encode(text),
            SMALL.control.tool_call_end,
        ]
        assert calls(collect(parse_ids(arguments))) == [("functions.f:0", "f", text)]


def test_a_vocabulary_that_names_the_singular_markers_is_understood() -> None:
    names = {BASE + offset: name for offset, name in PUBLISHED_CONTROL_TOKENS.items()}
    tokenizer = Tokenizer(BASE_TOKENS, names | {BASE + 30: SINGULAR, BASE + 31: SINGULAR_END})
    parser = OutputParser(tokenizer)
    written = f"<think>a{SINGULAR}{ONE_CALL.removesuffix(CALL_END)}{SINGULAR_END}b{END}"
    events = [e for i in tokenizer.encode_with_control(written) for e in parser.push(i)]
    parsed = collect([*events, *parser.finish("stop")])
    assert calls(parsed) == EXPECTED_CALL
    assert (parsed.reasoning, parsed.content) == ("a", None)


@pytest.mark.parametrize(
    ("written_id", "name"),
    [
        ("functions.get_weather:0", "get_weather"),
        ("get_weather:0", "get_weather"),
        ("get_weather", "get_weather"),
        ("functions.get_weather", "get_weather"),
        ("get_weather:", "get_weather"),
        ("\nfunctions.get_weather:0\n", "get_weather"),
        ("functions.\nget_weather :12", "get_weather"),
        ("functions.get-weather.v2:3", "get-weather.v2"),
        ("functions.ns:tool:3", "ns:tool"),
        ("functions.functions.f:0", "functions.f"),
        ("functions.天气:0", "天气"),
    ],
)
def test_the_name_is_read_from_every_form_of_id(written_id: str, name: str) -> None:
    parsed = reply(f"{SECTION}{CALL}{written_id}{ARGUMENTS}{{}}{CALL_END}{SECTION_END}{END}")
    assert calls(parsed) == [(f"functions.{name}:0", name, "{}")]


@pytest.mark.parametrize("written_id", ["3", "functions.3", "functions.:3", ":3", "", "\n", " 3 "])
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ('{"city": "Rome", "days": 2}', "forecast"),
        ('{"city": "Rome"}', "weather"),
        ('{"city": "Rome", "zone": 1}', "forecast"),  # fits none; one in common, one to spare
        ('{"path": "/"}', "list_files"),
        ("", "now"),
        ("{}", "now"),
        ('{"colour": 1}', "unknown"),
        ("[1", "unknown"),
        ("[" * 100_000, "unknown"),
    ],
)
def test_a_bare_counter_is_named_after_the_tool_its_arguments_fit(
    written_id: str, arguments: str, name: str
) -> None:
    tools = [
        tool("forecast", "city", "days", required=("city", "days")),
        tool("weather", "city", "units", "language", required=("city",)),
        tool("list_files", "path"),
        tool("now"),
    ]
    written = f"{SECTION}{CALL}{written_id}{ARGUMENTS}{arguments}{CALL_END}{SECTION_END}{END}"
    events = parse(written, tools=tools, tool_calls_in_history=2)
    assert calls(collect(events)) == [(f"functions.{name}:2", name, arguments or "{}")]
    assert isinstance(events[0], ToolCallStart)


def test_an_unfinished_character_in_an_id_stays_in_the_id() -> None:
    control = SMALL.control
    ids = [control.tool_call_begin, ord("f"), 0xF0, control.tool_call_argument_begin]
    parsed = collect(parse_ids([*ids, ord("1"), control.tool_call_end]))
    assert calls(parsed) == [("functions.f\ufffd:0", "f\ufffd", "1")]


def test_a_bare_counter_means_the_only_tool_there_is_and_streams() -> None:
    events = parse(f'{CALL}0{ARGUMENTS}{{"a":1}}', tools=[tool("weather", "city")])
    assert events[0] == ToolCallStart(0, "functions.weather:0", "weather")
    assert events[1] == ToolCallArguments(0, "{")


def test_a_bare_counter_without_tools_is_still_a_call() -> None:
    parsed = reply(f"{CALL}3{ARGUMENTS}{{}}{CALL_END}{END}")
    assert calls(parsed) == [("functions.unknown:0", "unknown", "{}")]


def test_schemas_nobody_checked_do_not_break_the_guess() -> None:
    odd: list[Any] = [None, 3, [], {"properties": 3, "required": 3}, {"required": [{}, 3]}]
    tools = [{"function": {"name": f"t{i}", "parameters": p}} for i, p in enumerate(odd)]
    parsed = reply(f'{CALL}3{ARGUMENTS}{{"a":1}}{CALL_END}{END}', tools=tools)
    assert calls(parsed) == [("functions.unknown:0", "unknown", '{"a":1}')]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (f"{CALL}f:0{ARGUMENTS}{CALL_END}{END}", [("functions.f:0", "f", "{}")]),
        (f"{CALL}f:0{ARGUMENTS} \n {CALL_END}{END}", [("functions.f:0", "f", "{}")]),
        (f"{CALL}f:0{CALL_END}{END}", [("functions.f:0", "f", "{}")]),
        (f'{CALL}f:0 {{"a":1}} {CALL_END}{END}', [("functions.f:0", "f", '{"a":1}')]),
        (f"{CALL}{CALL_END}{END}", []),
        (
            f"{CALL}f:0{CALL}g:1{ARGUMENTS}{{}}{CALL}h{END}",
            [
                ("functions.f:0", "f", "{}"),
                ("functions.g:1", "g", "{}"),
                ("functions.h:2", "h", "{}"),
            ],
        ),
        (f'{CALL}f:0{ARGUMENTS}\n {{"a": " b "}} \n{CALL_END}{END}', None),
    ],
)
def test_arguments_are_trimmed_and_never_missing(
    written: str, expected: list[tuple[str, str, str]] | None
) -> None:
    expected = [("functions.f:0", "f", '{"a": " b "}')] if expected is None else expected
    assert calls(reply(written)) == expected


# --- cut off ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["length", "cancelled"])
def test_a_call_that_is_cut_off_keeps_its_part_and_the_reason(reason: EndReason) -> None:
    parsed = reply(f'{SECTION}{CALL}f:0{ARGUMENTS}{{"a": ', reason)
    assert calls(parsed) == [("functions.f:0", "f", '{"a":')]
    assert parsed.finish.reason == reason


def test_a_call_that_is_cut_off_before_its_arguments_does_not_pass_for_one_without() -> None:
    assert calls(reply(f"{SECTION}{CALL}f:0{ARGUMENTS}")) == [("functions.f:0", "f", "")]
    assert calls(reply(f"{SECTION}{CALL}functions.get_wea")) == []


def test_an_unfinished_character_is_dropped_when_cut_off_and_shown_when_written() -> None:
    ids = [ord("a"), 0xF0, 0x9F]
    assert collect(parse_ids(ids)).content == "a"
    assert collect(parse_ids([*ids, SMALL.control.im_end])).content == "a\ufffd"


def test_a_shorter_budget_gives_a_prefix() -> None:
    ids = SMALL.encode_with_control(
        f"<think>é👩‍👩‍👧</think>\n\nhello 👩‍👩‍👧 <|tool_call b{SINGULAR} c{END}"
    )
    whole = collect(parse_ids(ids))
    for budget in range(len(ids)):
        part = collect(parse_ids(ids[:budget]))
        assert whole.reasoning.startswith(part.reasoning)
        assert (whole.content or "").startswith(part.content or "")


def test_nothing_comes_after_the_end() -> None:
    parser = OutputParser(SMALL)
    parser.push(SMALL.control.im_end)
    assert parser.ended
    assert parser.push(ord("a")) == []
    assert parser.finish("stop") == [Finished("stop")]
    assert parser.finish("stop") == []


@pytest.mark.parametrize(
    "header", ["<|im_user|>", "<|im_assistant|>", "<|im_system|>", "[EOS]", "[EOT]"]
)
def test_the_header_of_another_message_ends_this_one(header: str) -> None:
    parsed = reply(f"a{header}user<|im_middle|>b")
    assert (parsed.content, parsed.finish.reason) == ("a", "stop")


# --- noise -----------------------------------------------------------------------------------


def test_control_tokens_out_of_place_never_show() -> None:
    strays = f"[BOS][PAD][UNK]<|im_middle|><|media_pad|></think>{ARGUMENTS}{CALL_END}{SECTION_END}"
    stray_ids = [*SMALL.encode_with_control(strays), *SMALL.unmapped_ids]
    ids = [*stray_ids, ord("a"), *stray_ids, ord("b"), *stray_ids]
    assert collect(parse_ids(ids)).content == "ab"


@pytest.mark.parametrize("token_id", [-1, SMALL.vocab_size])
def test_ids_outside_the_vocabulary_are_refused(token_id: int) -> None:
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        OutputParser(SMALL).push(token_id)


@pytest.mark.parametrize("piece", ["a", " ", "<", "hello"])
def test_an_argument_token_costs_the_same_late_as_early(piece: str) -> None:
    # Counted, not timed: lines of Python that each token runs.
    parser = OutputParser(SMALL)
    opening = SMALL.encode_with_control(f"{SECTION}{CALL}f:0{ARGUMENTS}{{")
    body = SMALL.encode(piece) * (8_000 // len(piece))
    for token_id in opening:
        parser.push(token_id)
    lines = [lines_run(lambda token_id=token_id: parser.push(token_id)) for token_id in body]
    assert max(lines[-1000:]) <= max(lines[:1000])
    assert sum(lines[-1000:]) <= 1.01 * sum(lines[:1000])


def lines_run(call: Callable[[], object]) -> int:
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.soak
def test_a_megabyte_of_arguments_costs_linear_time() -> None:
    def seconds(size: int, piece: str) -> float:
        opening = SMALL.encode_with_control(f"{SECTION}{CALL}f:0{ARGUMENTS}{{")
        body = SMALL.encode(piece) * (size // len(piece))
        started = time.process_time()
        parsed = collect(parse_ids([*opening, *body, ord("}"), SMALL.control.tool_call_end]))
        elapsed = time.process_time() - started
        assert (
            len(parsed.tool_calls[0]["function"]["arguments"])
            == len(body) * len(piece) // len(SMALL.encode(piece)) + 2
        )
        return elapsed

    # Eight times the work: eight times the time. Quadratic would be 64 times. The best of five
    # each, since a busy machine only ever adds.
    for piece in ("a", " ", "<", "hello"):
        small, large = (min(seconds(size, piece) for _ in range(5)) for size in (64_000, 512_000))
        assert large < 24 * small, piece


def _check_grammar(events: list[Event]) -> None:
    """Deltas are not empty, thoughts and calls are closed, Finished comes once and last."""
    thinking, open_call, num_calls, arguments = False, None, 0, ""
    assert [type(event) for event in events].count(Finished) == 1
    assert isinstance(events[-1], Finished)
    for event in events[:-1]:
        match event:
            case ReasoningDelta(text):
                assert text
                assert num_calls == 0
                thinking = True
            case ReasoningEnd():
                thinking = False
            case TextDelta(text):
                assert text
                assert not thinking
                assert num_calls == 0
            case ToolCallStart(index, call_id, name):
                assert not thinking
                assert open_call is None
                assert index == num_calls
                assert call_id == f"functions.{name}:{index}"
                assert name
                open_call, arguments, num_calls = index, "", num_calls + 1
            case ToolCallArguments(index, text):
                assert index == open_call
                assert text
                arguments += text
            case ToolCallEnd(index, whole):
                assert index == open_call
                assert whole == arguments
                open_call = None
    assert not thinking
    assert open_call is None


_CONTROL_IDS = st.sampled_from(
    [SMALL.control_id(name) for name in PUBLISHED_CONTROL_TOKENS.values()]
    + list(SMALL.unmapped_ids[:2])
)
# The tokens that carry the structure, without those that end the message at once.
_STRUCTURE_IDS = st.sampled_from(
    SMALL.encode_with_control(
        "<think></think><|tool_calls_section_begin|><|tool_calls_section_end|><|tool_call_begin|>"
        "<|tool_call_argument_begin|><|tool_call_end|><|tool_call_begin|><|media_pad|>"
    )
)
_TEXT_IDS = st.integers(0, BASE - 1).filter(lambda i: b"<" not in BASE_TOKENS[i])
_WORDS = st.sampled_from(
    [
        " ",
        "\n",
        "a",
        "f:0",
        "{",
        "}",
        "é",
        "👩",
        "<",
        "<|tool_call",
        SINGULAR,
        SINGULAR_END,
        SECTION,
    ]
).flatmap(lambda word: st.just(SMALL.encode(word)))
_PIECES = st.lists(st.one_of(_WORDS, _STRUCTURE_IDS.map(lambda i: [i])), max_size=40)
_REASONS = st.sampled_from(["length", "cancelled", "stop"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(_TEXT_IDS, _CONTROL_IDS, _STRUCTURE_IDS)), _REASONS)
def test_no_sequence_of_tokens_breaks_the_parser_or_shows_a_control_token(
    ids: list[int], reason: EndReason
) -> None:
    events = parse_ids(ids, reason, tools=[tool("f", "a"), tool("g", "b")])
    _check_grammar(events)
    shown = "".join(getattr(event, "text", "") for event in events)
    assert "<" not in shown
    assert "[EOS]" not in shown


@settings(max_examples=300, deadline=None)
@given(_PIECES, _REASONS)
def test_the_reply_does_not_depend_on_how_text_is_cut_into_tokens(
    pieces: list[list[int]], reason: EndReason
) -> None:
    ids = [token_id for piece in pieces for token_id in piece]
    one_byte_each = [
        byte_id
        for token_id in ids
        for byte_id in (SMALL.token_bytes(token_id) if token_id < BASE else [token_id])
    ]
    events = parse_ids(ids, reason)
    _check_grammar(events)
    assert collect(events) == collect(parse_ids(one_byte_each, reason))


def _cut_at_once(ids: list[int]) -> tuple[str, str | None]:
    """Reasoning and text of a reply without calls, from whole runs: another way to the same."""
    control = SMALL.control
    switches = {
        ("text", control.think): "thought",
        ("thought", control.end_think): "text",
        ("text", control.tool_calls_section_begin): "section",
        ("thought", control.tool_calls_section_begin): "section",
        ("section", control.tool_calls_section_end): "text",
    }
    runs = [("text", b"")]
    for token_id in ids:
        kind, raw = runs[-1]
        if token_id < BASE:
            runs[-1] = (kind, raw + SMALL.token_bytes(token_id))
        elif (kind, token_id) in switches:
            runs.append((switches[kind, token_id], b""))
    shown = {"thought": "", "text": "", "section": ""}
    spelled = f"({re.escape(SINGULAR)}|{re.escape(SECTION)})\\s{{0,64}}$"
    for (kind, raw), (next_kind, _) in zip(runs, [*runs[1:], ("section", b"")], strict=True):
        text = raw.decode("utf-8", "replace")
        if next_kind == "section":
            text = re.sub(spelled, "", text)
        shown[kind] += text if text.strip() else ""
    return shown["thought"], shown["text"] or None


_PIECES_WITHOUT_CALLS = st.lists(
    st.one_of(
        _WORDS,
        st.integers(128, 255).map(lambda byte: [byte]),
        st.sampled_from(
            SMALL.encode_with_control(f"<think></think>{SECTION}{SECTION_END}<|media_pad|>")
        ).map(lambda token_id: [token_id]),
    ),
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(_PIECES_WITHOUT_CALLS)
def test_the_streamed_reply_equals_the_reply_cut_at_once(pieces: list[list[int]]) -> None:
    ids = [token_id for piece in pieces for token_id in piece]
    parsed = collect(parse_ids(ids, "stop"))
    assert (parsed.reasoning, parsed.content) == _cut_at_once(ids)

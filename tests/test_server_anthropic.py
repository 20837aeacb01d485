"""Anthropic's Messages API: requests to conversations, replies to typed events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

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
from hybridk2.chat.template import render_text
from hybridk2.errors import ChatError, EngineError
from hybridk2.server.anthropic.reply import MessageEvents, whole_message
from hybridk2.server.anthropic.request import (
    CountTokensRequest,
    MessagesRequest,
    Thinking,
    read_conversation,
)
from hybridk2.server.carried_reasoning import carried, carry
from hybridk2.server.conversation import Conversation
from tests.scripted_assistant import USAGE, calls, says

WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    "cache_control": {"type": "ephemeral"},
}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Rome"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"}


def conversation(*messages: dict[str, Any], **fields: Any) -> Conversation:
    request = {"model": "k2", "messages": list(messages), **fields}
    return read_conversation(CountTokensRequest.model_validate(request))


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def stream(events: list[Any], thinking: Thinking | None = None) -> list[dict[str, Any]]:
    reply = MessageEvents("k2", USAGE.prompt_tokens, thinking)
    return [*reply.start(), *(sent for event in events for sent in reply.push(event))]


# ---------------------------------------------------------------------------- requests


def test_text_and_blocks_of_text_mean_the_same() -> None:
    blocks = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert conversation(user("hi")) == conversation(user(blocks))
    assert conversation(user("hi")).messages == [{"role": "user", "content": "hi"}]


def test_a_system_prompt_comes_first_and_system_messages_stay_where_they_are() -> None:
    blocks = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    later = {"role": "system", "content": "Be kind."}
    for system in ("Be brief.", blocks):
        assert conversation(user("a"), later, user("b"), system=system).messages == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a"},
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "b"},
        ]


@pytest.mark.parametrize("version", ["cc_version=2.1.1.a; cch=1;", "cc_version=2.1.1.b; cch=2;"])
def test_the_line_that_changes_in_every_request_is_not_in_the_prompt(version: str) -> None:
    line = f"x-anthropic-billing-header: {version}"
    as_block = [{"type": "text", "text": line}, {"type": "text", "text": "You are Claude Code."}]
    inside = {"role": "system", "content": f"{line}\nYou are Claude Code."}
    expected = [
        {"role": "system", "content": "You are Claude Code."},
        {"role": "user", "content": "hi"},
    ]
    assert conversation(user("hi"), system=as_block).messages == expected
    assert conversation(user("hi"), system=inside["content"]).messages == expected
    assert conversation(inside, user("hi")).messages == expected


def test_what_a_user_says_of_that_line_stays() -> None:
    text = "x-anthropic-billing-header: what is this?"
    assert conversation(user(text)).messages == [{"role": "user", "content": text}]


def test_cache_control_does_not_alter_the_conversation() -> None:
    plain = {key: value for key, value in WEATHER.items() if key != "cache_control"}
    marked = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]
    assert conversation(user(marked), tools=[WEATHER]) == conversation(user("hi"), tools=[plain])


def test_a_strict_tool_stays_strict() -> None:
    for strict in (True, False):
        asked = conversation(user("hi"), tools=[{**WEATHER, "strict": strict}])
        assert asked.tools is not None
        assert asked.tools[0]["function"].get("strict", False) is strict


def test_a_tool_run_renders_with_ids_of_k2s_form() -> None:
    turns = [
        {"type": "thinking", "thinking": "I should look.", "signature": "of another server"},
        {"type": "text", "text": "Let me see."},
        CALL,
    ]
    asked = conversation(user("Rome?"), assistant(turns), user([RESULT]), tools=[WEATHER])
    text = render_text(asked.messages, asked.tools)
    assert (
        "<|im_assistant|>assistant<|im_middle|><think>I should look.</think>Let me see."
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        '<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|>'
        "<|im_end|><|im_system|>get_weather<|im_middle|>## Return of functions.get_weather:0\n"
        "sunny<|im_end|>"
    ) in text
    assert "toolu_1" not in text


def test_consecutive_assistant_messages_are_one_turn() -> None:
    thinking = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    whole = conversation(user("a"), assistant([thinking, CALL]), user([RESULT]))
    split = conversation(user("a"), assistant([thinking]), assistant([CALL]), user([RESULT]))
    assert whole == split


def test_results_and_texts_of_a_user_message_keep_their_order() -> None:
    text = {"type": "text", "text": "and tomorrow?"}
    messages = conversation(assistant([CALL]), user([RESULT, text])).messages
    assert [message["role"] for message in messages] == ["assistant", "tool", "user"]
    assert messages[1]["content"] == "sunny"


def test_the_text_of_a_failed_tool_says_so() -> None:
    failed = {**RESULT, "is_error": True, "content": [{"type": "text", "text": "no network"}]}
    assert conversation(assistant([CALL]), user([failed])).messages[1]["content"] == (
        "Error: no network"
    )


def test_thoughts_that_a_client_carried_without_showing_come_back() -> None:
    carried_block = {"type": "thinking", "thinking": "", "signature": carry("Hm, Rome.")}
    assert conversation(user("a"), assistant([carried_block, CALL])).messages[1][
        "reasoning_content"
    ] == ("Hm, Rome.")


@pytest.mark.parametrize("opaque", ["", "EqQBCg", "hybridk2:", "hybridk2:%%", "hybridk2:/w=="])
def test_opaque_reasoning_of_others_is_no_reasoning(opaque: str) -> None:
    assert carried(opaque) == ""


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, "auto"),
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "any"}, "required"),
        (
            {"type": "tool", "name": "get_weather"},
            {"type": "function", "function": {"name": "get_weather"}},
        ),
    ],
)
def test_every_tool_choice_has_its_meaning(choice: Any, expected: Any) -> None:
    asked = conversation(user("hi"), tools=[WEATHER], tool_choice=choice)
    assert asked.tool_choice == expected
    assert asked.parallel_tool_calls


def test_parallel_calls_can_be_forbidden() -> None:
    choice = {"type": "any", "disable_parallel_tool_use": True}
    assert not conversation(user("hi"), tools=[WEATHER], tool_choice=choice).parallel_tool_calls


def test_tools_that_only_anthropics_servers_can_run_are_left_out() -> None:
    search = {"type": "web_search_20250305", "name": "web_search"}
    assert conversation(user("hi"), tools=[search]).tools is None
    with pytest.raises(ChatError, match=r"tool_choice: .* not declared"):
        conversation(user("hi"), tools=[search], tool_choice={"type": "tool", "name": "web_search"})


def test_an_output_format_is_a_response_format() -> None:
    schema = {"type": "object"}
    output_config = {"effort": "low", "format": {"type": "json_schema", "schema": schema}}
    assert conversation(user("hi"), output_config=output_config).response_format == {
        "type": "json_schema",
        "json_schema": {"name": "output", "schema": schema},
    }


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (user([{"type": "image", "source": {}}]), r"messages\[0\].content\[0\]: .* text only"),
        (user([{"type": "document", "source": {}}]), "no documents"),
        (user([CALL]), r"messages\[0\].content\[0\].type"),
        (assistant([RESULT]), r"messages\[0\].content\[0\].type"),
        (user([{"type": "text"}]), r"messages\[0\].content\[0\].text"),
        (user([RESULT]), r"tool_use_id: no tool_use block"),
        (user([{"type": {"a": 1}}]), r"messages\[0\].content\[0\].type"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_place(message: dict[str, Any], said: str) -> None:
    with pytest.raises(ChatError, match=said):
        conversation(message)


def test_an_image_in_a_tool_result_is_refused_by_its_place() -> None:
    shown = {**RESULT, "content": [{"type": "image", "source": {}}]}
    with pytest.raises(ChatError, match=r"messages\[1\].content\[0\].content\[0\]: .* text only"):
        conversation(assistant([CALL]), user([shown]))


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": None},
        {"max_tokens": 2**63},
        {"temperature": 1.5},
        {"temperature": -0.1},
        {"top_p": 0},
        {"top_k": -1},
        {"stop_sequences": ["a"] * 5},
        {"stop_sequences": [""]},
        {"stop_sequences": ["a" * 257]},
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [user("hi"), assistant("The answer is")]},
        {"tools": [WEATHER] * 129},
        {"tools": [{**WEATHER, "name": "a" * 65}]},
        {"tools": [{"name": "f"}]},
        {"tools": [5]},
        {"tool_choice": {"type": "function"}},
        {"stream": "yes"},
    ],
)
def test_what_is_out_of_bounds_is_refused(fields: dict[str, Any]) -> None:
    good = {"model": "k2", "max_tokens": 5, "messages": [user("hi")]}
    MessagesRequest.model_validate(good)
    with pytest.raises(ValueError, match=next(iter(fields))):
        MessagesRequest.model_validate({**good, **fields})


# ---------------------------------------------------------------------------- replies

THOUGHT: list[Event] = [ReasoningDelta("I "), ReasoningDelta("think."), ReasoningEnd()]
TWO_CALLS: list[Event] = [
    *THOUGHT,
    TextDelta("See:"),
    ToolCallStart(0, "functions.get_weather:0", "get_weather"),
    ToolCallArguments(0, '{"city":'),
    ToolCallArguments(0, ' "Rome"}'),
    ToolCallEnd(0, '{"city": "Rome"}'),
    ToolCallStart(1, "functions.get_time:1", "get_time"),
    ToolCallArguments(1, "{}"),
    ToolCallEnd(1, "{}"),
    Finished("tool_calls", USAGE),
]


def test_a_stream_is_what_anthropics_own_types_describe() -> None:
    adapter = TypeAdapter(RawMessageStreamEvent)
    events = stream(TWO_CALLS)
    for event in events:
        adapter.validate_python(event, strict=True)
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    indices = [event["index"] for event in events if event["type"] == "content_block_start"]
    assert indices == [0, 1, 2, 3]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    kinds = [delta["type"] for delta in deltas]
    assert kinds[:4] == ["thinking_delta", "thinking_delta", "signature_delta", "text_delta"]


def test_the_whole_message_holds_what_was_streamed() -> None:
    message = whole_message(stream(TWO_CALLS))
    Message.model_validate(message, strict=True)
    kinds = [block["type"] for block in message["content"]]
    assert kinds == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, weather, clock = message["content"]
    assert thinking["thinking"] == "I think."
    assert thinking["signature"]
    assert text["text"] == "See:"
    assert (weather["name"], weather["input"]) == ("get_weather", {"city": "Rome"})
    assert (clock["name"], clock["input"]) == ("get_time", {})
    assert message["stop_reason"] == "tool_use"


def test_tool_ids_are_unique_and_of_the_form_that_anthropic_allows() -> None:
    ids = [
        block["id"]
        for _ in range(2)
        for block in whole_message(stream(TWO_CALLS))["content"]
        if block["type"] == "tool_use"
    ]
    assert len(set(ids)) == 4
    assert all(call_id.startswith("toolu_") and call_id[6:].isalnum() for call_id in ids)


def test_a_reply_comes_back_as_the_turn_that_it_was() -> None:
    message = whole_message(stream(TWO_CALLS))
    results = [
        {"type": "tool_result", "tool_use_id": block["id"], "content": block["name"]}
        for block in reversed(message["content"])
        if block["type"] == "tool_use"
    ]
    asked = conversation(user("?"), assistant(message["content"]), user(results), tools=[WEATHER])
    turn = asked.messages[1]
    assert turn["reasoning_content"] == "I think."
    assert turn["content"] == "See:"
    text = render_text(asked.messages, asked.tools)
    assert "get_time<|im_middle|>## Return of functions.get_time:1\nget_time<|im_end|>" in text
    assert "## Return of functions.get_weather:0\nget_weather<|im_end|>" in text


def test_cached_tokens_are_counted_apart() -> None:
    message = whole_message(stream(says("hello")))
    assert message["usage"] == {
        "input_tokens": USAGE.prompt_tokens - USAGE.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": USAGE.cached_tokens,
        "output_tokens": USAGE.completion_tokens,
        "output_tokens_details": {"thinking_tokens": USAGE.reasoning_tokens},
    }


@pytest.mark.parametrize(
    ("finished", "reason", "sequence"),
    [
        (Finished("stop", USAGE), "end_turn", None),
        (Finished("stop", USAGE, stop_string="END"), "stop_sequence", "END"),
        (Finished("length", USAGE), "max_tokens", None),
        (Finished("tool_calls", USAGE), "tool_use", None),
    ],
)
def test_every_end_has_its_stop_reason(
    finished: Finished, reason: str, sequence: str | None
) -> None:
    message = whole_message(stream([TextDelta("a"), finished]))
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)


def test_thinking_that_is_disabled_is_not_sent() -> None:
    events = stream([*THOUGHT, *says("9.9")], Thinking(type="disabled"))
    assert "think." not in json.dumps(events)
    assert whole_message(events)["content"] == [{"type": "text", "text": "9.9"}]


def test_thinking_that_is_omitted_is_carried_by_its_signature() -> None:
    events = stream([*THOUGHT, *says("9.9")], Thinking(type="adaptive", display="omitted"))
    block = whole_message(events)["content"][0]
    assert block["thinking"] == ""
    assert carried(block["signature"]) == "I think."
    assert not any(event.get("delta", {}).get("type") == "thinking_delta" for event in events)


def test_a_call_that_is_cut_off_closes_with_what_can_be_read_of_it() -> None:
    start = ToolCallStart(0, "functions.f:0", "f")
    cut = [start, ToolCallArguments(0, '{"a": 1, "b": [2, '), Finished("length", USAGE)]
    message = whole_message(stream(cut))
    assert message["content"][0]["input"] == {"a": 1, "b": [2]}
    assert message["stop_reason"] == "max_tokens"


def test_a_reply_that_was_given_up_is_an_error() -> None:
    with pytest.raises(EngineError, match="cut off"):
        stream([TextDelta("a"), Finished("cancelled", USAGE)])


def test_calls_alone_make_a_message_without_text() -> None:
    message = whole_message(stream(calls("get_weather", '{"city": "Rome"}')))
    assert [block["type"] for block in message["content"]] == ["tool_use"]

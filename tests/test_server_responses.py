"""OpenAI's Responses API: requests to conversations, replies to numbered events."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
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
from hybridk2.server.carried_reasoning import carry
from hybridk2.server.conversation import Conversation
from hybridk2.server.responses.reply import ResponseEvents
from hybridk2.server.responses.request import ResponsesRequest, read_conversation
from tests.scripted_assistant import USAGE, says

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
SHELL = {"type": "local_shell"}
CALL = {
    "type": "function_call",
    "call_id": "call_1",
    "name": "get_weather",
    "arguments": '{"city": "Rome"}',
}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}


def request(asked: Any = "hi", **fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"model": "k2", "input": asked, **fields})


def conversation(asked: Any = "hi", **fields: Any) -> Conversation:
    return read_conversation(request(asked, **fields))


def said(role: str, text: str, part: str = "input_text") -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": part, "text": text}]}


def stream(events: list[Any], **fields: Any) -> list[dict[str, Any]]:
    reply = ResponseEvents(request(**fields), "k2")
    return [*reply.start(), *(sent for event in events for sent in reply.push(event))]


# ---------------------------------------------------------------------------- requests


def test_a_text_and_an_item_with_that_text_mean_the_same() -> None:
    expected = [{"role": "user", "content": "hi"}]
    for asked in ("hi", [said("user", "hi")], [{"role": "user", "content": "hi"}]):
        assert conversation(asked).messages == expected


def test_instructions_come_first_and_developer_messages_stay_where_they_are() -> None:
    asked = [said("user", "a"), said("developer", "Be kind."), said("user", "b")]
    roles = [(m["role"], m["content"]) for m in conversation(asked, instructions="Do.").messages]
    assert roles == [("system", "Do."), ("user", "a"), ("developer", "Be kind."), ("user", "b")]


def test_a_tool_run_renders_as_one_turn_with_ids_of_k2s_form() -> None:
    reasoning = {
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": "not this"}],
        "content": [{"type": "reasoning_text", "text": "I should look."}],
    }
    items = [said("user", "Rome?"), reasoning, said("assistant", "Let me see.", "output_text")]
    asked = conversation([*items, CALL, OUTPUT], tools=[WEATHER])
    assert (
        "<|im_assistant|>assistant<|im_middle|><think>I should look.</think>Let me see."
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        '<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|>'
        "<|im_end|><|im_system|>get_weather<|im_middle|>## Return of functions.get_weather:0\n"
        "sunny<|im_end|>"
    ) in render_text(asked.messages, asked.tools)


def test_parallel_calls_are_one_turn_and_what_follows_them_is_the_next() -> None:
    second = {**CALL, "call_id": "call_2"}
    thought = {"type": "reasoning", "summary": [], "content": None}
    outputs = [OUTPUT, {**OUTPUT, "call_id": "call_2"}]
    messages = conversation([CALL, second, *outputs, thought, CALL]).messages
    assert [message["role"] for message in messages] == ["assistant", "tool", "tool", "assistant"]
    assert len(messages[0]["tool_calls"]) == 2
    unanswered = conversation([CALL, said("assistant", "Done.", "output_text")]).messages
    assert [message["content"] for message in unanswered] == ["", "Done."]


def test_reasoning_that_a_client_carried_encrypted_comes_back() -> None:
    item = {"type": "reasoning", "summary": [], "encrypted_content": carry("Hm, Rome.")}
    assert conversation([item, CALL]).messages[0]["reasoning_content"] == "Hm, Rome."
    foreign = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAABo"}
    assert conversation([foreign, CALL]).messages[0]["reasoning_content"] == ""


def test_outputs_may_be_lists_of_parts() -> None:
    output = {**OUTPUT, "output": [{"type": "input_text", "text": "sunny"}]}
    assert conversation([CALL, output]).messages[1]["content"] == "sunny"


def test_tools_of_unknown_types_are_ignored() -> None:
    odd = {"type": "namespace", "name": "with spaces", "parameters": 5}
    asked = conversation(tools=[SHELL, WEATHER, {"type": "web_search"}, odd])
    assert asked.tools is not None
    assert [tool["function"]["name"] for tool in asked.tools] == ["get_weather"]
    assert conversation(tools=[SHELL]).tools is None


def test_a_tool_is_declared_to_the_model_as_chat_completions_declare_it() -> None:
    declared = {"name": "get_weather", "description": "Weather of a city."}
    declared |= {"parameters": WEATHER["parameters"]}
    without_parameters = {"type": "function", "name": "now", "strict": True}
    assert conversation(tools=[WEATHER, without_parameters]).tools == [
        {"type": "function", "function": declared},
        {"type": "function", "function": {"name": "now", "strict": True}},
    ]


NAMED = {"type": "function", "name": "get_weather"}
CHAT_NAMED = {"type": "function", "function": {"name": "get_weather"}}


def allowed(mode: str, *tools: dict[str, str]) -> dict[str, Any]:
    return {"type": "allowed_tools", "mode": mode, "tools": list(tools)}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        (NAMED, CHAT_NAMED),
        (
            allowed("required", NAMED, SHELL),
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [CHAT_NAMED]},
            },
        ),
        (allowed("auto", SHELL), "none"),
    ],
)
def test_every_tool_choice_has_its_meaning_and_leaves_the_prompt_as_it_is(
    choice: Any, expected: Any
) -> None:
    asked = conversation(tools=[WEATHER], tool_choice=choice)
    assert asked.tool_choice == expected
    assert asked.messages == conversation().messages
    assert asked.tools == conversation(tools=[WEATHER]).tools


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        "any",
        NAMED,
        {"type": "web_search"},
        allowed("required", NAMED),
        {"type": "function"},
        {"type": "function", "name": ["get_weather"]},
        allowed("required", ["get_weather"]),  # type: ignore[arg-type]
    ],
)
def test_a_choice_that_no_declared_function_fulfils_is_refused(choice: Any) -> None:
    with pytest.raises(ChatError, match="tool_choice"):
        conversation(tools=[SHELL], tool_choice=choice)


def test_a_text_format_is_a_response_format() -> None:
    schema = {"type": "object"}
    strict = {"type": "json_schema", "name": "city", "schema": schema, "strict": True}
    assert conversation(text={"format": strict}).response_format == {
        "type": "json_schema",
        "json_schema": {"name": "city", "schema": schema, "strict": True},
    }
    assert conversation(text={"format": {"type": "json_object"}}).response_format == {
        "type": "json_object"
    }
    assert conversation(text={"format": {"type": "text"}}).response_format is None
    with pytest.raises(ChatError, match=r"text\.format\.schema"):
        conversation(text={"format": {"type": "json_schema", "name": "city"}})


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"prompt": {"id": "pmpt_1"}},
        {"background": True},
    ],
)
def test_what_would_need_stored_responses_is_refused(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ChatError, match=f"{name}: this server stores no responses"):
        conversation(**fields)


@pytest.mark.parametrize(
    "fields", [{"top_logprobs": 3}, {"include": ["message.output_text.logprobs"]}]
)
def test_log_probabilities_are_refused_rather_than_left_out(fields: dict[str, Any]) -> None:
    with pytest.raises(ChatError, match="log-probabilities"):
        conversation(**fields)


def test_store_and_other_bookkeeping_is_ignored() -> None:
    ignored = {"store": True, "prompt_cache_key": "a", "service_tier": "auto", "user": "b"}
    assert conversation(**ignored) == conversation()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"role": "user", "content": [{"type": "input_image"}]}, "text only"),
        ({"role": "user", "content": [{"type": "input_file"}]}, "text only"),
        ({"role": "user", "content": [{"type": "sound"}]}, r"input\[0\]\.content\[0\]\.type"),
        ({"role": "user", "content": ["hi"]}, r"input\[0\]\.content"),
        ({"role": "tool", "content": "hi"}, r"input\[0\]\.role"),
        ({"type": "item_reference", "id": "msg_1"}, "stores no items"),
        ({"type": "web_search_call"}, r"input\[0\]\.type"),
        ({"type": {"a": 1}}, r"input\[0\]\.type"),
        ({"type": "function_call", "call_id": "c", "name": "f"}, r"input\[0\]\.arguments"),
        (OUTPUT, "no function_call before it"),
        ({"type": "reasoning", "content": "x"}, r"input\[0\]\.content"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_place(item: Any, message: str) -> None:
    with pytest.raises(ChatError, match=message):
        conversation([item])


@pytest.mark.parametrize(
    "fields",
    [
        {"max_output_tokens": 0},
        {"max_output_tokens": 2**63},
        {"temperature": 2.1},
        {"top_p": 0},
        {"tools": [WEATHER] * 129},
        {"tools": [{**WEATHER, "name": "a" * 65}]},
        {"tools": [{"type": "function"}]},
        {"tools": [{"name": "f"}]},
        {"input": 5},
        {"text": {"format": {"type": "xml"}}},
    ],
)
def test_what_is_out_of_bounds_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        ResponsesRequest.model_validate({"model": "k2", "input": "hi", **fields})


# ---------------------------------------------------------------------------- replies

THOUGHT: list[Event] = [ReasoningDelta("I "), ReasoningDelta("think."), ReasoningEnd()]
CALLS: list[Event] = [
    *THOUGHT,
    TextDelta("See:"),
    ToolCallStart(0, "functions.get_weather:0", "get_weather"),
    ToolCallArguments(0, '{"city":'),
    ToolCallArguments(0, ' "Rome"}'),
    ToolCallEnd(0, '{"city": "Rome"}'),
    ToolCallStart(1, "functions.get_weather:1", "get_weather"),
    ToolCallArguments(1, "{}"),
    ToolCallEnd(1, "{}"),
    Finished("tool_calls", USAGE),
]


def test_a_stream_is_what_openais_own_types_describe_in_the_official_order() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    events = stream(CALLS, tools=[WEATHER, SHELL])
    for number, event in enumerate(events):
        adapter.validate_python(event)
        assert event["sequence_number"] == number
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


def test_the_last_event_holds_the_whole_response() -> None:
    response = stream(CALLS)[-1]["response"]
    parsed = Response.model_validate(response)
    assert parsed.status == "completed"
    assert parsed.output_text == "See:"
    reasoning, _, first, second = parsed.output
    assert reasoning.content is not None
    assert reasoning.content[0].text == "I think."
    assert (first.call_id, first.arguments) == ("functions.get_weather:0", '{"city": "Rome"}')
    assert (second.call_id, second.arguments) == ("functions.get_weather:1", "{}")
    assert parsed.usage is not None
    assert parsed.usage.input_tokens == USAGE.prompt_tokens
    assert parsed.usage.input_tokens_details.cached_tokens == USAGE.cached_tokens
    assert parsed.usage.output_tokens_details.reasoning_tokens == USAGE.reasoning_tokens


def test_the_events_before_the_last_do_not_grow_with_it() -> None:
    created, in_progress, *_ = stream(says("hello"))
    assert created["response"]["output"] == in_progress["response"]["output"] == []
    assert created["response"]["status"] == "in_progress"


def test_reasoning_is_carried_encrypted_only_for_who_asks() -> None:
    plain = stream(CALLS)[-1]["response"]["output"][0]
    assert "encrypted_content" not in plain
    asked = stream(CALLS, include=["reasoning.encrypted_content"])[-1]["response"]["output"][0]
    assert asked["encrypted_content"] == carry("I think.")


def test_a_response_comes_back_as_the_turn_that_it_was() -> None:
    output = stream(CALLS, include=["reasoning.encrypted_content"])[-1]["response"]["output"]
    del output[0]["content"]  # as Codex does
    turn, *_ = conversation(output).messages
    assert turn["reasoning_content"] == "I think."
    assert turn["content"] == "See:"
    assert len(turn["tool_calls"]) == 2


def test_a_reply_that_met_its_limit_is_incomplete() -> None:
    *_, item_done, last = stream([TextDelta("a"), Finished("length", USAGE)])
    assert item_done["item"]["status"] == "incomplete"
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_stream_that_fails_says_so_in_its_last_event() -> None:
    reply = ResponseEvents(request(), "k2")
    reply.start()
    (failed,) = reply.fail("out of memory")
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "out of memory"}


def test_a_reply_that_was_given_up_is_an_error() -> None:
    with pytest.raises(EngineError, match="cut off"):
        stream([TextDelta("a"), Finished("cancelled", USAGE)])


def test_the_request_is_described_in_the_response() -> None:
    response = stream(says("hi"), tools=[SHELL, WEATHER], temperature=0.5)[0]["response"]
    assert response["tools"] == [WEATHER]
    assert response["temperature"] == 0.5
    assert response["text"] == {"format": {"type": "text"}}
    assert not response["store"]

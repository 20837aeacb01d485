"""The official anthropic and openai packages, over sockets: Messages and Responses.

What the translations do is tested without a server, in test_server_anthropic.py and
test_server_responses.py; here is what clients see.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from pydantic import BaseModel

from hybridk2.chat.events import TextDelta
from hybridk2.errors import OutOfMemoryError
from hybridk2.server import sse
from hybridk2.server.security import gate
from tests.scripted_assistant import calls, says
from tests.scripted_engine import ScriptedEngine
from tests.served import HOST, Served, serving, serving_nano

MODEL = "nano"
QUESTION = "which one is bigger, 9.11 or 9.9? think carefully."
RIGHT = "9.9 is bigger than 9.11"
WEATHER = "What's the weather like in Beijing today? Use the tool to check."
DESCRIPTION = (
    "Retrieve current weather information. Call this when the user asks about the weather."
)
SCHEMA = {
    "type": "object",
    "required": ["city"],
    "properties": {"city": {"type": "string", "description": "Name of the city"}},
}
CLAUDE_TOOL: Any = {"name": "get_weather", "description": DESCRIPTION, "input_schema": SCHEMA}
OPENAI_TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": DESCRIPTION,
    "parameters": SCHEMA,
    "strict": False,
}
SUNNY = json.dumps({"weather": "Sunny"})
GREEDY = {"temperature": 0}
KEY = "a-key-of-sixteen-characters"


@pytest.fixture(scope="module")
def nano() -> Iterator[Served]:
    with serving_nano() as served:
        yield served


@pytest.fixture
def scripted() -> Iterator[tuple[ScriptedEngine, Served]]:
    engine = ScriptedEngine()
    with serving(lambda on_progress: engine) as served:
        yield engine, served


def claude(served: Served, **options: Any) -> Any:
    options = {"api_key": "none", **options}
    return anthropic.Anthropic(base_url=served.url, max_retries=0, timeout=60, **options)


def said(text: str) -> Any:
    return [{"role": "user", "content": text}]


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


# ---------------------------------------------------------------------------- Messages


def test_messages_answers_the_chat_question_the_same_streamed_and_whole(nano: Served) -> None:
    asked: Any = {"model": MODEL, "max_tokens": 500, "messages": said(QUESTION)}
    whole = claude(nano).messages.create(**asked, extra_body=GREEDY)
    with claude(nano).messages.stream(**asked, extra_body=GREEDY) as stream:
        streamed = stream.get_final_message()
    assert RIGHT in text_of(whole)
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert whole.content[0] == streamed.content[0]
    assert text_of(whole) == text_of(streamed)
    assert (whole.stop_reason, streamed.stop_reason) == ("end_turn", "end_turn")
    assert whole.usage.output_tokens == streamed.usage.output_tokens


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_messages_runs_the_weather_tool_until_the_answer(nano: Served, streamed: bool) -> None:
    messages = said(WEATHER)
    stop_reason = "tool_use"
    while stop_reason == "tool_use":
        assert len(messages) < 9, "the loop does not end"
        asked: Any = {"model": MODEL, "max_tokens": 500, "messages": messages}
        asked |= {"tools": [CLAUDE_TOOL], "extra_body": GREEDY}
        if streamed:
            with claude(nano).messages.stream(**asked) as stream:
                message = stream.get_final_message()
        else:
            message = claude(nano).messages.create(**asked)
        stop_reason = message.stop_reason
        messages.append({"role": "assistant", "content": message.content})
        uses = [block for block in message.content if block.type == "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": use.id, "content": SUNNY} for use in uses]
        if results:
            assert [use.input for use in uses] == [{"city": "Beijing"}]
            messages.append({"role": "user", "content": results})
    assert len(messages) > 2, "the tool was not called"
    assert "Sunny" in text_of(message)


def test_the_prompt_is_counted_as_it_is_charged(nano: Served) -> None:
    asked: Any = {"model": MODEL, "messages": said(WEATHER), "tools": [CLAUDE_TOOL]}
    counted = claude(nano).messages.count_tokens(**asked, system="Be brief.")
    usage = claude(nano).messages.create(**asked, system="Be brief.", max_tokens=1).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_claude_codes_changing_line_does_not_cost_the_cached_prefix(nano: Served) -> None:
    prompt = "You are a careful comparer of numbers. " * 20
    used = []
    for number in range(2):
        line = f"x-anthropic-billing-header: cc_version=2.1.{number}; cch={number};"
        system: Any = [{"type": "text", "text": line}, {"type": "text", "text": prompt}]
        asked: Any = {"model": "claude-opus-4-9", "max_tokens": 1, "messages": said(QUESTION)}
        used.append(claude(nano).messages.create(**asked, system=system).usage)
    prompt_tokens = used[1].input_tokens + used[1].cache_read_input_tokens
    # All but the last page, at most, which has to give the logits.
    assert used[1].cache_read_input_tokens >= prompt_tokens - 64
    assert used[1].cache_read_input_tokens > 100


@pytest.mark.parametrize(
    "choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}], ids=["any", "tool"]
)
def test_a_tool_that_must_be_used_is_used_even_in_a_greeting(nano: Served, choice: Any) -> None:
    message = claude(nano).messages.create(
        model=MODEL,
        max_tokens=300,
        messages=said("hello"),
        tools=[CLAUDE_TOOL],
        tool_choice=choice | {"disable_parallel_tool_use": True},
    )
    (use,) = (block for block in message.content if block.type == "tool_use")
    assert use.name == "get_weather"
    assert isinstance(use.input["city"], str)
    assert message.stop_reason == "tool_use"


def test_no_tool_is_used_where_none_may_be(nano: Served) -> None:
    message = claude(nano).messages.create(
        model=MODEL,
        max_tokens=200,
        messages=said(WEATHER),
        tools=[CLAUDE_TOOL],
        tool_choice={"type": "none"},
        extra_body=GREEDY,
    )
    assert all(block.type != "tool_use" for block in message.content)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_stop_sequence_ends_the_reply_and_is_named(nano: Served, stream: bool) -> None:
    client = claude(nano)
    asked: Any = {"model": MODEL, "max_tokens": 500, "messages": said(QUESTION)}
    asked |= {"stop_sequences": ["never", "bigger"], "extra_body": GREEDY}
    if stream:
        with client.messages.stream(**asked) as events:
            message = events.get_final_message()
    else:
        message = client.messages.create(**asked)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "bigger")
    assert text_of(message).endswith("is ")


def test_messages_refuses_in_anthropics_words(nano: Served) -> None:
    client = claude(nano)
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    for asked, kind, words in (
        ({"messages": []}, anthropic.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": [image]}]}, anthropic.BadRequestError, "text"),
        ({"model": "other"}, anthropic.NotFoundError, "model"),
        ({"messages": said("hi " * 6000)}, anthropic.BadRequestError, "prompt is too long: 1"),
        (
            {"tools": [CLAUDE_TOOL | {"input_schema": {"type": "nonsense"}}]},
            anthropic.BadRequestError,
            "get_weather",
        ),
    ):
        with pytest.raises(kind, match=words) as caught:
            client.messages.create(
                **{"model": MODEL, "max_tokens": 5, "messages": said("hi"), **asked}
            )
        body = caught.value.body
        assert body["type"] == "error"
        assert set(body["error"]) == {"type", "message"}


def test_messages_takes_the_key_in_either_header() -> None:
    engine = ScriptedEngine()
    with serving(lambda on_progress: engine, the_gate=gate((KEY.encode(),), HOST, ())) as served:
        asked: Any = {"model": MODEL, "max_tokens": 5, "messages": said("hi")}
        for key in ({"api_key": KEY}, {"api_key": None, "auth_token": KEY}):
            assert text_of(claude(served, **key).messages.create(**asked)) == "hello world"
        with pytest.raises(anthropic.AuthenticationError) as caught:
            claude(served, api_key="another-key-of-sixteen").messages.create(**asked)
        assert caught.value.body["error"]["type"] == "authentication_error"


def test_a_silent_stream_is_kept_open_by_pings_of_valid_json(
    scripted: tuple[ScriptedEngine, Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, served = scripted
    monkeypatch.setattr(sse, "PING_SECONDS", 0.05)
    engine.scripts.append([TextDelta("a")])  # and then nothing, without an end
    asked = {"model": MODEL, "max_tokens": 5, "messages": said("hi"), "stream": True}
    pings = 0
    with httpx.stream("POST", f"{served.url}/v1/messages", json=asked, timeout=10) as answer:
        event = ""
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                event = value
            elif name == "data":
                assert json.loads(value)["type"] == event
                pings += event == "ping"
            else:
                assert line == "", "Anthropic's streams have no comments"
            if pings == 3:  # the first belongs to the beginning
                break
    assert pings == 3


def test_a_stream_of_messages_that_fails_ends_with_an_error_event(
    scripted: tuple[ScriptedEngine, Served],
) -> None:
    engine, served = scripted
    engine.scripts.append([TextDelta("a"), OutOfMemoryError("host memory")])
    asked: Any = {"model": MODEL, "max_tokens": 5, "messages": said("hi")}
    with (
        pytest.raises(anthropic.APIStatusError, match="out of memory"),
        claude(served).messages.stream(**asked) as stream,
    ):
        stream.until_done()


def test_what_claude_code_asks_its_smallest_model_goes_behind_the_others(
    scripted: tuple[ScriptedEngine, Served],
) -> None:
    engine, served = scripted
    for name in ("claude-haiku-4-5", "claude-opus-4-8"):
        claude(served).messages.create(model=name, max_tokens=5, messages=said("hi"))
    assert [reply.options["priority"] for reply in engine.replies] == ["background", "interactive"]


# ---------------------------------------------------------------------------- Responses


def test_responses_answers_the_chat_question_the_same_streamed_and_whole(nano: Served) -> None:
    client = nano.openai()
    asked: Any = {"model": MODEL, "input": QUESTION, "temperature": 0}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        streamed = stream.get_final_response()
    assert RIGHT in whole.output_text
    assert whole.output_text == streamed.output_text
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.usage is not None
    assert streamed.usage is not None
    assert whole.usage.output_tokens == streamed.usage.output_tokens
    assert whole.status == streamed.status == "completed"


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_responses_runs_the_weather_tool_until_the_answer(nano: Served, streamed: bool) -> None:
    client = nano.openai()
    items = said(WEATHER)
    calls_made: list[Any] = [None]
    while calls_made:
        assert len(items) < 9, "the loop does not end"
        asked: Any = {"model": MODEL, "input": items, "tools": [OPENAI_TOOL], "temperature": 0}
        asked |= {"instructions": "You are Kimi, an AI assistant created by Moonshot AI."}
        asked |= {"include": ["reasoning.encrypted_content"], "store": False}
        if streamed:
            with client.responses.stream(**asked) as stream:
                response: Any = stream.get_final_response()
        else:
            response = client.responses.create(**asked)
        items += [item.model_dump(exclude_none=True) for item in response.output]
        calls_made = [item for item in response.output if item.type == "function_call"]
        for call in calls_made:
            assert json.loads(call.arguments) == {"city": "Beijing"}
            output = {"type": "function_call_output", "call_id": call.call_id, "output": SUNNY}
            items.append(output)
    assert any(item.get("type") == "function_call" for item in items)
    assert "Sunny" in response.output_text


class Comparison(BaseModel):
    bigger: str
    certain: bool


def test_responses_holds_the_text_to_a_schema(nano: Served) -> None:
    response = nano.openai().responses.parse(
        model=MODEL, input=QUESTION, text_format=Comparison, max_output_tokens=400
    )
    assert isinstance(response.output_parsed, Comparison)


def test_responses_is_cut_off_where_it_was_asked_to_be(nano: Served) -> None:
    response = nano.openai().responses.create(model=MODEL, input=QUESTION, max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


def test_responses_refuses_in_openais_words(nano: Served) -> None:
    client = nano.openai()
    for asked, kind, param in (
        ({"previous_response_id": "resp_1"}, openai.BadRequestError, "previous_response_id"),
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"input": "hi " * 6000}, openai.BadRequestError, None),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, openai.BadRequestError, "input[0]"),
    ):
        with pytest.raises(kind) as caught:
            client.responses.create(**{"model": MODEL, "input": "hi", **asked})
        assert caught.value.param == param
        assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_a_stream_of_responses_that_fails_ends_with_a_failed_response(
    scripted: tuple[ScriptedEngine, Served],
) -> None:
    engine, served = scripted
    engine.scripts.append([TextDelta("a"), OutOfMemoryError("host memory")])
    with served.openai().responses.stream(model=MODEL, input="hi") as stream:
        events: Any = list(stream)
    assert events[-1].type == "response.failed"
    assert "out of memory" in events[-1].response.error.message
    numbers = [event.sequence_number for event in events]
    assert numbers == list(range(len(numbers)))


def test_flexible_requests_of_responses_go_behind_the_others(
    scripted: tuple[ScriptedEngine, Served],
) -> None:
    engine, served = scripted
    client = served.openai()
    client.responses.create(model=MODEL, input="hi", service_tier="flex")
    client.responses.create(model=MODEL, input="hi")
    assert [reply.options["priority"] for reply in engine.replies] == ["background", "interactive"]


def test_calls_of_responses_keep_k2s_ids(scripted: tuple[ScriptedEngine, Served]) -> None:
    engine, served = scripted
    engine.scripts += [calls("get_weather", "{}"), says("ok")]
    client = served.openai()
    response: Any = client.responses.create(model=MODEL, input="hi")
    assert response.output[0].call_id == "functions.get_weather:0"

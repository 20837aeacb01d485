"""The official openai package talks to K2-nano over a socket, and gets right answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.served import Served, serving_nano

QUESTION = "which one is bigger, 9.11 or 9.9? think carefully."
WEATHER = "What's the weather like in Beijing today? Use the tool to check."
MODEL = "nano"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving_nano() as served:
        yield served


def get_weather(city: str) -> dict[str, str]:
    return {"weather": "Sunny"}


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Retrieve current weather information. "
            "Call this when the user asks about the weather.",
            "parameters": {
                "type": "object",
                "required": ["city"],
                "properties": {"city": {"type": "string", "description": "Name of the city"}},
            },
        },
    }
]


@pytest.mark.parametrize("as_parts", [False, True], ids=["string", "parts"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_the_chat_question_ends_in_the_right_answer(
    served: Served, stream: bool, as_parts: bool
) -> None:
    client = served.openai()

    def content(text: str) -> Any:
        return [{"type": "text", "text": text}] if as_parts else text

    messages: Any = [
        {"role": "system", "content": content("You are Kimi, an AI assistant.")},
        {"role": "user", "content": content(QUESTION)},
    ]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, stream=stream, temperature=0, max_tokens=4096
    )
    if stream:
        reasoning, text = "", ""
        for chunk in answer:
            delta = chunk.choices[0].delta
            reasoning += getattr(delta, "reasoning_content", None) or ""
            text += delta.content or ""
    else:
        text = answer.choices[0].message.content
        reasoning = answer.choices[0].message.reasoning_content
    assert reasoning
    assert "9.9 is bigger" in text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_the_weather_loop_of_the_models_own_page_ends_in_the_weather(
    served: Served, stream: bool
) -> None:
    client = served.openai()
    messages: Any = [{"role": "user", "content": WEATHER}]
    finish_reason, calls = None, 0
    while finish_reason is None or finish_reason == "tool_calls":
        answer = client.chat.completions.create(
            model=MODEL,
            messages=messages,
            tools=TOOLS,
            tool_choice="auto",
            stream=stream,
            temperature=0,
        )
        message, finish_reason = (collect_stream if stream else whole)(answer)
        if finish_reason == "tool_calls":
            messages.append(message)
            for call in message["tool_calls"]:
                calls += 1
                arguments = json.loads(call["function"]["arguments"])
                result = get_weather(**arguments)
                assert "beijing" in arguments["city"].lower()
                messages.append(
                    {
                        "role": "tool",
                        "tool_call_id": call["id"],
                        "name": call["function"]["name"],
                        "content": json.dumps(result),
                    }
                )
    assert calls == 1
    assert finish_reason == "stop"
    assert "sunny" in message["content"].lower()


PLACES = {
    "type": "object",
    "properties": {
        "cities": {"type": "array", "items": {"enum": ["Rome"]}, "minItems": 2, "maxItems": 2}
    },
    "required": ["cities"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", ["allowed", "impossible"])
def test_a_call_that_only_a_check_can_refuse_is_finished_when_it_is_valid_and_never_else(
    served: Served, name: str, stream: bool
) -> None:
    cities = PLACES["properties"]["cities"]  # type: ignore[index]
    # Two cities of one: they are never different.
    more = {"uniqueItems": True} if name == "impossible" else {"not": {"maxItems": 1}}
    schema = {**PLACES, "properties": {"cities": {**cities, **more}}}
    asked: dict[str, Any] = {
        "tools": [{"type": "function", "function": {"name": name, "parameters": schema}}],
        "tool_choice": {"type": "function", "function": {"name": name}},
    }
    client = served.openai()

    def ask() -> tuple[dict[str, Any], str]:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Which cities?"}],
            stream=stream,
            max_tokens=400,
            **asked,
        )
        return (collect_stream if stream else whole)(answer)

    if name == "allowed":
        message, finish_reason = ask()
        assert finish_reason == "tool_calls"
        arguments = message["tool_calls"][0]["function"]["arguments"]
        assert json.loads(arguments) == {"cities": ["Rome", "Rome"]}
    else:
        with pytest.raises(openai.APIError, match="uniqueItems") as failed:
            ask()
        assert failed.value.code == "invalid_output"
    asked["tools"][0]["function"]["strict"] = True
    with pytest.raises(openai.BadRequestError, match=rf'"{next(iter(more))}"'):
        ask()


def whole(answer: Any) -> tuple[dict[str, Any], str]:
    choice = answer.choices[0]
    return choice.message.model_dump(exclude_none=True), choice.finish_reason


def collect_stream(chunks: Any) -> tuple[dict[str, Any], str]:
    """As Moonshot's page collects the deltas of tool calls."""
    content, reasoning, calls, finish_reason = "", "", {}, None
    for chunk in chunks:
        delta = chunk.choices[0].delta
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning_content", None) or ""
        for part in delta.tool_calls or ():
            call = calls.setdefault(
                part.index,
                {"id": None, "type": "function", "function": {"name": "", "arguments": ""}},
            )
            call["id"] = part.id or call["id"]
            call["function"]["name"] += part.function.name or ""
            call["function"]["arguments"] += part.function.arguments or ""
        finish_reason = chunk.choices[0].finish_reason or finish_reason
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    if calls:
        message["tool_calls"] = list(calls.values())
    assert finish_reason is not None
    return message, finish_reason

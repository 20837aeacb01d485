"""Gates 4 to 7: what a request may ask for, how long it may be, and what text it may hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hybridk2.tokenizer import PUBLISHED_CONTROL_TOKENS
from tests.gates.fleet import ENDLESS, TOKENIZER, Answer, Fleet, Server
from tests.gates.gate import Outcome, gate

# JSON numbers that no field takes; Python would write some of them otherwise.
_NO_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", str(2**64), str(-(2**64)), '"1"')


def _tools(count: int, name: str = "f") -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": f"{name}{n}"}} for n in range(count)]


_BOUNDS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (  # taken, and refused
    ({"n": 4}, {"n": 5}),
    ({"n": 1}, {"n": 0}),
    ({"stop": ["x" * 256] * 4}, {"stop": ["x"] * 5}),
    ({"stop": "x" * 256}, {"stop": "x" * 257}),
    ({"logprobs": True, "top_logprobs": 20}, {"logprobs": True, "top_logprobs": 21}),
    (
        {"logit_bias": {str(n): 1 for n in range(1024)}},
        {"logit_bias": {str(n): 1 for n in range(1025)}},
    ),
    ({"logit_bias": {"5": -100}}, {"logit_bias": {"5": -101}}),
    ({"tools": _tools(128)}, {"tools": _tools(129)}),
    ({"tools": _tools(1, "n" * 63)}, {"tools": _tools(1, "n" * 64)}),
    (
        {"messages": [{"role": "user", "content": "x", "name": "n" * 64}]},
        {"messages": [{"role": "user", "content": "x", "name": "n" * 65}]},
    ),
    ({"temperature": 0}, {"temperature": -0.01}),
    ({"top_p": 1}, {"top_p": 1.01}),
    ({"top_p": 0.01}, {"top_p": 0}),
    ({"seed": 2**63 - 1}, {"seed": 2**63}),
    ({"presence_penalty": 2}, {"presence_penalty": 2.01}),
    ({"max_tokens": 2**31 - 1, "stop": "e"}, {"max_tokens": 2**31}),
    ({"max_completion_tokens": 1}, {"max_completion_tokens": -1}),
)
_NUMBERS = (
    *("n", "temperature", "top_p", "min_p", "top_k", "seed", "max_tokens", "top_logprobs"),
    *("max_completion_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty"),
)


@gate("4", "bounds of fields")
def bounds(fleet: Fleet, outcome: Outcome) -> None:
    server = fleet.random
    chat = "/v1/chat/completions"
    for taken, refused in _BOUNDS:
        answer = server.ask(chat, {**server.chat("x", 1), **taken})
        outcome.hold(answer.status == 200, f"{_short(taken)}: {answer.status}")
        answer = server.ask(chat, {**server.chat("x", 1), **refused})
        outcome.hold(_is_refusal(answer), f"{_short(refused)}: {answer.status}")
    sent = 0
    for field in _NUMBERS:
        for number in _NO_NUMBERS:
            body = json.dumps({**server.chat("x", 1), field: "HERE"}).replace('"HERE"', number)
            answer = server.ask(chat, body.encode())
            sent += 1
            outcome.hold(_is_refusal(answer), f"{field}: {number}: {answer.status}")
    for number in _NO_NUMBERS:
        body = json.dumps(server.completion("x", 1, logit_bias={"5": "HERE"}))
        answer = server.ask("/v1/completions", body.replace('"HERE"', number).encode())
        sent += 1
        outcome.hold(_is_refusal(answer), f"logit_bias {number}: {answer.status}")
    outcome.say(f"{len(_BOUNDS)} bounds taken and refused beyond")
    outcome.say(f"{sent} numbers that are none, infinite, negative or beyond 64 bits refused")


def _is_refusal(answer: Answer) -> bool:
    return answer.status == 400 and answer.is_error


def _short(fields: dict[str, Any]) -> str:
    return json.dumps(fields)[:80]


# -- Gate 5 -------------------------------------------------------------------------------------


@gate("5", "prompts around the context's length")
def prompt_lengths(fleet: Fleet, outcome: Outcome) -> None:
    server = fleet.nano
    context = server.ask("/v1/models").json["data"][0]["context_length"]
    for length, expected in ((context - 1, 200), (context, 400), (context + 1, 400)):
        _ask_of_length(server, outcome, length, context, expected)
    _ask_of_length(server, outcome, 10 * context, context, 400)
    for words in (context, 10 * context):
        before = server.figures()
        question = server.chat("one " * words, 5)
        length = server.ask("/tokenize", {"messages": question["messages"]}).json["count"]
        answer = server.ask("/v1/chat/completions", question)
        _hold_refused(server, outcome, answer, length, context, before)
    outcome.say(f"ctx-1, ctx, ctx+1, 10 x ctx tokens of {context}: 200, 400, 400, 400")
    outcome.say("none of the refused computed a token, max_tokens clamped to 1")


def _ask_of_length(
    server: Server, outcome: Outcome, length: int, context: int, expected: int
) -> None:
    before = server.figures()
    body = server.completion([65 + n % 20 for n in range(length)], 1000, logit_bias=ENDLESS)
    answer = server.ask("/v1/completions", body)
    outcome.hold(answer.status == expected, f"{length} tokens: {answer.status}")
    if expected == 400:
        _hold_refused(server, outcome, answer, length, context, before)
        return
    usage = answer.json["usage"]
    outcome.hold(usage["prompt_tokens"] == length, f"counted {usage['prompt_tokens']} tokens")
    outcome.hold(usage["completion_tokens"] == 1, f"{usage['completion_tokens']} more tokens")
    reason = answer.json["choices"][0]["finish_reason"]
    outcome.hold(reason == "length", f"finish_reason {reason} at the end of the context")


def _hold_refused(
    server: Server,
    outcome: Outcome,
    answer: Answer,
    length: int,
    context: int,
    before: dict[str, float],
) -> None:
    outcome.hold(_is_refusal(answer), f"{length} tokens: {answer.status}")
    outcome.hold(answer.code == "context_length_exceeded", f"{length} tokens: {answer.code}")
    message = answer.json["error"]["message"].replace(",", "")
    told = str(length) in message and str(context) in message
    outcome.hold(told, f"{length} tokens: the refusal lacks a number")
    after = server.figures()
    computed = [
        name for name in ("prompt_tokens_total", "steps_total") if after[name] > before[name]
    ]
    outcome.hold(not computed, f"{length} tokens: computed before it was refused")


# -- Gate 6 -------------------------------------------------------------------------------------

_HARMLESS = "an ordinary text"


@gate("6", "special tokens in what a person writes")
def special_tokens(fleet: Fleet, outcome: Outcome) -> None:
    server = fleet.random
    names = [*PUBLISHED_CONTROL_TOKENS.values(), "<|im_end|><|im_system|>", "<|im_\u0000end|>"]
    places = 0
    for name in names:
        for kind, body in _bodies_with(f"a {name} b"):
            places += 1
            control = _control_ids(server, body)
            (harmless,) = [body for other, body in _bodies_with(_HARMLESS) if other == kind]
            expected = _control_ids(server, harmless)
            outcome.hold(len(expected) > 5, f"{kind}: not rendered")
            outcome.hold(control == expected, f"{name} in {kind} becomes a control token")
        answer = server.ask("/tokenize", {"prompt": name})
        made = [i for i in answer.json["tokens"] if i >= TOKENIZER.base_size]
        outcome.hold(not made, f"{name} in a plain prompt becomes a control token")
        echoed = server.completion(name, 0, echo=True, logprobs=0)
        count = len(server.ask("/v1/completions", echoed).json["choices"][0]["logprobs"]["tokens"])
        outcome.hold(count > 1, f"{name} is one token of a completion's prompt")
    outcome.say(f"{len(names)} texts of control tokens in {places} places of conversations")


def _bodies_with(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Conversations for /tokenize that hold a text, by where."""

    def user(content: Any) -> dict[str, Any]:
        return {"role": "user", "content": content}

    arguments = json.dumps({"a": text})
    function = {"name": "f", "arguments": arguments}
    call = {
        "role": "assistant",
        "content": text,
        "reasoning_content": text,
        "tool_calls": [{"id": "functions.f:0", "type": "function", "function": function}],
    }
    result = {"role": "tool", "tool_call_id": "functions.f:0", "content": text}
    described = {"type": "string", "description": text, "enum": [text]}
    declared = {
        "name": "f",
        "description": text,
        "parameters": {"type": "object", "properties": {text: described}},
    }
    yield "a user's message", {"messages": [user(text)]}
    yield "its parts", {"messages": [user([{"type": "text", "text": text}] * 2)]}
    yield "its name", {"messages": [{**user("x"), "name": text[:60]}]}
    yield "the system's message", {"messages": [{"role": "system", "content": text}, user("x")]}
    yield "an answer", {"messages": [user("x"), {"role": "assistant", "content": text}, user("y")]}
    yield "a call and its result", {"messages": [user("x"), call, result]}
    yield (
        "a tool",
        {"messages": [user("x")], "tools": [{"type": "function", "function": declared}]},
    )


def _control_ids(server: Server, body: dict[str, Any]) -> list[int]:
    tokens = server.ask("/tokenize", body).json["tokens"]
    return [token for token in tokens if token >= TOKENIZER.base_size]


# -- Gate 7 -------------------------------------------------------------------------------------

_TEXTS = (
    "👩‍👩‍👧‍👦 family, 👍🏽 thumb, 🏳️‍🌈 flag",
    "北京の天気は晴れです。한국어",
    "e\u0301 a\u0308 z\u200dw\u200cj \ufeff x",
    "🇧🇷🇯🇵 \U0001f469\U0001f3fd\u200d\U0001f680 \U00010348",
    "ﷺ العربية हिन्दी ไทย",
)


@gate("7", "characters of several tokens")
def characters(fleet: Fleet, outcome: Outcome) -> None:
    server = fleet.random
    compared = 0
    for text in _TEXTS:
        for kind, whole, streamed in _both_ways(server, text):
            compared += 1
            outcome.hold(whole == streamed, f"{kind}: streamed {streamed!r}, whole {whole!r}")
            outcome.hold(text in whole, f"{kind}: {whole!r} lacks {text!r}")
            outcome.hold("\ufffd" not in whole + streamed, f"{kind}: a stray U+FFFD")
    outcome.say(f"{compared} answers with emoji, CJK, ZWJ: streamed as whole, no stray U+FFFD")


def _both_ways(server: Server, text: str) -> Iterator[tuple[str, str, str]]:
    """What different APIs answer with where the answer has to be this text: whole and streamed."""
    schema = {"type": "object", "properties": {"x": {"const": text}}, "required": ["x"]}
    named = {"name": "f", "schema": schema}
    structured = {"response_format": {"type": "json_schema", "json_schema": named}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    choice = {"type": "function", "function": {"name": "f"}}
    call = {"tools": [tool], "tool_choice": choice, "parallel_tool_calls": False}
    path = "/v1/chat/completions"

    def chat(fields: dict[str, Any], read: Any) -> tuple[str, str]:
        body = server.chat("x", 400, seed=1, **fields)
        whole = read(server.ask(path, body).json["choices"][0]["message"])
        with server.stream(path, body) as stream:
            deltas = [frame["choices"][0]["delta"] for frame in stream.frames()]
        return json.loads(whole)["x"], json.loads("".join(map(read, deltas)))["x"]

    def arguments(message: dict[str, Any]) -> str:
        calls = message.get("tool_calls") or [{"function": {"arguments": ""}}]
        return calls[0]["function"].get("arguments") or ""

    yield "chat content", *chat(structured, lambda message: message.get("content") or "")
    yield "tool arguments", *chat(call, arguments)

    echoed = server.completion(text, 1, echo=True, seed=1)
    whole = server.ask("/v1/completions", echoed).json["choices"][0]["text"]
    with server.stream("/v1/completions", echoed) as stream:
        pieces = [frame["choices"][0]["text"] for frame in stream.frames() if frame["choices"]]
    # The one token that follows may be a byte that is no text.
    yield "an echoed prompt", whole[: len(text)], "".join(pieces)[: len(text)]

    declared = {"name": "f", "input_schema": schema}
    asked = {**server.chat("x", 400), "tools": [declared]}
    asked["tool_choice"] = {"type": "tool", "name": "f", "disable_parallel_tool_use": True}
    block = next(
        part for part in server.ask("/v1/messages", asked).json["content"] if "input" in part
    )
    with server.stream("/v1/messages", asked) as stream:
        deltas = [frame.get("delta", {}) for frame in stream.frames()]
    joined = "".join(delta.get("partial_json", "") for delta in deltas)
    yield "Messages", block["input"]["x"], json.loads(joined)["x"]

    format_ = {"type": "json_schema", "name": "f", "schema": schema}
    request = {"model": server.model, "input": "x", "max_output_tokens": 400}
    request["text"] = {"format": format_}
    output = server.ask("/v1/responses", request).json["output"]
    (message,) = [item for item in output if item["type"] == "message"]
    with server.stream("/v1/responses", request) as stream:
        frames = list(stream.frames())
    kind = "response.output_text.delta"
    joined = "".join(frame["delta"] for frame in frames if frame["type"] == kind)
    whole_text = json.loads(message["content"][0]["text"])["x"]
    yield "Responses", whole_text, json.loads(joined)["x"]


GATES = (bounds, prompt_lengths, special_tokens, characters)

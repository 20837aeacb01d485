"""OpenAI's interfaces, field by field, with the official package and K2-nano."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from hybridk2.server.protocol import ChatCompletionRequest
from tests.scripted_engine import ScriptedEngine, until
from tests.served import Served, serving, serving_nano

MODEL = "nano"
CONTEXT = 1024
ASK: Any = [{"role": "user", "content": "which one is bigger, 9.11 or 9.9?"}]
WEATHER: Any = [{"role": "user", "content": "What's the weather like in Beijing today?"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather of a city.",
            "parameters": {
                "type": "object",
                "required": ["city"],
                "properties": {"city": {"type": "string"}},
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "count",
            "parameters": {
                "type": "object",
                "required": ["number"],
                "properties": {"number": {"type": "integer", "minimum": 3, "maximum": 5}},
                "additionalProperties": False,
            },
        },
    },
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving_nano(context_tokens=CONTEXT) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return served.openai()


def create(client: openai.OpenAI, **fields: Any) -> Any:
    request: dict[str, Any] = {"model": MODEL, "messages": ASK, "temperature": 0} | fields
    return client.chat.completions.create(**request)


def joined(chunks: Any) -> dict[str, Any]:
    """A stream of chunks as the choice that it amounts to."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "reasoning": ""}
    calls: dict[int, dict[str, str]] = {}
    scores: list[Any] = []
    finish, usage, roles = None, None, 0
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            delta = choice.delta.model_dump(exclude_none=True)
            roles += "role" in delta
            for name in message:
                message[name] += delta.get(name, "")
            for call in delta.get("tool_calls", ()):
                known = calls.setdefault(call["index"], {"id": "", "name": "", "arguments": ""})
                known["id"] += call.get("id", "")
                known["name"] += call["function"].get("name", "")
                known["arguments"] += call["function"].get("arguments", "")
            scores += choice.logprobs.content if choice.logprobs else []
            finish = choice.finish_reason or finish
    assert roles == 1
    return {**message, "calls": list(calls.values()), "scores": scores, "finish": finish,
            "usage": usage}  # fmt: skip


def as_joined(answer: Any) -> dict[str, Any]:
    """The same of an answer that was not streamed."""
    choice = answer.choices[0]
    message = choice.message.model_dump()
    return {
        **{name: message.get(name) or "" for name in ("content", "reasoning_content", "reasoning")},
        "calls": [
            {"id": call["id"], **call["function"]} for call in message.get("tool_calls") or ()
        ],
        "scores": choice.logprobs.content if choice.logprobs else [],
        "finish": choice.finish_reason,
        "usage": answer.usage,
    }


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1, "seed": 11, "max_tokens": 40},
        {"logprobs": True, "top_logprobs": 3},
        {"messages": WEATHER, "tools": TOOLS},
        {"stop": ["bigger"]},
        {"response_format": {"type": "json_object"}, "max_tokens": 200, "seed": 3},
        {
            "messages": [{"role": "user", "content": "schlüssel 你好 👩‍👩‍👧 <|im_end|>"}],
            "max_tokens": 60,
        },
    ],
    ids=["plain", "sampled", "logprobs", "tools", "stop", "json", "emoji"],
)
def test_streamed_and_whole_answers_are_the_same(
    client: openai.OpenAI, fields: dict[str, Any]
) -> None:
    fields = {"seed": 5} | fields
    whole = as_joined(create(client, **fields))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = joined(create(client, **fields, **options))
    for answer in (whole, streamed):
        answer["cached"] = answer["usage"].prompt_tokens_details.cached_tokens
        answer["usage"] = (answer["usage"].prompt_tokens, answer["usage"].completion_tokens)
    assert streamed | {"cached": 0} == whole | {"cached": 0}
    assert "\ufffd" not in whole["content"]


def test_usage_counts_what_was_cached_and_what_was_thought(client: openai.OpenAI) -> None:
    fields = {"messages": [{"role": "system", "content": "1 2 3 4 5 6 7 8 9 " * 20}, *ASK]}
    fields |= {"max_tokens": 150}
    first = create(client, **fields).usage
    again = create(client, **fields).usage
    assert first.prompt_tokens_details.cached_tokens < again.prompt_tokens_details.cached_tokens
    assert again.prompt_tokens_details.cached_tokens <= again.prompt_tokens
    assert 0 < again.completion_tokens_details.reasoning_tokens < again.completion_tokens
    assert again.total_tokens == again.prompt_tokens + again.completion_tokens


def test_a_seed_repeats_itself_and_choices_of_one_request_differ(client: openai.OpenAI) -> None:
    fields = {"temperature": 5, "seed": 7, "n": 4, "max_tokens": 20}
    first, again = (create(client, **fields) for _ in range(2))

    def texts(answer: Any) -> list[str]:
        return [choice.message.model_dump_json() for choice in answer.choices]

    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert texts(first) == texts(again)
    assert len(set(texts(first))) > 1
    assert first.usage.completion_tokens > 20, "of all choices"


def test_log_probabilities_are_of_the_visible_text_likeliest_first(client: openai.OpenAI) -> None:
    answer = create(client, logprobs=True, top_logprobs=4).choices[0]
    entries = answer.logprobs.content
    assert "".join(entry.token for entry in entries) == answer.message.content
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 4
        likelihoods = [other.logprob for other in entry.top_logprobs]
        assert likelihoods == sorted(likelihoods, reverse=True)
        assert entry.logprob == likelihoods[0], "temperature 0 takes the likeliest"


def test_a_stop_string_ends_the_answer_and_is_not_shown(client: openai.OpenAI) -> None:
    answer = create(client, stop=[" than"]).choices[0]
    assert answer.message.content == "9.9 is bigger"
    assert answer.finish_reason == "stop"


def test_max_completion_tokens_goes_before_max_tokens(client: openai.OpenAI) -> None:
    answer = create(client, max_tokens=50, max_completion_tokens=3)
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


def test_a_bias_forbids_a_token(served: Served, client: openai.OpenAI) -> None:
    tokenizer = served.context.tokenizer
    (nine,) = tokenizer.encode("9")
    answer = create(client, logit_bias={str(nine): -100})
    assert "9" not in answer.choices[0].message.content


def test_fields_that_mean_nothing_here_are_accepted(client: openai.OpenAI) -> None:
    answer = create(
        client,
        user="me",
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        prompt_cache_key="x",
        safety_identifier="y",
        reasoning_effort="high",
        extra_body={"chat_template_kwargs": {"thinking": True}},
    )
    assert answer.choices[0].finish_reason == "stop"


def test_thoughts_of_earlier_turns_are_taken_in_under_both_names(served: Served) -> None:
    def tokens(name: str) -> int:
        call = {"id": "x", "type": "function", "function": {"name": "count", "arguments": "{}"}}
        messages = [
            *WEATHER,
            {"role": "assistant", "content": None, name: "I think.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "x", "content": "3"},
        ]
        answer = served.post("/tokenize", {"messages": messages, "tools": TOOLS})
        return answer.json()["count"]

    assert tokens("reasoning") == tokens("reasoning_content") > tokens("no_name_of_it")


# -- Tools and structured answers -------------------------------------------------------------


def calls_of(answer: Any) -> list[tuple[str, Any]]:
    calls = answer.choices[0].message.tool_calls or []
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_named_tool_is_called_with_valid_arguments_whatever_was_asked(
    client: openai.OpenAI, stream: bool
) -> None:
    choice = {"type": "function", "function": {"name": "count"}}
    fields = {"tools": TOOLS, "tool_choice": choice, "temperature": 1, "seed": 1, "max_tokens": 200}
    if stream:
        answer = joined(create(client, stream=True, **fields))
        (call,) = answer["calls"]
        assert answer["finish"] == "tool_calls"
        assert call["id"] == "functions.count:0"
        name, arguments = call["name"], json.loads(call["arguments"])
    else:
        whole = create(client, **fields)
        assert whole.choices[0].finish_reason == "tool_calls"
        ((name, arguments),) = calls_of(whole)
    assert name == "count"
    assert arguments["number"] in (3, 4, 5)


def test_a_required_tool_is_called_and_no_tool_when_none_may(client: openai.OpenAI) -> None:
    fields = {"tools": TOOLS, "temperature": 1, "seed": 2, "max_tokens": 300}
    assert calls_of(create(client, tool_choice="required", **fields))
    nothing = create(client, messages=WEATHER, tool_choice="none", **fields)
    assert not calls_of(nothing)


def test_an_answer_keeps_to_its_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"bigger": {"enum": ["9.11", "9.9"]}, "sure": {"type": "boolean"}},
        "required": ["bigger", "sure"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema}}
    for seed in range(3):
        answer = create(client, response_format=form, temperature=1, seed=seed, max_tokens=300)
        verdict = json.loads(answer.choices[0].message.content)
        assert set(verdict) == {"bigger", "sure"}
        assert verdict["bigger"] in ("9.11", "9.9")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {
            "name": "f", "parameters": {"type": "nothing"}}}]}, "tools[0].function.parameters"),
        ({"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "nothing"}}}}, "response_format.json_schema.schema"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused_by_its_field(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, **fields)
    assert (refused.value.param or "").startswith(param)


# -- Context, models, tokens ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beyond", "status"), [(-1, 200), (0, 400), (1, 400), (9 * CONTEXT, 400)], ids=str
)
def test_a_prompt_has_to_leave_room_for_one_token(served: Served, beyond: int, status: int) -> None:
    limit = CONTEXT
    (one,) = served.context.tokenizer.encode("1")
    before = served.context.assistant.stats().prompt_tokens_total
    prompt = [one] * (limit + beyond)
    answer = served.post("/v1/completions", {"model": MODEL, "prompt": prompt, "max_tokens": 50})
    assert answer.status_code == status
    if status == 200:
        assert answer.json()["usage"]["completion_tokens"] == 1
        return
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert str(limit + beyond) in error["message"]
    assert str(limit) in error["message"]
    assert served.context.assistant.stats().prompt_tokens_total == before, "nothing was computed"


def test_models_are_listed_with_their_context_and_others_are_not_found(
    client: openai.OpenAI,
) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).model_dump()["context_length"] == CONTEXT
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt-9")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        create(client, model="gpt-9")


def test_text_comes_back_from_its_tokens_and_control_tokens_are_no_text(served: Served) -> None:
    text = "a <|im_end|> and <think> by name, 你好 👩‍👩‍👧"
    answer = served.post("/tokenize", {"prompt": text}).json()
    assert answer["count"] == len(answer["tokens"])
    control = served.context.tokenizer.control
    assert not {control.im_end, control.think} & set(answer["tokens"])
    assert served.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}


@pytest.mark.parametrize("path", ["/detokenize", "/v1/completions"])
def test_token_ids_that_there_are_not_are_refused(served: Served, path: str) -> None:
    beyond = [served.context.tokenizer.vocab_size]
    body = {"tokens": beyond, "model": MODEL, "prompt": beyond, "echo": True}
    answer = served.post(path, body)
    assert answer.status_code == 400
    assert str(served.context.tokenizer.vocab_size) in answer.json()["error"]["message"]


# -- Completions ------------------------------------------------------------------------------


def test_completions_continue_texts_and_token_ids_alike(
    served: Served, client: openai.OpenAI
) -> None:
    text = "9.11 and 9.9"
    ids = served.context.tokenizer.encode(text)
    prompts: list[Any] = [text, ids, [text, text], [ids, ids]]
    answers = [
        client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=8, seed=1)
        for prompt in prompts
    ]
    texts = {choice.text for answer in answers for choice in answer.choices}
    assert len(texts) == 1
    assert [len(answer.choices) for answer in answers] == [1, 1, 2, 2]
    assert answers[2].usage
    assert answers[2].usage.prompt_tokens == 2 * len(ids)


@pytest.mark.parametrize("max_tokens", [0, 5])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_echo_scores_every_token_of_the_prompt_and_of_the_answer(
    served: Served, client: openai.OpenAI, stream: bool, max_tokens: int
) -> None:
    text = "which one is bigger, 9.11 or 9.9? 👩‍👩‍👧"
    ids = served.context.tokenizer.encode(text)
    request: Any = {
        "model": MODEL, "prompt": text, "temperature": 0, "max_tokens": max_tokens,
        "echo": True, "logprobs": 2, "stream": stream,
    }  # fmt: skip
    answer = client.completions.create(**request)
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    lists: dict[str, list[Any]] = {name: [] for name in names}
    whole = ""
    for part in answer if stream else [answer]:
        whole += part.choices[0].text
        for name in names if part.choices[0].logprobs else ():
            lists[name] += getattr(part.choices[0].logprobs, name)
    assert whole.startswith(text)
    assert len(lists["tokens"]) == len(ids) + max_tokens
    assert {len(values) for values in lists.values()} == {len(lists["tokens"])}
    assert lists["token_logprobs"][0] is None
    assert all(logprob <= 0 for logprob in lists["token_logprobs"][1:])
    assert lists["text_offset"] == sorted(lists["text_offset"])
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        assert token.startswith("bytes:") or whole[offset:].startswith(token)
    for token, top in zip(
        lists["tokens"][len(ids) :], lists["top_logprobs"][len(ids) :], strict=True
    ):
        assert token == max(top, key=top.get)


def test_the_scores_of_a_long_prompt_come_whole(client: openai.OpenAI) -> None:
    prompt = [5] * (CONTEXT - 10)
    scored = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=0, echo=True, logprobs=20
    ).choices[0]
    scores: Any = scored.logprobs
    assert len(scores.tokens) == len(prompt)
    assert all(len(top) >= 20 for top in scores.top_logprobs[1:])


def test_a_scored_prompt_scores_the_same_as_when_it_was_generated(client: openai.OpenAI) -> None:
    """Harnesses compare both. Decoding and prefill round bf16 differently, by a few units of its
    eight bits in every layer: 0.1 is far above that and far below a wrong position's error."""
    request: Any = {"model": MODEL, "temperature": 0, "logprobs": 1}
    made = client.completions.create(prompt="9.11 and 9.9", max_tokens=10, **request).choices[0]
    scored = client.completions.create(
        prompt="9.11 and 9.9" + made.text, max_tokens=0, echo=True, **request
    ).choices[0]
    generated: Any = made.logprobs
    echoed: Any = scored.logprobs
    count = len(generated.token_logprobs)
    assert echoed.tokens[-count:] == generated.tokens
    assert echoed.token_logprobs[-count:] == pytest.approx(generated.token_logprobs, abs=0.1)


def test_more_answers_than_there_are_places_are_refused_for_good() -> None:
    with serving(lambda on_progress: ScriptedEngine(), capacity=3) as served:
        refusal = served.chat(n=4)
    assert refusal.status_code == 400
    assert "at most 3" in refusal.json()["error"]["message"]


def test_metrics_count_what_was_answered(served: Served, client: openai.OpenAI) -> None:
    def figures() -> dict[str, float]:
        lines = served.get("/metrics").text.splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    before = figures()
    usage = create(client, messages=[{"role": "user", "content": "hello, metrics"}]).usage
    after = figures()

    def grown(name: str) -> float:
        return after[f"hybridk2_{name}"] - before.get(f"hybridk2_{name}", 0)

    route = 'route="/v1/chat/completions",status="200"'
    assert grown(f"http_responses_total{{{route}}}") == 1
    assert grown("time_to_first_token_seconds_count") == 1
    assert grown("reply_seconds_sum") > 0
    assert grown("completion_tokens_total") == usage.completion_tokens
    assert grown("prompt_tokens_total") == usage.prompt_tokens
    assert grown('requests_total{reason="stop"}') == 1
    assert grown("expert_bytes_total") > 0
    assert after["hybridk2_up"] == 1
    assert after["hybridk2_running"] == 0


# -- Order ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "priority"),
    [
        ({}, "interactive"),
        ({"service_tier": "flex"}, "background"),
        ({"metadata": {"task": "title_generation"}}, "background"),
        ({"messages": [{"role": "user", "content": "### Task:\nGenerate a title"}]}, "background"),
        ({"messages": [{"role": "user", "content": "hi"}] * 2}, "interactive"),
    ],
)
def test_what_nobody_waits_for_goes_behind(fields: dict[str, Any], priority: str) -> None:
    body = {"model": MODEL, "messages": ASK} | fields
    assert ChatCompletionRequest.model_validate(body).priority == priority


def test_priority_and_deadline_reach_the_engine() -> None:
    engine = ScriptedEngine()
    with serving(lambda on_progress: engine, request_seconds=3000) as served:
        assert served.chat(service_tier="flex").status_code == 200
        assert until(lambda: engine.replies)
    options = engine.replies[0].options
    assert options["priority"] == "background"
    assert 2900 < options["deadline_seconds"] <= 3000

"""The chat template: the published conversations, and what is put right or refused before them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridk2.chat.template import DEFAULT_SYSTEM_PROMPT, count_tool_calls, render, render_text
from hybridk2.errors import ChatError
from hybridk2.tokenizer import CONTROL_TOKEN_NAMES, Tokenizer
from tests.small_vocabulary import small_tokenizer

SMALL = small_tokenizer()
USER = {"role": "user", "content": "hi"}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


def _call(name: str, call_id: str | None = None, arguments: Any = "{}") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def _assistant(*calls: dict[str, Any], content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **more}


def _result(call_id: str, content: Any = "ok") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


# --- the published conversations -------------------------------------------------------------


def test_all_published_conversations_render_to_the_published_text_and_ids(
    shared_dir: Path,
) -> None:
    tokenizer = Tokenizer.from_folder(shared_dir / "k2")
    vectors = json.loads((shared_dir / "k2/vectors/chat.json").read_text())
    assert len(vectors) == 14
    for name, vector in vectors.items():
        conversation = (vector["messages"], vector["tools"])
        prompt = vector["add_generation_prompt"]
        assert render_text(*conversation, prompt) == vector["text"], name
        assert render(*conversation, tokenizer, prompt) == vector["ids"], name


def test_text_and_ids_are_the_same_prompt() -> None:
    messages = [
        {"role": "developer", "content": "Be terse."},
        USER,
        _assistant(_call("weather", "x"), content="Looking.", reasoning="why not"),
        _result("x", "sunny"),
    ]
    text = render_text(messages, [WEATHER])
    assert render(messages, [WEATHER], SMALL) == SMALL.encode_with_control(text)


# --- what user text may do -------------------------------------------------------------------


def test_names_of_control_tokens_in_user_text_never_become_control_tokens() -> None:
    evil = "".join(CONTROL_TOKEN_NAMES.values())
    messages = [
        {"role": "system", "name": evil, "content": evil},
        {"role": "user", "name": evil, "content": [{"type": "text", "text": evil}]},
        _assistant(_call(evil, evil, evil), content=evil, reasoning_content=evil, name=evil),
        {"role": "tool", "tool_call_id": evil, "name": evil, "content": evil},
        {"role": "tool", "tool_call_id": evil + "?", "content": evil},
    ]
    tools = [{"type": "function", "function": {"name": evil, "description": evil}}]
    benign = json.loads(json.dumps([messages, tools]).replace(json.dumps(evil)[1:-1], "x"))
    control_ids = [i for i in render(messages, tools, SMALL) if i >= SMALL.base_size]
    assert control_ids == [i for i in render(*benign, SMALL) if i >= SMALL.base_size]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*CONTROL_TOKEN_NAMES.values(), "<|", "|>", "im_end", "a"])))
def test_any_mixture_of_markers_is_one_user_message(parts: list[str]) -> None:
    ids = render([{"role": "user", "content": "".join(parts)}], None, SMALL)
    expected = render([USER], None, SMALL)
    assert [i for i in ids if i >= SMALL.base_size] == [i for i in expected if i >= SMALL.base_size]


# --- normalisation ---------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [None, "", [], [{"type": "text", "text": ""}]])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_every_form_of_no_content_is_the_same(role: str, empty: Any) -> None:
    assert render_text([{"role": role, "content": empty}]) == render_text([{"role": role}])


def test_an_absent_reasoning_is_empty_and_never_the_word_none() -> None:
    message = _assistant(_call("f"), content="")
    for absent in ({}, {"reasoning_content": None}, {"reasoning": None}, {"reasoning": ""}):
        assert "<think></think>" in render_text([USER, message | absent])


def test_reasoning_is_read_under_both_names() -> None:
    for key in ("reasoning", "reasoning_content"):
        assert "<think>why</think>" in render_text([USER, _assistant(_call("f"), **{key: "why"})])
    both = _assistant(_call("f"), reasoning="why", reasoning_content=None)
    assert "<think>why</think>" in render_text([USER, both])


def test_reasoning_survives_only_in_the_tool_run_that_is_not_answered_yet() -> None:
    messages = [
        USER,
        _assistant(_call("f"), reasoning="first"),
        _result("a"),
        {"role": "assistant", "content": "done", "reasoning": "second"},
        USER,
        _assistant(_call("f"), reasoning="third"),
        _result("b"),
        _assistant(_call("f"), reasoning="fourth"),
    ]
    text = render_text(messages)
    assert "first" not in text
    assert "second" not in text
    assert "<think>third</think>" in text
    assert "<think>fourth</think>" in text


def test_a_developer_is_the_system() -> None:
    developer = [{"role": "developer", "content": "Be terse."}]
    assert render_text(developer) == render_text([{"role": "system", "content": "Be terse."}])
    assert DEFAULT_SYSTEM_PROMPT not in render_text(developer)


def test_the_default_system_prompt_comes_whenever_the_first_message_is_no_system_message() -> None:
    later = [USER, {"role": "system", "content": "Be terse."}]
    assert render_text(later).startswith(
        f"<|im_system|>system<|im_middle|>{DEFAULT_SYSTEM_PROMPT}<|im_end|><|im_user|>"
    )


def test_foreign_tool_ids_are_renamed_and_counted_over_the_whole_conversation() -> None:
    messages = [
        USER,
        _assistant(_call("f", "call_0"), _call("g", "call_1")),
        _result("call_1", "from g"),
        _result("call_0", "from f"),
        {"role": "assistant", "content": "done"},
        USER,
        _assistant(_call("f", "call_0")),  # numbered anew, as some clients do
        _result("call_0", "from the second f"),
        _result("who?", "from nowhere"),
    ]
    text = render_text(messages)
    assert "call_0" not in text
    assert "call_1" not in text
    for expected in (
        "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>",
        "<|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>",
        "<|tool_call_begin|>functions.f:2<|tool_call_argument_begin|>",
        "## Return of functions.g:1\nfrom g<",
        "## Return of functions.f:0\nfrom f<",
        "## Return of functions.f:2\nfrom the second f<",
        "## Return of who?\nfrom nowhere<",
    ):
        assert expected in text
    assert count_tool_calls(messages) == 3


def test_calls_that_share_an_id_get_their_results_in_order() -> None:
    calls = _assistant(_call("f", "same"), _call("g", "same"))
    text = render_text([USER, calls, _result("same", "one"), _result("same", "two")])
    assert "functions.f:0\none<" in text
    assert "functions.g:1\ntwo<" in text


def test_calls_without_an_id_get_one() -> None:
    text = render_text([USER, _assistant(_call("f"), _call("f"))])
    assert "functions.f:0<" in text
    assert "functions.f:1<" in text


def test_the_messages_of_the_caller_are_left_as_they_were() -> None:
    messages = [USER, _assistant(_call("f", "call_0")), _result("call_0")]
    before = json.dumps(messages)
    render(messages, [WEATHER], SMALL)
    assert json.dumps(messages) == before


def test_arguments_are_verbatim_when_text_and_json_when_an_object() -> None:
    for given_arguments, expected in (
        ('{"a":1 }', '{"a":1 }'),
        ("not json", "not json"),
        ({"b": "é", "a": [1, None]}, '{"b": "é", "a": [1, null]}'),
        ({}, "{}"),
        (None, "{}"),
    ):
        text = render_text([USER, _assistant(_call("f", arguments=given_arguments))])
        assert f"<|tool_call_argument_begin|>{expected}<|tool_call_end|>" in text


def test_tool_declarations_are_compact_sorted_at_every_level_and_not_escaped() -> None:
    function = {
        "name": "f",
        "description": "天气",
        "parameters": {"z": [{"b": 1, "a": 2}], "y": {}},
    }
    text = render_text([USER], [{"type": "function", "function": function}])
    assert (
        '<|im_system|>tool_declare<|im_middle|>[{"function":{"description":"天气","name":"f",'
        '"parameters":{"y":{},"z":[{"a":2,"b":1}]}},"type":"function"}]<|im_end|>'
    ) in text


@pytest.mark.parametrize("tools", [None, []])
def test_no_tools_declare_nothing(tools: Any) -> None:
    assert render_text([USER], tools) == render_text([USER])


# --- refusals --------------------------------------------------------------------------------


def _deep() -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for _ in range(100_000):
        nested = {"a": nested}
    return nested


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ("hello", "messages:"),
        (None, "messages:"),
        ([3], "messages[0]:"),
        ([{}], "messages[0].role:"),
        ([USER, {"role": "narrator", "content": "x"}], "messages[1].role:"),
        ([{"role": ["user"]}], "messages[0].role:"),
        ([{"role": "user", "content": 3}], "messages[0].content:"),
        ([{"role": "user", "content": {"text": "x"}}], "messages[0].content:"),
        ([{"role": "user", "content": b"x"}], "messages[0].content:"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]:"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text:"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
            "messages[0].content[0].type:",
        ),
        ([{"role": "user", "content": "x", "name": 3}], "messages[0].name:"),
        ([{"role": "user", "tool_calls": [_call("f")]}], "messages[0].tool_calls:"),
        ([{"role": "assistant", "reasoning_content": 3}], "messages[0].reasoning_content:"),
        ([{"role": "assistant", "reasoning": []}], "messages[0].reasoning:"),
        ([{"role": "assistant", "tool_calls": 3}], "messages[0].tool_calls:"),
        ([_assistant({"type": "custom"})], "messages[0].tool_calls[0].type:"),
        ([_assistant({"id": "x"})], "messages[0].tool_calls[0].function:"),
        ([_assistant(_call(""))], "messages[0].tool_calls[0].function.name:"),
        ([_assistant(_call("f", 3))], "messages[0].tool_calls[0].id:"),  # type: ignore[arg-type]
        ([_assistant(_call("f"), _call("f", arguments=[1]))], "tool_calls[1].function.arguments:"),
        ([_assistant(_call("f", arguments={"a": float("nan")}))], "[0].function.arguments:"),
        ([_assistant(_call("f", arguments={"a": {1, 2}}))], "[0].function.arguments:"),
        ([_assistant(_call("f", arguments=_deep()))], "[0].function.arguments:"),
        ([USER, {"role": "tool", "content": "x"}], "messages[1].tool_call_id:"),
        ([USER, _result("")], "messages[1].tool_call_id:"),
    ],
)
def test_a_malformed_message_is_refused_by_the_name_of_its_field(messages: Any, field: str) -> None:
    with pytest.raises(ChatError) as caught:
        render(messages, None, SMALL)
    assert field in str(caught.value)
    with pytest.raises(ChatError):
        count_tool_calls(messages)


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        ({"type": "function"}, "tools:"),
        ("tools", "tools:"),
        ([3], "tools[0]:"),
        ([WEATHER, {"type": "web_search"}], "tools[1].type:"),
        ([{"type": "function"}], "tools[0].function:"),
        ([{"type": "function", "function": {}}], "tools[0].function.name:"),
        (
            [{"function": {"name": "f", "parameters": "string"}}],
            "tools[0].function.parameters:",
        ),
        ([{"function": {"name": "f", "parameters": {"a": float("inf")}}}], "tools:"),
        ([{"function": {"name": "f", "parameters": _deep()}}], "tools:"),
        ([{"function": {"name": "f", "parameters": {1: 1, "a": 2}}}], "tools:"),
    ],
)
def test_a_malformed_tool_is_refused_by_the_name_of_its_field(tools: Any, field: str) -> None:
    with pytest.raises(ChatError) as caught:
        render([USER], tools, SMALL)
    assert field in str(caught.value)


_NEAR_JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.sampled_from(["user", "assistant", "tool", "system", "function", "text", "", "\ud800"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "name",
                    "reasoning",
                    "tool_calls",
                    "tool_call_id",
                    "id",
                    "type",
                    "function",
                    "arguments",
                    "parameters",
                    "text",
                ]
            ),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=30,
)


@settings(max_examples=300, deadline=None)
@given(_NEAR_JSON, _NEAR_JSON)
def test_whatever_is_sent_is_a_prompt_or_a_chat_error(messages: Any, tools: Any) -> None:
    for sent in ((messages, tools), ([messages], None), ([USER], [tools])):
        try:
            ids = render(*sent, SMALL)
        except ChatError:
            continue
        assert ids[-1] == SMALL.control.im_middle


def test_an_error_never_echoes_what_was_sent() -> None:
    huge = "secret " * 100_000
    for message in (
        {"role": huge},
        {"role": "user", "content": {huge: huge}},
        {"role": "user", "content": [{"type": huge}]},
        {"role": "user", "name": [huge]},
    ):
        with pytest.raises(ChatError) as caught:
            render([message], None, SMALL)
        assert "secret" not in str(caught.value)
        assert len(str(caught.value)) < 300

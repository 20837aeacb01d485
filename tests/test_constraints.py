"""Replies held to their form: every tool_choice and response_format, written by random weights."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from hybridk2.assistant import Assistant
from hybridk2.chat.constraints import Constraints, ReplyConstraint
from hybridk2.chat.generation import Reply, collect
from hybridk2.chat.parser import OutputParser
from hybridk2.config import EngineConfig
from hybridk2.errors import ReplyError, RequestError
from hybridk2.sampling import SamplingParams
from hybridk2.synthesis import config_for_tokenizer, synthesize, synthetic_config
from tests.random_schemas import random_arguments, random_schema
from tests.small_vocabulary import small_tokenizer, write_vocabulary

SMALL = small_tokenizer()
CONTROL = SMALL.control
CONSTRAINTS = Constraints(SMALL)

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"],
    "additionalProperties": False,
}
CLOCK = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"get_weather": WEATHER, "get_time": CLOCK}


def declared(**schemas: Any) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in schemas.items()
    ]


TOOLS = declared(**SCHEMAS)


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def json_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def held(*args: Any, **options: Any) -> ReplyConstraint:
    constraint = CONSTRAINTS.for_reply(*args, **options)
    assert constraint is not None
    return constraint


Preference = Callable[[Sequence[int]], int | None]


def write(
    constraint: ReplyConstraint,
    budget: int,
    seed: int,
    prefer: Preference = lambda _: None,
    history: int = 0,
) -> Reply:
    """The reply of random logits under the mask, read by the parser as every reply is.

    prefer: may pick one of the allowed ids, for replies that chance would hardly write.
    """
    random = np.random.default_rng(seed)
    parser = OutputParser(SMALL, history)
    events = []
    for _ in range(budget):
        allowed = np.flatnonzero(constraint.mask())
        picked = prefer(allowed.tolist())
        token_id = int(random.choice(allowed)) if picked is None else picked
        constraint.accept(token_id)
        events += parser.push(token_id)
        if parser.ended:
            break
    return collect([*events, *parser.finish("stop" if parser.ended else "length")])


def preferring(*token_ids: int) -> Preference:
    """Take the first of these that is allowed."""
    return lambda allowed: next((i for i in token_ids if i in allowed), None)


def calls_of(reply: Reply) -> list[tuple[str, Any]]:
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in reply.tool_calls
    ]


def check_calls(reply: Reply, schemas: dict[str, Any], first_number: int = 0) -> None:
    for position, (call, (name, arguments)) in enumerate(
        zip(reply.tool_calls, calls_of(reply), strict=True)
    ):
        assert call["id"] == f"functions.{name}:{first_number + position}"
        Draft202012Validator(schemas[name]).validate(arguments)


# --- tool_choice -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_a_named_tool_is_called_with_valid_arguments_whatever_its_schema(seed: int) -> None:
    schemas = {"other": CLOCK, "chosen": random_arguments(seed)}
    constraint = held(declared(**schemas), named("chosen"), max_tokens=400, max_think_tokens=20)
    reply = write(constraint, 400, seed)
    assert reply.finish.reason == "tool_calls"
    assert {name for name, _ in calls_of(reply)} == {"chosen"}
    assert reply.content is None
    check_calls(reply, schemas)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("parallel", [True, False])
def test_required_means_a_call_of_some_tool_and_no_text(seed: int, parallel: bool) -> None:
    constraint = held(
        TOOLS, "required", parallel, tool_calls_in_history=7, max_tokens=300, max_think_tokens=10
    )
    # As many calls as it may, with short strings.
    prefer = preferring(CONTROL.tool_call_begin, CONTROL.tool_call_end, ord('"'))
    reply = write(constraint, 300, seed, prefer, history=7)
    assert reply.finish.reason == "tool_calls"
    assert reply.content is None
    assert len(reply.tool_calls) == 1 if not parallel else len(reply.tool_calls) > 1
    check_calls(reply, SCHEMAS, first_number=7)


@pytest.mark.parametrize("seed", range(20))
def test_auto_leaves_thought_and_text_free_and_holds_the_calls(seed: int) -> None:
    constraint = held(TOOLS, "auto", max_tokens=200)
    steps = iter(SMALL.encode_with_control("<think>hm</think>hello<|tool_calls_section_begin|>"))

    def prefer(allowed: Sequence[int]) -> int | None:
        token_id = next(steps, None)
        assert token_id is None or token_id in allowed
        return token_id

    reply = write(constraint, 200, seed, prefer)
    assert (reply.reasoning, reply.content) == ("hm", "hello")
    assert reply.finish.reason == "tool_calls"
    check_calls(reply, SCHEMAS)


def test_auto_may_end_without_a_call() -> None:
    reply = write(held(TOOLS), 50, 0, preferring(CONTROL.im_end))
    assert (reply.finish.reason, reply.tool_calls) == ("stop", [])


def test_outside_a_section_no_token_of_a_call_may_come() -> None:
    inside = [
        *(CONTROL.tool_call_begin, CONTROL.tool_call_argument_begin),
        *(CONTROL.tool_call_end, CONTROL.tool_calls_section_end),
    ]
    for choice in ("auto", "none"):
        mask = held(TOOLS, choice).mask()
        assert not mask[[*inside, *SMALL.unmapped_ids]].any()
        assert mask[CONTROL.tool_calls_section_begin] == (choice == "auto")
        assert mask[: SMALL.base_size].all()
        assert mask[[CONTROL.im_end, CONTROL.think, CONTROL.end_think]].all()


def test_allowed_tools_are_the_only_ones_called() -> None:
    for mode in ("auto", "required"):
        choice = {
            "type": "allowed_tools",
            "allowed_tools": {"mode": mode, "tools": [named("get_time")]},
        }
        for seed in range(10):
            constraint = held(TOOLS, choice, max_tokens=120, max_think_tokens=5)
            reply = write(constraint, 120, seed, preferring(CONTROL.tool_calls_section_begin))
            assert {name for name, _ in calls_of(reply)} == {"get_time"}


def test_names_that_begin_alike_are_told_apart() -> None:
    schemas = dict.fromkeys(("get", "get_a", "get_ab", "get-a.b", "2nd"), CLOCK)
    found = set()
    for seed in range(60):
        constraint = held(declared(**schemas), "required", max_tokens=100, max_think_tokens=0)
        reply = write(constraint, 100, seed)
        check_calls(reply, schemas)
        found |= {name for name, _ in calls_of(reply)}
    assert found == set(schemas)


def test_a_tool_without_parameters_is_called_without_arguments() -> None:
    tools = [{"type": "function", "function": {"name": "now"}}]
    reply = write(held(tools, "required", False, max_tokens=60, max_think_tokens=0), 60, 1)
    assert calls_of(reply) == [("now", {})]


@pytest.mark.parametrize("strict", [True, False, None])
def test_what_can_be_held_is_held_strict_or_not(strict: bool | None) -> None:
    tools = declared(get_weather=WEATHER)
    tools[0]["function"]["strict"] = strict
    reply = write(held(tools, "required", max_tokens=100, max_think_tokens=5), 100, 3)
    check_calls(reply, SCHEMAS)


# What no grammar holds: two letters that differ.
PAIR = {
    "type": "object",
    "properties": {
        "pair": {
            "type": "array",
            "items": {"enum": ["a", "b"]},
            "minItems": 2,
            "maxItems": 2,
            "uniqueItems": True,
        }
    },
    "required": ["pair"],
    "additionalProperties": False,
}


def strictly(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**tool, "function": {**tool["function"], "strict": True}} for tool in tools]


def test_a_call_that_breaks_what_could_not_be_held_has_no_end() -> None:
    outcomes = {"tool_calls": 0, "refused": 0}
    for seed in range(40):
        constraint = held(declared(pair=PAIR), "required", False, max_tokens=90, max_think_tokens=0)
        try:
            reply = write(constraint, 90, seed)
        except ReplyError:
            outcomes["refused"] += 1
        else:
            check_calls(reply, {"pair": PAIR})
            outcomes["tool_calls"] += reply.finish.reason == "tool_calls"
    assert sum(outcomes.values()) == 40
    assert min(outcomes.values()) > 5, outcomes  # chance makes half of the pairs equal


def test_a_failed_check_names_the_tool_of_its_own_request() -> None:
    impossible = {**PAIR, "properties": {"pair": {**PAIR["properties"]["pair"], "maxItems": 2}}}
    impossible["properties"]["pair"]["items"] = {"const": "a"}
    for name in ("first", "second"):  # one schema, compiled once
        constraint = held(declared(**{name: impossible}), "required", max_tokens=90)
        with pytest.raises(ReplyError, match=rf"tools\[0\].function.parameters \({name}\): what"):
            write(constraint, 90, 0)


def test_a_strict_tool_or_format_is_held_wholly_or_refused() -> None:
    with pytest.raises(RequestError, match=r"parameters \(pair\): .*uniqueItems"):
        CONSTRAINTS.for_reply(strictly(declared(pair=PAIR)))
    strict_format = json_format(PAIR)
    strict_format["json_schema"]["strict"] = True
    with pytest.raises(RequestError, match=r"json_schema\.schema: .*uniqueItems"):
        CONSTRAINTS.for_reply(response_format=strict_format)


def test_a_structured_answer_that_breaks_what_could_not_be_held_has_no_end() -> None:
    never = {"const": 7, "not": {"const": 7}}
    constraint = held(response_format=json_format(never), max_tokens=40, max_think_tokens=0)
    with pytest.raises(
        ReplyError, match=r"response_format\.json_schema\.schema: what the model wrote"
    ):
        write(constraint, 40, 0)


# --- response_format -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(100))
def test_structured_output_is_one_valid_value_and_the_end(seed: int) -> None:
    schema = random_schema(seed)
    constraint = held(response_format=json_format(schema), max_tokens=400, max_think_tokens=20)
    reply = write(constraint, 400, seed)
    assert reply.finish.reason == "stop"
    assert reply.content is not None
    Draft202012Validator(schema).validate(json.loads(reply.content))


@pytest.mark.parametrize("seed", range(10))
def test_json_object_is_any_object(seed: int) -> None:
    constraint = held(response_format={"type": "json_object"}, max_tokens=100, max_think_tokens=5)
    assert isinstance(json.loads(write(constraint, 100, seed).content or ""), dict)


def test_tools_and_a_format_leave_the_choice_between_a_call_and_a_value() -> None:
    kinds = set()
    for seed in range(30):
        constraint = held(TOOLS, "auto", None, json_format({"enum": ["yes", "no"]}), max_tokens=90)
        reply = write(constraint, 90, seed)
        kinds.add(reply.finish.reason)
        check_calls(reply, SCHEMAS)
        assert reply.tool_calls or json.loads(reply.content or "") in ("yes", "no")
    assert kinds == {"stop", "tool_calls"}


def test_a_required_call_comes_before_the_format() -> None:
    constraint = held(
        TOOLS, "required", None, json_format(WEATHER), max_tokens=90, max_think_tokens=5
    )
    assert write(constraint, 90, 0).finish.reason == "tool_calls"


def test_text_and_nothing_at_all_are_not_held() -> None:
    assert CONSTRAINTS.for_reply() is None
    assert CONSTRAINTS.for_reply([], "none", None, {"type": "text"}) is None


# --- thought and budget ----------------------------------------------------------------------


def test_thought_ends_after_so_many_tokens() -> None:
    constraint = held(TOOLS, "required", max_tokens=500, max_think_tokens=12)
    reply = write(constraint, 500, 0, preferring(CONTROL.think, ord("x")))
    assert reply.reasoning == "x" * 12
    assert reply.finish.reason == "tool_calls"


@pytest.mark.parametrize("spare", range(12))
def test_thought_ends_while_a_call_still_fits(spare: int) -> None:
    tools = declared(get_time=CLOCK)
    shortest = len(SMALL.encode_with_control(
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_time:999"
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
    ))  # fmt: skip
    constraint = held(tools, "required", max_tokens=shortest + spare)
    reply = write(constraint, shortest + spare, spare, preferring(CONTROL.think, ord("x")))
    assert calls_of(reply)[0] == ("get_time", {})
    assert reply.finish.reason == "tool_calls"
    assert len(reply.reasoning) == max(spare - 2, 0)


def test_a_budget_below_the_shortest_call_is_used_up() -> None:
    constraint = held(TOOLS, "required", max_tokens=20)
    assert write(constraint, 20, 0).finish.reason == "length"


def test_no_section_is_opened_that_could_not_be_closed() -> None:
    constraint = held(TOOLS, "auto", max_tokens=60)
    prefer = preferring(*range(ord("a"), ord("z")))
    opened_with = None
    for tokens_left in range(60, 0, -1):
        mask = constraint.mask()
        if not mask[CONTROL.tool_calls_section_begin]:
            break
        opened_with = tokens_left
        constraint.accept(prefer(np.flatnonzero(mask).tolist()) or 0)
    assert opened_with is not None
    constraint = held(TOOLS, "auto", max_tokens=opened_with)
    reply = write(constraint, opened_with, 0, preferring(CONTROL.tool_calls_section_begin))
    assert reply.finish.reason == "tool_calls"
    check_calls(reply, SCHEMAS)


# --- with an engine --------------------------------------------------------------------------


def test_a_checkpoint_of_random_weights_calls_the_named_tool(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    config = config_for_tokenizer(synthetic_config("tiny"), tmp_path)
    synthesize(tmp_path / "checkpoint", config, seed=3, tokenizer_folder=tmp_path)
    choices = EngineConfig(model=str(tmp_path / "checkpoint"), context_tokens=4096, threads=2)
    assistant = Assistant.load(choices)
    constraints = Constraints(assistant.tokenizer)
    question = [{"role": "user", "content": "hello"}]
    for seed in range(4):
        schemas = {"chosen": random_arguments(seed)}
        tools = declared(**schemas)
        constraint = constraints.for_reply(
            tools, named("chosen"), max_tokens=200, max_think_tokens=20
        )
        params = SamplingParams(max_tokens=200, seed=seed)
        reply = assistant.begin(question, tools, params, constraint=constraint)
        events = []
        while not reply.done:
            assistant.step()
            events += reply.poll()
        whole = collect([*events, *reply.poll()])
        assert whole.finish.reason == "tool_calls"
        check_calls(whole, schemas)
    assistant.close()


# --- mistakes --------------------------------------------------------------------------------


def test_schemas_are_bounded_together() -> None:
    filling = {"description": "x" * 90_000}
    tools = declared(**{f"tool_{i}": {**CLOCK, **filling} for i in range(5)})
    assert CONSTRAINTS.for_reply(tools[:4]) is not None
    with pytest.raises(RequestError, match="400,000 characters together"):
        CONSTRAINTS.for_reply(tools)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TOOLS, "always"), "tool_choice: expected"),
        ((TOOLS, {"type": "function"}), "tool_choice: expected a function with a name"),
        ((TOOLS, named("other")), "tool_choice: names a function that is not among the tools"),
        ((TOOLS, {"type": "allowed_tools"}), "tool_choice.allowed_tools"),
        (([], "required"), "no tools to call"),
        (([*TOOLS, *TOOLS],), r"tools\[2\].function.name: the tool get_weather is declared twice"),
        ((declared(**{"7": CLOCK}),), r"tools\[0\].function.name"),
        ((declared(**{"a b": CLOCK}),), r"tools\[0\].function.name"),
        ((declared(f={"type": "array"}),), r"parameters \(f\): expected the type \"object\""),
        ((declared(f="{}"),), r"parameters \(f\): expected a JSON schema"),
        (
            (strictly(declared(f={"properties": {"a": {"not": {}}}})),),
            r"parameters \(f\): .*not",
        ),
        (([{"type": "function"}],), r"tools\[0\].function: expected a function with a name"),
        ((None, None, None, {"type": "xml"}), "response_format.type"),
        ((None, None, None, {"type": "json_schema"}), "json_schema.schema: expected"),
        ((None, None, None, json_format({"type": "x"})), "response_format.json_schema.schema: "),
    ],
)
def test_what_cannot_be_held_says_where_and_why(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        CONSTRAINTS.for_reply(*arguments)

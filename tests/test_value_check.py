"""Schemas with more than a grammar holds: jsonschema is the judge of every value that may end."""

import json
import math
import random
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from hybridk2.chat.json_values import SchemaCompiler
from hybridk2.chat.schemas import subschemas
from hybridk2.chat.value_check import ValueCheck
from hybridk2.errors import ReplyError, RequestError
from tests.random_schemas import random_schema
from tests.small_vocabulary import small_tokenizer

SMALL = small_tokenizer()
COMPILER = SchemaCompiler(SMALL)

LETTERS = {"type": "array", "items": {"enum": ["a", "b"]}}
OBJECT = {"type": "object"}


def ends(schema: Any, text: str) -> bool:
    """Whether a whole value, which the grammar lets through, may end there."""
    value = COMPILER.compile(schema, "here", strict=False).begin()
    for token_id in SMALL.encode(text):
        assert value.mask(10**6)[0][token_id], "the grammar holds it"
        value.accept(token_id)
    assert value.mask(10**6)[1], "the grammar holds its end"
    try:
        value.end("here")
    except ReplyError:
        return False
    return True


CHECKED = [
    ("uniqueItems", {**LETTERS, "uniqueItems": True}, '["a","b"]', '["a","a"]'),
    ("uniqueItems", {"items": {}, "uniqueItems": True}, '[{"a":1},{"a":2}]', '[{"a":1},{"a":1.0}]'),
    ("not", {"type": "string", "not": {"pattern": "x$"}}, '"xy"', '"yx"'),
    ("not", {"anyOf": [{"not": {}}, {"type": "integer"}]}, "3", '"a"'),
    ("contains", {**LETTERS, "contains": {"const": "b"}}, '["a","b"]', '["a"]'),
    (
        "minContains",
        {**LETTERS, "contains": {"const": "b"}, "minContains": 2},
        '["b","b"]',
        '["a","b"]',
    ),
    (
        "if",
        {
            "properties": {"kind": {"enum": ["ship", "shop"]}, "port": {"type": "string"}},
            "required": ["kind"],
            "if": {"properties": {"kind": {"const": "ship"}}},
            "then": {"required": ["port"]},
            "else": {"not": {"required": ["port"]}},
        },
        '{"kind":"ship","port":""}',
        '{"kind":"shop","port":""}',
    ),
    ("propertyNames", {**OBJECT, "propertyNames": {"maxLength": 2}}, '{"ab":1}', '{"abc":1}'),
    (
        "dependentRequired",
        {**OBJECT, "dependentRequired": {"a": ["b"]}},
        '{"a":1,"b":1}',
        '{"a":1}',
    ),
    (
        "dependentSchemas",
        {**OBJECT, "dependentSchemas": {"a": {"maxProperties": 1}}},
        '{"a":1}',
        '{"a":1,"b":2}',
    ),
    ("minProperties", {**OBJECT, "minProperties": 2}, '{"a":1,"b":1}', '{"a":1,"a":1}'),
    ("oneOf", {"oneOf": [{"type": "integer"}, {"minimum": 5}]}, "3", "7"),
    (
        "uniqueItems",
        {"$defs": {"letters": {**LETTERS, "uniqueItems": True}},
         "properties": {"a": {"$ref": "#/$defs/letters"}}},
        '{"a":["a"]}',
        '{"a":["b","b"]}',
    ),
]  # fmt: skip


@pytest.mark.parametrize(("keyword", "schema", "valid", "invalid"), CHECKED)
def test_what_no_grammar_holds_is_checked_at_the_end_and_refused_where_it_must_be_held(
    keyword: str, schema: Any, valid: str, invalid: str
) -> None:
    judge = Draft202012Validator(schema)
    assert judge.is_valid(json.loads(valid))
    assert not judge.is_valid(json.loads(invalid))
    assert ends(schema, valid)
    assert not ends(schema, invalid)
    with pytest.raises(RequestError, match=rf"here: .*{keyword}"):
        COMPILER.compile(schema, "here", strict=True)


def with_more(schema: dict[str, Any], seed: int) -> dict[str, Any]:
    """The schema with keywords that a grammar does not hold, here and there."""
    draw = random.Random(seed)
    additions = [
        lambda: {"uniqueItems": True},
        lambda: {"not": random_schema(draw.randrange(1000))},
        lambda: {"contains": random_schema(draw.randrange(1000)), "minContains": 0},
        lambda: {"if": {"required": ["a"]}, "then": {"required": ["b"]}, "else": {}},
        lambda: {"propertyNames": {"maxLength": draw.randrange(3, 9)}},
        lambda: {"dependentRequired": {"a": ["b"], "name": ["count"]}},
    ]
    for node in list(subschemas(schema)):
        if draw.random() < 0.4:
            node.update(draw.choice(additions)())
    schema.update(draw.choice(additions)())
    return schema


def finite(digits: str) -> float:
    """A number that floats hold: of 1e999 the two libraries think differently."""
    if math.isinf(float(digits)):
        raise ValueError("beyond floats")
    return float(digits)


def test_a_value_ends_exactly_when_the_judge_finds_it_valid() -> None:
    ended = {True: 0, False: 0}
    for seed in range(300):
        schema = with_more(random_schema(seed), seed)
        value = COMPILER.compile(schema, "here", strict=False).begin()
        draw = np.random.default_rng(seed)
        ids: list[int] = []
        for tokens_left in range(60 + seed, -1, -1):
            mask, may_end = value.mask(tokens_left)
            choices = np.flatnonzero(mask)
            if may_end and (not len(choices) or draw.random() < 1 / (1 + len(choices))):
                break
            if not len(choices):
                break
            ids.append(int(draw.choice(choices)))
            value.accept(ids[-1])
        text = SMALL.decode(ids)
        try:
            found = json.loads(text, parse_float=finite)
        except ValueError:
            continue  # the budget was below the shortest value
        valid = Draft202012Validator(schema).is_valid(found)
        try:
            value.end("here")
        except ReplyError:
            assert not valid, (seed, text)
        else:
            assert valid, (seed, text)
        ended[valid] += 1
    assert min(ended.values()) > 30, ended


def test_where_all_of_a_schema_is_held_nothing_is_checked() -> None:
    recursive = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    branches = {"oneOf": [{"type": "null"}, {"type": "array", "uniqueItems": False}]}
    for schema in (recursive, branches):
        assert COMPILER.compile(schema, "here", strict=False).check is None


def doubled(levels: int) -> Any:
    """2 ** levels schemas, references followed."""
    definitions: dict[str, Any] = {
        f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(levels)
    }
    return {"not": {"$ref": "#/$defs/d0"}, "$defs": {**definitions, f"d{levels}": {"type": "null"}}}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"not": {"$ref": "#"}}, "refers to itself"),
        ({"items": {"$ref": "#"}, "uniqueItems": True}, "refers to itself"),
        (doubled(60), "refers to itself, has more than 1,000 schemas"),
        ({"not": {"anyOf": [{"pattern": "a"}] * 65}}, "64 patterns"),
        ({"not": {"patternProperties": {f"a{n}": {} for n in range(65)}}}, "64 patterns"),
        ({"items": {"anyOf": [{"const": n} for n in range(1001)]}, "uniqueItems": True}, "1,000"),
        ({"not": {"pattern": "(?=a)b"}}, "looks around"),
        ({"not": {"pattern": "(a{1,1000}){1,1000}"}}, "large"),
        ({"not": {"type": "thing"}}, "not one of its draft"),
        ({"$schema": "http://127.0.0.1:9/schema", "not": {}}, "not one of its draft"),
        ({"not": {"$ref": "http://127.0.0.1:9/schema"}}, "leads to nothing"),
        ({"not": {"$dynamicRef": "#"}}, "dynamicRef"),
        ({"uniqueItems": True, "allOf": [{"unevaluatedItems": False}]}, "unevaluatedItems"),
        ({"unevaluatedItems": False}, "unevaluatedItems"),
    ],
)
def test_what_cannot_be_checked_in_bounded_time_is_refused(schema: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as refused:
        COMPILER.compile(schema, "here", strict=False)
    assert str(refused.value).startswith("here: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", [b"[" * 5000 + b"]" * 5000, b"[" + b"1," * 5_000_000 + b"1]"])
def test_a_value_beyond_what_can_be_checked_is_not_let_through(text: bytes) -> None:
    check = ValueCheck({"not": {"type": "string"}}, ["not"], "here")
    with pytest.raises(ReplyError, match="here: what the model wrote was too"):
        check.require(text, "here")


def test_a_pattern_that_is_a_bomb_elsewhere_is_matched_in_linear_time() -> None:
    # Backtracking would take 2 ** 5000 steps.
    check = ValueCheck({"not": {"pattern": "^(x+x+)+y$"}}, ["not"], "here")
    check.require(b'"' + b"x" * 5000 + b'"', "here")


def test_a_failed_check_says_what_failed_and_repeats_nothing_of_the_value() -> None:
    check = ValueCheck({"not": {"const": "secret"}}, ["not"], "here")
    with pytest.raises(ReplyError) as failed:
        check.require(b'"secret"', "tools[0].function.parameters (f)")
    assert str(failed.value).startswith("tools[0].function.parameters (f): what the model wrote")
    assert "not cannot be held" in str(failed.value)
    assert "secret" not in str(failed.value)

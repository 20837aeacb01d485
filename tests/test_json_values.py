"""JSON values under a schema: jsonschema is the judge, models of random weights do the writing."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from hybridk2.chat.json_values import JsonSchema, SchemaCompiler
from hybridk2.errors import RequestError
from hybridk2.tokenizer import Tokenizer
from tests.random_schemas import random_schema
from tests.small_vocabulary import small_tokenizer

SMALL = small_tokenizer()
COMPILER = SchemaCompiler(SMALL)

NODE = {
    "type": "object",
    "properties": {"next": {"$ref": "#/$defs/node"}, "value": {"type": "integer"}},
    "required": ["value"],
}
LIST = {"$defs": {"node": NODE}, "$ref": "#/$defs/node"}
EXPRESSION = {
    "$defs": {
        "expression": {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        "left": {"$ref": "#/$defs/expression"},
                        "right": {"$ref": "#/$defs/expression"},
                    },
                    "required": ["left", "right"],
                    "additionalProperties": False,
                },
                {"type": "integer"},
            ]
        }
    },
    "$ref": "#/$defs/expression",
}


def compiled(
    schema: Any, compiler: SchemaCompiler = COMPILER, *, strict: bool = True
) -> JsonSchema:
    return compiler.compile(schema, "here", strict=strict)


def accepts(schema: Any, text: str, *, strict: bool = True) -> bool:
    """Whether a whole value is let through to its end. Raises what its end raises."""
    value = compiled(schema, strict=strict).begin()
    for token_id in SMALL.encode(text):
        mask, _ = value.mask(10**6)
        if not mask[token_id]:
            return False
        value.accept(token_id)
    if value.mask(10**6)[1]:
        value.end("here")
        return True
    return False


def written(schema: JsonSchema, tokenizer: Tokenizer, seed: int, budget: int) -> str | None:
    """What random logits write under the mask; None if the budget ran out before the end."""
    random = np.random.default_rng(seed)
    value = schema.begin()
    ids: list[int] = []
    for tokens_left in range(budget, -1, -1):
        mask, may_end = value.mask(tokens_left)
        choices = np.flatnonzero(mask)
        if may_end and (not len(choices) or random.random() < 1 / (1 + len(choices))):
            return tokenizer.decode(ids)
        if not tokens_left:
            return None
        ids.append(int(random.choice(choices)))
        value.accept(ids[-1])
    return None


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"type": "integer", "minimum": 3, "exclusiveMaximum": 12}, "11", "12"),
        ({"type": "number", "multipleOf": 0.5}, "1.5", "1.25"),
        ({"type": "string", "minLength": 2, "maxLength": 3}, '"é中"', '"é"'),
        ({"type": "string", "pattern": r"^\d{3}$"}, '"123"', '"12a"'),
        ({"type": "string", "pattern": "b"}, '"abc"', '"ac"'),
        ({"type": "string", "format": "date"}, '"2024-02-29"', '"2024-13-01"'),
        ({"enum": ["a", 1, None]}, "null", '"b"'),
        ({"const": {"a": [1]}}, '{"a":[1]}', '{"a":[2]}'),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, "[true,false]", "[true]"),
        ({"type": "array", "prefixItems": [{"type": "null"}], "items": False}, "[null]", "[1]"),
        ({"type": "object", "required": ["a"]}, '{"a":1}', "{}"),
        ({"properties": {"a": {}}, "additionalProperties": False}, '{"a":[]}', '{"b":1}'),
        (
            {"type": "object", "patternProperties": {"^x": {"type": "null"}}},
            '{"x1":null}',
            '{"x":1}',
        ),
        ({"anyOf": [{"type": "null"}, {"type": "integer"}]}, "7", '"7"'),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, '"7"', "null"),
        ({"allOf": [{"type": "integer"}, {"minimum": 5}]}, "5", "4"),
        (LIST, '{"next":{"value":1},"value":2}', '{"next":{},"value":2}'),
        (EXPRESSION, '{"left":1,"right":{"left":2,"right":3}}', '{"left":1}'),
        ({"type": ["string", "null"]}, "null", "1"),
    ],
)
def test_the_grammar_and_the_judge_agree(schema: Any, valid: str, invalid: str) -> None:
    judge = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    assert judge.is_valid(json.loads(valid))
    assert not judge.is_valid(json.loads(invalid))
    assert accepts(schema, valid)
    assert not accepts(schema, invalid)


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ('{"a":1}', True),
        ('{"a": 1, "b": [1, 2]}', True),
        ('{\n  "a": 1,\n\t"b": 2\n}', True),
        ('{\n \t"a": 1}', False),
        ('{\n  "a": 1,\n  "b": 2\n}', True),
        ('{\n\t"a": 1\n}', True),
        ('{  "a": 1}', False),
        ('{"a":\n\n1}', False),
        (' {"a":1}', False),
        ('{"\\u0061":1}', False),
        ('{"a":"\\n\\" \\\\"}', True),
    ],
)
def test_white_space_is_what_models_write_and_never_more(text: str, is_right: bool) -> None:
    assert accepts({"type": "object"}, text) is is_right


@pytest.mark.parametrize("seed", range(250))
def test_random_weights_write_valid_values_within_any_budget_that_holds_one(seed: int) -> None:
    schema = random_schema(seed)
    held = compiled(schema)
    spare = [0, 1, 2, 5, 10, 20, 50, 100, 300][seed % 9]
    text = written(held, SMALL, seed, held.completion_tokens + spare)
    assert text is not None, "cut off"
    Draft202012Validator(schema).validate(json.loads(text))


def test_where_a_one_of_is_held_without_a_check_only_one_branch_applies() -> None:
    num_held = 0
    for seed in range(80):
        schema = {"oneOf": [random_schema(1_000 * branch + seed) for branch in range(2)]}
        held = compiled(schema, strict=False)
        if held.check is None:
            num_held += 1
            text = written(held, SMALL, seed, held.completion_tokens + 60)
            assert text is not None, "cut off"
            Draft202012Validator(schema).validate(json.loads(text))
    assert 20 < num_held < 80


@pytest.mark.parametrize("seed", range(40))
def test_one_token_never_makes_a_completion_longer_than_was_reckoned(seed: int) -> None:
    schema = compiled(random_schema(seed))
    random = np.random.default_rng(seed)
    value = schema.begin()
    before = schema.completion_tokens
    for step in range(60):
        choices = np.flatnonzero(value.mask(10**6)[0])
        if not len(choices):
            break
        value.accept(int(random.choice(choices)))
        completion = value.completion()
        assert completion is not None, f"no way to end it after {step} tokens"
        assert len(completion) <= before + schema.growth_tokens
        before = len(completion)


def test_a_budget_that_is_not_short_leaves_the_model_free() -> None:
    schema = compiled({"type": "object", "properties": {"a": {"type": "string"}}})
    value = schema.begin()
    for token_id in b'{"a":"':
        value.accept(token_id)
    free, _ = value.mask(1_000)
    assert np.count_nonzero(free) > 100
    forced, _ = value.mask(schema.growth_tokens)
    assert np.flatnonzero(forced).tolist() == [ord('"')]


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "string", "pattern": "^(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "thing"}, "Invalid type"),
        ({"$ref": "#/$defs/nowhere"}, "leads to nothing"),
        ({"$ref": "http://example.com/schema"}, "leads to nothing"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "unsatisfiable"),
        ({"type": "integer", "multipleOf": 7, "minimum": 100, "maximum": 104}, "multiple of 7"),
        ({"type": "object", "minProperties": 5}, "minProperties"),
        ({"$defs": {"a": {"properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}},
          "$ref": "#/$defs/a"}, "requiring itself"),
        ({"type": "string", "minLength": 10**9}, "more than"),
        ({"type": "array", "minItems": 10**6}, "more than"),
        ({"type": "string", "default": float("nan")}, "no JSON"),
        ({"const": "\ud800"}, "no JSON"),
        ({"type": "string", "description": "x" * 200_000}, "more than 100,000"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused_with_place_and_reason(schema: Any, reason: str) -> None:
    with pytest.raises(RequestError) as refused:
        compiled(schema)
    message = str(refused.value)
    assert message.startswith("here: ")
    assert reason in message
    assert "\n" not in message
    assert len(message) < 400


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def chained(length: int) -> Any:
    """A schema that is deep without being nested."""
    definitions = {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(length)}
    definitions[f"d{length}"] = {"type": "string"}
    return {"type": "array", "items": {"$ref": "#/$defs/d0"}, "$defs": definitions}


@pytest.mark.parametrize(
    "schema",
    [
        nested(501),
        chained(260),
        chained(1_800),  # ended the process once: the grammar library's recursion has no bound
        {**chained(1_800), "$defs": {**chained(1_800)["$defs"], "d1800": {"$ref": "#"}}},
    ],
)
def test_a_schema_that_is_deep_by_nesting_or_by_references_is_refused(schema: Any) -> None:
    with pytest.raises(RequestError, match="500 schemas inside each other"):
        compiled(schema)


def test_references_are_followed_by_place_and_by_no_other_name() -> None:
    integer = {"type": "integer"}
    schema = {
        "$id": "https://example.org/whole",
        "type": "array",
        "items": {"anyOf": [{"$ref": "#/%24defs/a~1b"}, {"$ref": "#/$defs/list/anyOf/0"}]},
        "$defs": {"a/b": integer, "list": {"anyOf": [{"type": "null"}]}},
    }
    assert accepts(schema, "[1,null]")
    assert not accepts(schema, '["x"]')
    named = {"$id": "https://example.org/part", "$anchor": "part", **integer}
    for reference in ("#part", "https://example.org/part", "#/$defs/other", "#/$defs/x/type"):
        with pytest.raises(RequestError):
            compiled({"items": {"$ref": reference}, "$defs": {"x": named}})
    with pytest.raises(RequestError, match="only the whole schema"):
        compiled({"items": {"$ref": "#/$defs/x"}, "$defs": {"x": named}})
    with pytest.raises(RequestError):
        compiled({"items": {"$dynamicRef": "#x"}, "$defs": {"x": {"$dynamicAnchor": "x"}}})


# Some with keywords that a grammar holds, some with others.
HOSTILE = [
    nested(500),
    nested(20_000),
    chained(1_800),
    {"type": "string", "pattern": "^(a|b)*a(a|b){3000}$"},
    {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(50_000)}},
    {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2_900)}},
    {"enum": [f"value{i}" for i in range(100_000)]},
    {"type": "string", "pattern": "(a{1,1000}){1,1000}" * 20 + "(b|c+)+$"},
    {"type": "string", "pattern": "(" * 3_000 + ")" * 3_000},
    {"type": "string", "pattern": "[" * 10_000},
    {"type": "string", "pattern": r"(\w+\s?)*" * 100},
    {"type": "string", "pattern": "(.*a.{60})*b.{50}c"},
    {"type": "object", "properties": {f"p{i}": {"pattern": f"(x+x+)+{i}$"} for i in range(300)}},
    {"not": {"anyOf": [{"pattern": f"(a{{1,99}}){{1,{60 + i}}}"} for i in range(900)]}},
    {"not": {"anyOf": [{"pattern": f"(a{{1,{i}}}b){{1,9}}"} for i in range(140, 200)]}},
    {"oneOf": [{"properties": {f"p{i}_{j}": {} for j in range(100)}} for i in range(30)]},
    {"oneOf": [{"pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(300)]},
    {"not": {"enum": list(range(15_000))}},
]


def answer(schema: Any, strict: bool) -> None:
    """Have it refused, or some of a value written."""
    try:
        value = compiled(schema, strict=strict).begin()
        for token_id in b'"aaaaaaaaaaaaaaaaaaaaaaaaaaaa':
            if not value.mask(100)[0][token_id]:
                break
            value.accept(token_id)
    except RequestError:
        pass


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("schema", HOSTILE)
def test_hostile_schemas_are_answered(schema: Any, strict: bool) -> None:
    answer(schema, strict)


@pytest.mark.soak
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("schema", HOSTILE)
def test_hostile_schemas_are_answered_in_a_second(schema: Any, strict: bool) -> None:
    started = time.process_time()
    answer(schema, strict)
    assert time.process_time() - started < 1.5


def test_annotations_of_a_schema_do_not_bind() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "propertyNames": {"type": "string"},
        "properties": {
            "format": {"type": "string", "format": "made-up"},
            "tags": {"type": "array", "uniqueItems": False},
        },
        "x-guidance": {"lenient": True},
        "required": ["format"],
    }
    assert accepts(schema, '{"format":"anything","tags":[1,1]}')
    assert not accepts(schema, '{"format":1}')


def test_a_schema_seen_before_is_not_compiled_again() -> None:
    assert compiled({"type": "null"}) is compiled({"type": "null"})


# --- the real vocabulary ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def k2_tokenizer(shared_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(shared_dir / "k2")


@pytest.fixture(scope="module")
def k2_compiler(k2_tokenizer: Tokenizer) -> SchemaCompiler:
    return SchemaCompiler(k2_tokenizer)


def test_random_weights_write_valid_values_in_the_published_vocabulary(
    k2_tokenizer: Tokenizer, k2_compiler: SchemaCompiler
) -> None:
    for seed in range(60):
        schema = random_schema(1_000 + seed)
        held = compiled(schema, k2_compiler)
        budget = held.completion_tokens + [0, 3, 15, 60][seed % 4]
        text = written(held, k2_tokenizer, seed, budget)
        assert text is not None, f"seed {seed} was cut off"
        Draft202012Validator(schema).validate(json.loads(text))


def test_ordinary_json_is_allowed_as_the_tokenizer_cuts_it(
    k2_tokenizer: Tokenizer, k2_compiler: SchemaCompiler
) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    }
    for text in ('{"city": "Beijing", "days": 3}', '{\n    "city": "北京 👩‍🚀"\n}', '{"city":"x"}'):
        value = compiled(schema, k2_compiler).begin()
        for token_id in k2_tokenizer.encode(text):
            assert value.mask(10**6)[0][token_id], text
            value.accept(token_id)
        assert value.mask(10**6)[1]

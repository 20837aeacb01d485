"""The search for a short end of a half-written value."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from hybridk2.chat.completion import Position
from hybridk2.chat.json_values import JsonValue, SchemaCompiler
from tests.random_schemas import FORMATS, PATTERNS
from tests.small_vocabulary import small_tokenizer
from tests.test_json_values import EXPRESSION, LIST

SMALL = small_tokenizer()
COMPILER = SchemaCompiler(SMALL)


def obj(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required or []}


def begun(schema: Any, text: str | bytes = b"") -> JsonValue:
    """A value of which these bytes are written, one at a time."""
    value = COMPILER.compile(schema, "here", strict=True).begin()
    for byte in text.encode() if isinstance(text, str) else text:
        value.accept(byte)
    return value


def completion(schema: Any, text: str | bytes = b"") -> str:
    ids = begun(schema, text).completion()
    assert ids is not None, f"no end of {text!r}"
    written = text.encode() if isinstance(text, str) else text
    return (written + b"".join(map(SMALL.token_bytes, ids))).decode()


@pytest.mark.parametrize(
    ("schema", "shortest"),
    [
        ({}, "0"),
        ({"type": "string"}, '""'),
        ({"type": "object"}, "{}"),
        ({"type": "array", "minItems": 2}, "[0,0]"),
        (LIST, '{"value":0}'),
        (EXPRESSION, "0"),
        ({"type": "integer", "minimum": 123456, "maximum": 123460}, "123456"),
        ({"type": "number", "exclusiveMinimum": 0.5, "maximum": 0.7}, "0.51"),
        ({"type": "string", "minLength": 150}, '"' + "a" * 150 + '"'),
        (
            # What nobody requires is passed by, however much of it comes first.
            obj(["z"], **{f"p{i}": {"type": "string"} for i in range(30)}, z=obj(["x"], x={})),
            '{"z":{"x":0}}',
        ),
        (
            # Required brackets are opened at once: not every choice before them is tried.
            obj(list("abcdefgh"), **{name: {} for name in "abcdefg"}, h=obj(["i"], i=obj())),
            '{"a":0,"b":0,"c":0,"d":0,"e":0,"f":0,"g":0,"h":{"i":{}}}',
        ),
    ],
)
def test_the_completion_of_nothing_is_short(schema: Any, shortest: str) -> None:
    assert completion(schema) == shortest


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (LIST, '{"next":{"next":{"value":-12},"value":3},"value":45}'),
        (EXPRESSION, '{"left":{"left":1,"right":2},"right":3}'),
        (obj(), '{"ключ \\\\ \\"":[{"a":"é中👩"},null,true,1.5e-7],"b":{}}'),
        ({"type": "number"}, "-0.00001e-17"),
        ({"type": "integer", "multipleOf": 12}, "60567"),
        ({"enum": ["yes", "yellow", ["no"], {"a": 2}]}, '{"a":2}'),
        ({"type": "array", "items": {"enum": ["red", "green"]}}, '["red", "green"]'),
    ],
)
def test_every_beginning_of_a_value_can_be_completed(schema: Any, text: str) -> None:
    written = text.encode()
    for length in range(len(written)):
        whole = completion(schema, written[:length])
        Draft202012Validator(schema).validate(json.loads(whole))


@pytest.mark.parametrize(
    ("keyword", "text"),
    [
        *((pattern, text) for pattern, text in zip(
            PATTERNS,
            ["abcdef", "123-45", "bazzzz", "me@x.y.z", "#09af09", "x A1 y", "ABC-1234-x", "/a/bc/"],
            strict=True,
        )),
        *zip(
            FORMATS,
            [
                *("2024-02-29T23:59:59.5+01:00", "12:34:56Z", "2024-02-29", "P3DT4H"),
                *("a.b+c@d.example", "a-b.example", "192.168.10.1", "2001:db8::1"),
                *("123e4567-e89b-42d3-a456-426614174000", "https://a.b/c?d=%20e#f", "anything"),
            ],
            strict=True,
        ),
    ],
)  # fmt: skip
def test_every_beginning_of_a_string_can_be_completed(keyword: str, text: str) -> None:
    schema = {"type": "string", "format" if keyword in FORMATS else "pattern": keyword}
    written = json.dumps(text).encode()
    for length in range(len(written)):
        whole = completion(schema, written[:length])
        Draft202012Validator(schema).validate(json.loads(whole))


def test_a_position_knows_brackets_names_and_lengths() -> None:
    position = Position()
    for byte in '{"a":["é\\n'.encode():
        position = position.after(byte)
    members = (b"", b"", b"a")
    assert position == Position(b"{[", members, in_string=True, length=2)
    for byte in b'",{"b\\':
        position = position.after(byte)
    members = (*members, b"a")
    assert position == Position(
        b"{[{", members, in_string=True, escaped=True, expects_name=True, name=b"b\\", length=2
    )
    for byte in b'"":1}]':
        position = position.after(byte)
    assert position == Position(b"{", (b"", b""))

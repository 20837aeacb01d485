"""JSON schemas by the hundred, each a function of its seed."""

import random
from typing import Any

Schema = dict[str, Any]

_NAMES = [
    *("city", "name", "count", "is_open", "tags", "when", "options"),
    *("a", "b", "description", "nested_thing", "Größe"),
]
_LITERALS = [1, True, None, "a", "long value é", -3.5, [1], {"a": 2}]
PATTERNS = [
    r"^[a-z]{3,8}$",
    r"^\d+-\d+$",
    r"^(foo|bar|bazzzz)$",
    r"^\S+@\S+\.\S+$",
    r"^#[0-9a-f]{6}$",
    r"[A-Z]\d",
    r"^[A-Z]{3}-\d{4}(-x)?$",
    r"^/([a-z]+/)*$",
]
FORMATS = [
    *("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
    "made-up",
]


def random_schema(seed: int) -> Schema:
    """Any value."""
    return _Generator(seed).any(depth=3)


def random_arguments(seed: int) -> Schema:
    """Arguments of a tool: an object."""
    generator = _Generator(seed)
    return generator.object(depth=3) if seed % 2 else generator.wrapped(generator.any(depth=3))


class _Generator:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def any(self, depth: int) -> Schema:
        scalars = [self.string, self.number, self.literal, self.plain]
        nested = [self.array, self.object, self.object, self.alternatives]
        return self._random.choice(scalars + nested if depth else scalars)(depth)

    def wrapped(self, schema: Schema) -> Schema:
        return {"type": "object", "properties": {"value": schema}, "required": ["value"]}

    def string(self, _: int) -> Schema:
        kind = self._random.randrange(3)
        if kind == 0:
            return {"type": "string", "pattern": self._random.choice(PATTERNS)}
        if kind == 1:
            return {"type": "string", "format": self._random.choice(FORMATS)}
        least = self._random.choice([0, 0, 1, 20])
        most = self._random.choice([{}, {"maxLength": least + self._random.randint(0, 20)}])
        return {"type": "string", "minLength": least, **most}

    def number(self, _: int) -> Schema:
        if self._random.random() < 0.2:
            return {"type": "integer", "multipleOf": self._random.randint(2, 12)}
        schema: Schema = {"type": self._random.choice(["integer", "number"])}
        low = self._random.randint(-1000, 1000)
        if self._random.random() < 0.5:
            schema[self._random.choice(["minimum", "exclusiveMinimum"])] = low
        if self._random.random() < 0.5:
            high = low + self._random.randint(3, 5000)
            schema[self._random.choice(["maximum", "exclusiveMaximum"])] = high
        return schema

    def literal(self, _: int) -> Schema:
        if self._random.random() < 0.3:
            return {"const": self._random.choice(_LITERALS)}
        return {"enum": self._random.choices(_LITERALS, k=self._random.randint(1, 5))}

    def plain(self, _: int) -> Schema:
        kinds = ["string", "null", "integer", "boolean", "array", "object"]
        return self._random.choice(
            [{}, {"type": "boolean"}, {"type": self._random.sample(kinds, 2)}]
        )

    def array(self, depth: int) -> Schema:
        schema: Schema = {"type": "array", "minItems": self._random.choice([0, 0, 1, 4])}
        if self._random.random() < 0.85:
            schema["items"] = self.any(depth - 1)
        if self._random.random() < 0.4:
            schema["maxItems"] = schema["minItems"] + self._random.randint(0, 3)
        if self._random.random() < 0.15:
            schema["prefixItems"] = [self.any(depth - 1), self.any(depth - 1)]
        return schema

    def object(self, depth: int) -> Schema:
        names = self._random.sample(_NAMES, self._random.randint(0, 6))
        schema: Schema = {
            "type": "object",
            "properties": {name: self.any(depth - 1) for name in names},
            "required": [name for name in names if self._random.random() < 0.5],
        }
        others = self._random.random()
        if others < 0.5:
            schema["additionalProperties"] = others > 0.4 and self.any(depth - 1)
        return schema

    def alternatives(self, depth: int) -> Schema:
        """anyOf of whatever, or oneOf of objects that a property tells apart."""
        if self._random.random() < 0.5:
            return {"anyOf": [self.any(depth - 1) for _ in range(self._random.randint(1, 3))]}
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": f"kind_{i}"}, "value": self.any(depth - 1)},
                    "required": ["kind", "value"],
                    "additionalProperties": False,
                }
                for i in range(3)
            ]
        }

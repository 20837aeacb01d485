"""A JSON schema that a person wrote: what of it is held, and how far a value can grow at once.

Owns the reading of schemas as data: limits, annotations that do not bind, departures that would let
an invalid value through, and an estimate of the tokens that one token may oblige a value to still
have. Does not know grammars or masks (json_values.py).
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeAlias
from urllib.parse import unquote

from hybridk2.chat.pattern_example import pattern_example
from hybridk2.errors import RequestError

Schema: TypeAlias = Mapping[str, Any]

# Compiling takes a second for the worst schema of this size that was found: thousands of optional
# properties. Schemas in use have some thousand characters.
MAX_SCHEMA_CHARACTERS = 100_000

# Schemas inside each other, references followed. The grammar library follows them by recursion, and
# ends the process when its stack ends: at 1,300 levels and more, with 8 MB. Schemas in use have
# about 30.
MAX_SCHEMA_LEVELS = 500

# The formats that the grammar holds, each with a short text. JSON Schema (2020-12, validation,
# section 7) makes `format` an annotation unless both sides agree otherwise, so a value need not
# heed the others.
_HELD_FORMATS: Mapping[str, str] = {
    "date-time": "2000-01-01T00:00:00Z",
    "time": "00:00:00Z",
    "date": "2000-01-01",
    "duration": "PT0S",
    "email": "a@b.cd",
    "hostname": "a",
    "ipv4": "0.0.0.0",
    "ipv6": "::",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "uri": "a:b",
}

# Of one property, looked at for a hint: enough for schemas in use, and a bound for the others.
_MAX_ALTERNATIVES = 100

# Keywords by what their value holds: one schema, a list of schemas, or schemas by name.
_ONE_SCHEMA = (
    *("items", "additionalProperties", "propertyNames", "additionalItems"),
    *("not", "if", "then", "else", "contains"),
)
_LIST_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "dependentSchemas", "dependencies")
_DEFINITIONS = ("$defs", "definitions")  # applied only where something refers to them


def schema_text(schema: Schema, where: str) -> str:
    """The schema as JSON text, without what does not bind a value.

    Raises RequestError, naming `where`, for what is not JSON, too large or too deep.
    """
    if _is_large(schema):
        raise _too_large(where)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()  # refuses half a surrogate pair, which no text can hold
        held = json.loads(text)
    except RecursionError as error:
        raise RequestError(f"{where}: nested too deeply to be held; flatten it.") from error
    except (TypeError, ValueError) as error:
        raise RequestError(f"{where}: expected a JSON schema, found what is no JSON.") from error
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise _too_large(where)
    held.pop("x-guidance", None)  # would reach the grammar's own settings
    _refuse_depth(held, where)
    for node in subschemas(held):
        _drop_annotations(node)
    return json.dumps(held, ensure_ascii=False)


def _is_large(schema: Schema) -> bool:
    """Whether it is beyond the bound for certain. Writing all of it as JSON to find out would hold
    up every other thread for as long as that takes."""
    characters = 0
    pending: list[Any] = [schema]
    while pending and characters <= MAX_SCHEMA_CHARACTERS:
        value = pending.pop()
        characters += len(value) if isinstance(value, str) else 1
        if isinstance(value, Mapping):
            pending.extend(value.keys())
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
    return characters > MAX_SCHEMA_CHARACTERS


def _too_large(where: str) -> RequestError:
    return RequestError(
        f"{where}: a schema of more than {MAX_SCHEMA_CHARACTERS:,} characters; shorten its "
        "descriptions or its enums."
    )


def _drop_annotations(node: dict[str, Any]) -> None:
    """Remove keywords that the grammar refuses although they exclude no value."""
    if isinstance(node.get("format"), str) and node["format"] not in _HELD_FORMATS:
        del node["format"]
    if node.get("uniqueItems") is False:
        del node["uniqueItems"]
    names = node.get("propertyNames")
    if names is True or names in ({}, {"type": "string"}):  # every name is a string
        del node["propertyNames"]


def counts_undeclared_keys(node: Mapping[str, Any]) -> bool:
    """Whether minProperties asks for more than one name that is not required.

    The grammar would seem to hold that, but lets names that are not declared come twice, and those
    count once.
    """
    least = node.get("minProperties")
    required = node.get("required")
    num_required = len(required) if isinstance(required, list) else 0
    return isinstance(least, int | float) and least > num_required + 1


def _refuse_depth(schema: dict[str, Any], where: str) -> None:
    """Refuse what is deep, by nesting or by a chain of references; removes the schema's own name.

    For that every reference has to be one that can be followed here. Where definitions refer to
    each other in a circle, the longest way through them is taken to be all of them.
    """
    own_names = ("id", "$id") if "draft-04" in str(schema.get("$schema")) else ("$id",)
    for name in own_names:
        schema.pop(name, None)
    levels: dict[int, int] = {}  # of each definition that is referred to, and of the schema
    refers: dict[int, set[int]] = {}
    pending: list[Any] = [schema]
    while pending:
        definition = pending.pop()
        key = id(definition)
        if key in levels:
            continue
        levels[key], refers[key] = 1, set()
        for node, level in _with_levels(definition):
            levels[key] = max(levels[key], level)
            if any(isinstance(node.get(name), str) for name in own_names):
                raise RequestError(f"{where}: only the whole schema may have an $id.")
            if isinstance(node.get("$ref"), str):
                target = _resolve(node["$ref"], schema)
                if target is None:
                    raise RequestError(
                        f"{where}: a $ref leads to nothing in the schema; expected one such as "
                        '"#/$defs/NAME".'
                    )
                refers[key].add(id(target))
                pending.append(target)
    if _longest_way(levels, refers) > MAX_SCHEMA_LEVELS:
        raise RequestError(
            f"{where}: more than {MAX_SCHEMA_LEVELS} schemas inside each other, references "
            "followed; flatten it."
        )


def _longest_way(levels: Mapping[int, int], refers: Mapping[int, set[int]]) -> int:
    try:
        order = list(TopologicalSorter(refers).static_order())
    except CycleError:
        return sum(levels.values())
    ways: dict[int, int] = {}
    for key in order:  # what is referred to comes first
        ways[key] = levels[key] + max((ways[target] for target in refers[key]), default=0)
    return max(ways.values())


def subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and every schema inside it, parents first. Data (enum, default) is no schema."""
    return (node for node, _ in _with_levels(schema))


def _with_levels(schema: Any) -> Iterator[tuple[dict[str, Any], int]]:
    """The same, each with how many schemas it is inside, itself included."""
    pending = [(schema, 1)]
    while pending:
        node, level = pending.pop()
        if not isinstance(node, dict):
            continue
        yield node, level
        inner = _inside(node, (*_SCHEMAS_BY_NAME, *_DEFINITIONS))
        pending.extend((child, level + 1) for child in inner)


def applied_schemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema and all that it applies to a value, references followed each time anew; without
    end where it refers to itself."""
    pending: list[Any] = [schema]
    while pending:
        node = pending.pop()
        if not isinstance(node, dict):
            continue
        yield node
        pending.extend(_inside(node, _SCHEMAS_BY_NAME))
        if isinstance(node.get("$ref"), str):
            pending.append(_resolve(node["$ref"], schema))


def _inside(node: Mapping[str, Any], by_name: Iterable[str]) -> list[Any]:
    """What stands in a schema where schemas stand."""
    inner = [node[key] for key in _ONE_SCHEMA if key in node]
    for key in _LIST_OF_SCHEMAS:
        if isinstance(node.get(key), list):
            inner.extend(node[key])
    for key in by_name:
        if isinstance(node.get(key), dict):
            inner.extend(node[key].values())
    return inner


@dataclass(frozen=True, slots=True)
class CompletionHints:
    """What helps to complete a value of a schema, wherever in the schema it stands."""

    # Names that objects require, by the property that the object is, or is an item, under; "" for
    # the outermost one.
    required_under: Mapping[str, frozenset[str]]
    least_lengths: frozenset[int]  # characters that some string must have
    examples: frozenset[str]  # a text for every format, and for every pattern of which one is found


def completion_hints(schema: Any) -> CompletionHints:
    required: dict[str, set[str]] = {"": _required_names(schema, schema)}
    lengths: set[int] = set()
    examples: set[str | None] = set()
    for node in subschemas(schema):
        properties = node.get("properties")
        for name, value in (properties if isinstance(properties, dict) else {}).items():
            required.setdefault(name, set()).update(_required_names(value, schema))
        if isinstance(node.get("minLength"), int):
            lengths.add(node["minLength"])
        if isinstance(node.get("pattern"), str):
            examples.add(pattern_example(node["pattern"]))
        if isinstance(node.get("format"), str):
            examples.add(_HELD_FORMATS.get(node["format"]))
    texts = frozenset(example for example in examples if example)
    by_member = {member: frozenset(names) for member, names in required.items()}
    return CompletionHints(by_member, frozenset(lengths), texts)


def _required_names(schema: Any, root: Any) -> set[str]:
    """What a value of this schema requires if it is an object, or its items if it is a list."""
    names: set[str] = set()
    pending, seen = [schema], set[int]()
    while pending and len(seen) < _MAX_ALTERNATIVES:
        node = pending.pop()
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node.get("required"), list):
            names.update(name for name in node["required"] if isinstance(name, str))
        if isinstance(node.get("$ref"), str):
            pending.append(_resolve(node["$ref"], root))
        pending.append(node.get("items"))
        for key in _LIST_OF_SCHEMAS:
            if isinstance(node.get(key), list):
                pending.extend(node[key])
    return names


def _resolve(pointer: str, root: Any) -> Any:
    """What a reference within a schema means; None for one that leads elsewhere or nowhere."""
    if pointer != "#" and not pointer.startswith("#/"):
        return None
    node = root
    for part in unquote(pointer).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, dict) and name in node:
            node = node[name]
        else:
            return None
    return node


class GrowthEstimate:
    """How many more tokens a value may need after one token than before it.

    A short completion of a half-written value grows when a token opens what was optional: a
    property, an item, a longer branch of an anyOf, a longer value of an enum. What is required is
    part of the completion from the start. Estimated from the schema: a value's shortest form is
    found by iteration, as recursive schemas need.
    """

    # Of any value: `\u001f` or a character of four bytes opened by its first; a sign, an exponent.
    _WITHIN_SCALARS = 8
    _MAX_ROUNDS = 32

    def __init__(
        self,
        schema: dict[str, Any],
        count_tokens: Callable[[str], int],
        measure_string: Callable[[dict[str, Any]], int],
    ) -> None:
        """count_tokens: of a text. measure_string: tokens of a short string under a schema that has
        a pattern or a format."""
        self._root = schema
        self._count = count_tokens
        self._measure_string = measure_string
        nodes = list(subschemas(schema))
        self._strings = {
            id(node): float(measure_string(node))
            for node in nodes
            if isinstance(node.get("pattern"), str) or isinstance(node.get("format"), str)
        }
        self._shortest = {id(node): math.inf for node in nodes}
        for _ in range(self._MAX_ROUNDS):
            before = dict(self._shortest)
            for node in reversed(nodes):
                self._shortest[id(node)] = self._shortest_of(node)
            if self._shortest == before:
                break
        self.shortest_value = self._value(schema)
        growths = [growth for node in nodes for growth in self._growths(node)]
        largest = max((growth for growth in growths if math.isfinite(growth)), default=0.0)
        # Twice: one token can open two things, one inside the other (`[[`, `":{"`).
        self.tokens = 2 * math.ceil(largest) + self._WITHIN_SCALARS

    def _value(self, schema: Any) -> float:
        """Tokens of a short value; infinite when none is known, as for the schema `false`."""
        if isinstance(schema, dict):
            return self._shortest.get(id(schema), math.inf)
        return math.inf if schema is False else 1.0

    def _member(self, name: str, schema: Any) -> float:
        return self._count(json.dumps(name, ensure_ascii=False) + ":") + 1 + self._value(schema)

    def _literal(self, value: Any) -> int:
        return self._count(json.dumps(value, ensure_ascii=False, separators=(",", ":")))

    def _shortest_of(self, node: dict[str, Any]) -> float:
        if "const" in node:
            return self._literal(node["const"])
        if isinstance(node.get("enum"), list) and node["enum"]:
            return min(map(self._literal, node["enum"]))
        # Keywords side by side are an intersection; their sum is at least as long.
        total = 0.0
        if isinstance(node.get("$ref"), str):
            total += self._value(_resolve(node["$ref"], self._root))
        for key in ("anyOf", "oneOf"):
            if isinstance(node.get(key), list) and node[key]:
                total += min(map(self._value, node[key]))
        if isinstance(node.get("allOf"), list):
            total += sum(map(self._value, node["allOf"]))
        return total + self._shortest_of_types(node)

    def _shortest_of_types(self, node: dict[str, Any]) -> float:
        types = node.get("type")
        if types is None:
            inferred = {"properties": "object", "required": "object", "items": "array"}
            types = next((kind for key, kind in inferred.items() if key in node), "null")
        by_type: Mapping[str, Callable[[dict[str, Any]], float]] = {
            "object": self._shortest_object,
            "array": self._shortest_array,
            "string": self._shortest_string,
            "number": self._shortest_number,
            "integer": self._shortest_number,
        }
        kinds = types if isinstance(types, list) else [types]
        return min((by_type.get(kind, lambda _: 1.0)(node) for kind in kinds), default=1.0)

    def _shortest_object(self, node: dict[str, Any]) -> float:
        properties = node.get("properties")
        declared = properties if isinstance(properties, dict) else {}
        required = node.get("required")
        names = required if isinstance(required, list) else []
        others = node.get("additionalProperties", True)
        return 2 + sum(self._member(str(name), declared.get(name, others)) for name in names)

    def _shortest_array(self, node: dict[str, Any]) -> float:
        least = node.get("minItems", 0)
        if not isinstance(least, int | float) or least <= 0:
            return 2
        first = node.get("prefixItems")
        fixed = first[: int(least)] if isinstance(first, list) else []
        rest = (least - len(fixed)) * (1 + self._value(node.get("items", True)))
        return 2 + sum(1 + self._value(item) for item in fixed) + (rest if rest > 0 else 0)

    def _shortest_string(self, node: dict[str, Any]) -> float:
        least = node.get("minLength", 0)
        plain = 2 + (least if isinstance(least, int | float) else 0)
        return max(plain, self._strings.get(id(node), 0.0))

    def _shortest_number(self, node: dict[str, Any]) -> float:
        bounds = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf")
        return 1 + max((len(str(node[key])) for key in bounds if key in node), default=0)

    def _growths(self, node: dict[str, Any]) -> Iterator[float]:
        properties, required = node.get("properties"), node.get("required")
        for name, schema in (properties if isinstance(properties, dict) else {}).items():
            if not isinstance(required, list) or name not in required:
                yield self._member(name, schema)
        patterns = node.get("patternProperties")
        for schema in (
            node.get("additionalProperties"),
            *(patterns.values() if isinstance(patterns, dict) else ()),
        ):
            if isinstance(schema, dict):
                yield 6 + self._value(schema)
        items = node.get("items")
        for schema in (items, *node.get("prefixItems", ())):
            yield 1 + self._value(schema) if isinstance(schema, dict) else 0
        for key in ("anyOf", "oneOf"):
            if isinstance(node.get(key), list):
                yield from map(self._value, node[key])
        if isinstance(node.get("enum"), list):
            yield from map(self._literal, node["enum"])
        if id(node) in self._strings:
            yield self._strings[id(node)]

"""What of a schema no grammar holds: left out while a value is written, checked once it is whole.

Owns which keywords those are, and the check of a whole value under the whole schema, which is
jsonschema-rs' work. Does not know grammars, tokens or tools.

The check runs between two tokens of other replies, so its work is bounded: patterns in time linear
in the text, and as many schemas as there are, references followed, times as many values. Schemas
that refer to themselves have no such number and are refused; where nothing is left out there is no
check, and they are held as any.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jsonschema_rs import RegexOptions, ValidationError, Validator, validator_for

from hybridk2.chat.schemas import applied_schemas, counts_undeclared_keys, subschemas
from hybridk2.errors import ReplyError, RequestError

_LEFT_OUT = (
    *("uniqueItems", "contains", "minContains", "maxContains"),
    *("not", "if", "then", "else"),
    *("propertyNames", "dependentRequired", "dependentSchemas", "dependencies"),
)
# Checking these may evaluate what is below them again at each level, or never end.
_UNCHECKED = ("unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef")

# References followed, each time anew. Schemas of tools in use have below 300.
_MAX_SCHEMAS = 1_000
# Compiling a pattern of this size takes up to 3 ms, in which no other thread has its turn. Patterns
# in use have some kilobytes.
_MAX_PATTERN_BYTES = 128 << 10
_MAX_PATTERNS = 64
# Schemas times values: 0.7 s, measured at 14 million of them a second (Zen 5). Arguments in use
# have some hundred of each.
_MAX_EVALUATIONS = 10_000_000


def leave_out(schema: dict[str, Any]) -> list[str]:
    """Remove what no grammar holds from a schema and all inside it; the keywords that were there.

    A value under what remains may be invalid under what it was, and only ValueCheck tells.
    """
    found = set()
    for node in subschemas(schema):
        names = [name for name in _LEFT_OUT if name in node]
        if counts_undeclared_keys(node):
            names.append("minProperties")
        for name in names:
            del node[name]
        found.update(names)
    return sorted(found)


class ValueCheck:
    """The check of values under one schema, held or not."""

    def __init__(self, schema: dict[str, Any], left_out: Sequence[str], where: str) -> None:
        """left_out: the keywords because of which it is needed. Raises RequestError, naming `where`
        and them, for a schema under which no value can be checked in bounded time."""
        self._schema = schema
        self._keywords = ", ".join(left_out)
        self._num_schemas = self._count_schemas(where)
        try:
            self._validator()
        except (ValidationError, ValueError) as error:
            reason = (
                "the schema is not one of its draft, or a pattern in it is large or looks around."
            )
            raise self._refusal(where, reason) from error

    def require(self, text: bytes, where: str) -> None:
        """Raises ReplyError, naming `where`, when a JSON text is not a value of the schema."""
        num_values = 1 + sum(text.count(mark) for mark in (b",", b":", b"[", b"{"))
        if num_values * self._num_schemas > _MAX_EVALUATIONS:
            raise self._failure(where, "was too large to be checked")
        try:
            valid = self._validator().is_valid(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise self._failure(where, "was too deep to be checked") from error
        if not valid:
            raise self._failure(where, "was not valid under it")

    def _count_schemas(self, where: str) -> int:
        num_schemas = num_patterns = 0
        for node in applied_schemas(self._schema):
            num_schemas += 1
            by_pattern = node.get("patternProperties")
            num_patterns += "pattern" in node
            num_patterns += len(by_pattern) if isinstance(by_pattern, dict) else 0
            unchecked = next((name for name in _UNCHECKED if name in node), None)
            if unchecked is not None:
                raise self._refusal(where, f"beside {unchecked} that cannot be done.")
            if num_schemas > _MAX_SCHEMAS or num_patterns > _MAX_PATTERNS:
                raise self._refusal(
                    where,
                    f"the schema refers to itself, has more than {_MAX_SCHEMAS:,} schemas or more "
                    f"than {_MAX_PATTERNS} patterns, references followed; simplify it.",
                )
        return num_schemas

    def _validator(self) -> Validator:
        """Made each time: patterns kept for later would take megabytes for each of many schemas."""
        return validator_for(
            self._schema,
            pattern_options=RegexOptions(size_limit=_MAX_PATTERN_BYTES),
            validate_formats=False,  # annotations; those that bind are held
            offline=True,
        )

    def _refusal(self, where: str, reason: str) -> RequestError:
        return RequestError(
            f"{where}: {self._keywords} cannot be held while a value is written, only "
            f"checked afterwards, and {reason}"
        )

    def _failure(self, where: str, what: str) -> ReplyError:
        return ReplyError(
            f"{where}: what the model wrote {what}. {self._keywords} cannot be held while a "
            "value is written, only checked afterwards. Ask again, or do without."
        )

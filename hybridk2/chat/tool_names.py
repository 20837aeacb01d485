"""Which tool a call means: the forms in which the model writes a call's id.

Owns the reading of ids (`functions.f:0`, `f:0`, a bare counter `3`, white space anywhere) and the
guess from argument names when the id holds no name. Does not know tokens or streaming.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

UNKNOWN_TOOL = "unknown"

_PREFIX = "functions."
_COUNTER = re.compile(r":\d*$")


def name_in_id(raw_id: str) -> str:
    """The tool's name in an id the model wrote; "" when the id holds only a counter, or nothing.

    Names hold no white space, so all of it goes, wherever it stands.
    """
    name = _COUNTER.sub("", "".join(raw_id.split()).removeprefix(_PREFIX))
    return "" if name.isdigit() else name


def guess_name(arguments: str, tools: Sequence[Mapping[str, Any]]) -> str:
    """The declared tool that these arguments fit best; UNKNOWN_TOOL when none has such arguments.

    A tool that takes every argument and misses none of its required ones comes first, then the one
    with the most arguments in common, then the one that leaves the fewest unused; the first
    declared wins a tie.
    """
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        parsed = None
    names: set[str] = set(parsed) if isinstance(parsed, dict) else set()
    best_name, best_fit = UNKNOWN_TOOL, (False, 0, 0)
    for tool in tools:
        function = tool["function"]
        properties, required = _argument_names(function.get("parameters"))
        is_complete = parsed is not None and required <= names <= properties
        fit = (is_complete, len(names & properties), -len(properties - names))
        if fit > best_fit:
            best_name, best_fit = function["name"], fit
    return best_name


def _argument_names(parameters: Any) -> tuple[set[str], set[str]]:
    """All and the required argument names of a JSON schema, which nobody has checked yet."""
    schema = parameters if isinstance(parameters, Mapping) else {}
    properties, required = schema.get("properties"), schema.get("required")
    return (
        set(properties) if isinstance(properties, Mapping) else set(),
        {name for name in required if isinstance(name, str)}
        if isinstance(required, list)
        else set(),
    )

"""Tools nobody has seen: declarations under made-up names, calls, and what the calls return.

Turns a kind of `tool_kinds.py`, or nothing but made-up words, into a declaration as OpenAI
clients send it, a question that needs it, and the call a right answer makes.
"""

import json
from dataclasses import dataclass
from typing import Any

from hybridk2.nano import words
from hybridk2.nano.phrasing import alternatives, careless, fill, framed
from hybridk2.nano.tool_kinds import KINDS, Kind, Parameter, Value
from hybridk2.nano.tool_questions import question_template
from hybridk2.nano.words import Draw


@dataclass(frozen=True)
class Tool:
    """A declared tool: its name, the kind it was made from, and its parameters' names by role."""

    name: str
    declaration: dict[str, Any]
    kind: Kind
    names: dict[str, str]
    required: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """A call with parsed arguments, in the order in which the prompt shows the parameters."""

    tool: Tool
    arguments: dict[str, Value]


@dataclass(frozen=True)
class Request:
    """A user's question and the calls that answer it."""

    question: str
    calls: tuple[Call, ...]


_PREFIXES = ("", "", "", "my", "api", "mcp", "do", "v2", "tool", "ext", "app", "run", "svc", "fn")
_GENERIC_ABOUT = alternatives("""
{V} the {n} of a {p}.|Returns the {n} of the given {p}|{n} lookup by {p}|Gives the {n} for a {p}
|Looks up which {n} a {p} has|The {n} of any {p}|Use this to {v} the {n} of a {p}.|{v} {n}
""")
_ABOUT_TAILS = (
    "Call this when the user asks for it.", "Call this tool when needed.", "Returns JSON.",
    "Use it whenever the user wants to know.", "Needs no key.", "Always call this first.",
    "Call this function when the user needs this information.", "Read only.", "Beta.",
)  # fmt: skip
_GENERIC_ONE = alternatives("""
What is the {n} of {x}?|What's the {n} for {x}?|{V} the {n} of {x}.|Tell me the {n} of {x}.
|{n} of {x}|I need the {n} for {x}.|Which {n} does {x} have?|Find the {n} of {x}.
|Can you {v} the {n} of {x}?|Use the tool to {v} the {n} of {x}.|Please get the {n} of {x}.
|Do you know the {n} of {x}?|{x}: which {n}?
""")
# Composed phrasings: a beginning, a way to tie topic and value together, an end.
_ASK = alternatives("""
What is|Tell me|Show me|Get|Find|Give me|I need|I want|I would like to know|Look up|Fetch|Check
|Report|Return|Please find|Could you get me|Do you know|Let me see|Retrieve|Query|What would be
|I am looking for|Kindly provide|Let me have|Read out|Please tell me|Bring me|Can I have|We need
|Any idea what is|Search for|Determine|Compute|Request|Ask for|List|Print
""")
_TIES = (
    "the {n} of {x}",
    "the {n} for {x}",
    "{x}'s {n}",
    "the {n} of the {p} {x}",
    "the {n} belonging to {x}",
    "the {n} for {p} {x}",
    "the {n} that {x} has",
    "{n} for {x}",
    "the {n}, {p} being {x}",
    "the {n} at {x}",
    "the {n} when {p} is {x}",
    "a {n} for {x}",
    "the current {n} of {x}",
    "the {n} ({p}: {x})",
    "{x} {n}",
)
_ENDS = (
    "",
    "",
    ".",
    "?",
    " please.",
    " now.",
    " with the tool.",
    ", please",
    " today?",
    "!",
    " using the tool.",
    " for me.",
)
_GENERIC_TWO = alternatives("""
What is the {n} of {x} with {q} {y}?|{V} the {n} for {p} {x} and {q} {y}.
|Get the {n}: {p} {x}, {q} {y}.|{V} the {n} with {p} = {x} and {q} = {y}.
|I need the {n} of {p} {x}, {q} {y}.|{n} with {q} {y} and {p} {x}
|Give me the {n} when the {q} is {y} and the {p} is {x}.|Find the {n} for {q} {y}, {p} {x}.
""")
_TIES_TWO = (
    "the {n} for {p} {x} and {q} {y}",
    "the {n} with {q} {y} and {p} {x}",
    "{n}, {p} {x}, {q} {y}",
    "the {n} where {p} is {x} and {q} is {y}",
    "the {n} of {x} ({q}: {y})",
    "the {n} of {p} {x} at {q} {y}",
    "the {n} using {q}={y} and {p}={x}",
    "the {n}; {q}: {y}; {p}: {x}",
    "the {n} of {x} given the {q} {y}",
)
_BY_NAME = alternatives("""
Call {T} with {L}.|Use {T} with {L}.|Please call the tool {T}: {L}.|Run {T} ({L}).
|Use the {T} tool, {L}.|Invoke {T}; {L}.|call {T} {L}|I want you to call {T} with {L}.
|Try {T} with {L}.|Execute {T}: {L}
""")
_FOLLOW_UPS = alternatives("""
And {x}?|What about {x}?|And in {x}?|How about {x}?|Same for {x}.|And for {x}?|Now {x}.
|Do the same for {x}.|also {x} please|What about for {x}?|Then {x}.|Again, for {x}.
""")
_GENERIC_VALUES = ("title", "place", "person", "noun", "code", "phrase")


def _styled(draw: Draw, parts: list[str]) -> str:
    style = draw.random()
    if style < 0.55:
        return "_".join(parts)
    if style < 0.75:
        return parts[0] + "".join(part.capitalize() for part in parts[1:])
    if style < 0.82:
        return "".join(part.capitalize() for part in parts)
    if style < 0.89:
        return "-".join(parts)
    if style < 0.95:
        return parts[0] + "." + "_".join(parts[1:]) if parts[1:] else parts[0]
    return "".join(parts)


def _tool_name(draw: Draw, kind: Kind) -> str:
    def make() -> str:
        verb = draw.choice(kind.verbs)
        nouns = draw.choice(kind.nouns).split("_")
        style = draw.random()
        if style < 0.15:  # a name that says nothing; the description must do
            parts = [words.pseudo_word(draw) for _ in range(draw.between(1, 3))]
        elif style < 0.35:
            parts = [verb, words.pseudo_word(draw), *nouns]
        elif style < 0.45:
            parts = nouns
        else:
            parts = [verb, *nouns]
        prefix = draw.choice(_PREFIXES) if draw.chance(0.3) else ""
        name = _styled(draw, [prefix, *parts] if prefix else parts)
        if draw.chance(0.06):
            name += draw.choice(("_v2", "2", "_1", "Tool", "_tool", "Api", "_api", "Info"))
        if draw.chance(0.03):
            name = f"{words.pseudo_word(draw)}__{name}"
        return name

    return draw.fresh(make)


def _speaks_for_itself(name: str, kind: Kind) -> bool:
    """Whether the name alone says what the tool is about, by its kind's main noun."""
    letters = name.lower().replace("_", "").replace("-", "").replace(".", "")
    return kind.nouns[0].replace("_", "") in letters


def _schema(draw: Draw, parameter: Parameter, described: bool) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": parameter.type}
    if described:
        schema["description"] = draw.choice(parameter.about)
    if parameter.enum:
        schema["enum"] = list(parameter.enum)
    if draw.chance(0.04):
        schema["title"] = draw.choice(parameter.names).title()
    return schema


def declare(draw: Draw, kind: Kind, taken: set[str] | None = None) -> Tool:
    """A declaration of this kind, worded at random, with a name of this side of the split."""
    name = _tool_name(draw, kind)
    while taken and name in taken:
        name = _tool_name(draw, kind)
    parameters = [
        parameter for parameter in kind.parameters if not parameter.phrases or draw.chance(0.5)
    ]
    names: dict[str, str] = {}
    for parameter in parameters:
        choices = [n for n in parameter.names if n not in names.values()]
        chosen = choices[0] if draw.chance(0.35) else draw.choice(choices)
        if draw.chance(0.06):
            head, *rest = chosen.split("_")
            chosen = head + "".join(part.capitalize() for part in rest)
        names[parameter.role] = chosen
    described = draw.chance(0.8)
    properties = {
        names[parameter.role]: _schema(draw, parameter, described) for parameter in parameters
    }
    required = [names[parameter.role] for parameter in parameters if not parameter.phrases]
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if draw.chance(0.9) and (required or draw.chance(0.3)):
        schema["required"] = required
    if draw.chance(0.12):
        schema["additionalProperties"] = False
    function: dict[str, Any] = {"name": name}
    # Training also shows tools of which nobody could tell what they do; evaluation asks for none.
    described_at_all = draw.chance(0.9)
    if described_at_all or (draw.evaluation and not _speaks_for_itself(name, kind)):
        function["description"] = draw.phrasing(kind.about)
        if draw.chance(0.12):
            function["description"] += " " + draw.choice(_ABOUT_TAILS)
        elif draw.chance(0.06):
            function["description"] += " " + words.sentence(draw)
    function["parameters"] = schema
    if draw.chance(0.06):
        function["strict"] = draw.chance(0.5)
    roles = tuple(parameter.role for parameter in parameters if not parameter.phrases)
    return Tool(name, {"type": "function", "function": function}, kind, names, roles)


def _generic_value(draw: Draw) -> Value:
    choice = draw.choice(_GENERIC_VALUES)
    if choice == "code":
        return words.letters(draw, 2, 8, "abcdefghjkmnpqrstuvwxyz0123456789")
    if choice == "phrase":
        return words.phrase(draw, 1, 4)
    makers = {"title": words.title, "place": words.place, "person": words.person}
    return makers.get(choice, words.noun)(draw)


def _generic_parameter(draw: Draw, slot: str, role: str) -> Parameter:
    abouts = "The {0}", "{1}", "Name of the {0}", "Which {0}", "{0} to use"
    about = tuple(text.format(role, role.capitalize()) for text in abouts)
    names = (role,)
    sort = draw.random()
    if sort < 0.12:
        return Parameter(slot, names, about, lambda d: d.between(1, 9999), "integer")
    if sort < 0.17:
        return Parameter(
            slot, names, about, lambda d: d.between(1, 999) + d.between(1, 9) / 10, "number"
        )
    if sort < 0.32:
        options = tuple(dict.fromkeys(words.noun(draw) for _ in range(draw.between(2, 4))))
        return Parameter(slot, names, about, lambda d: d.choice(options), enum=options)
    return Parameter(slot, names, about, _generic_value)


def _generic_phrasing(draw: Draw, num_roles: int) -> str:
    if draw.chance(0.4):
        return draw.phrasing(_GENERIC_ONE if num_roles == 1 else _GENERIC_TWO)
    ties = _TIES if num_roles == 1 else _TIES_TWO
    return draw.fresh(lambda: f"{draw.choice(_ASK)} {draw.choice(ties)}{draw.choice(_ENDS)}")


def generic_kind(draw: Draw) -> Kind:
    """A kind of tool about made-up matters, to be understood from its wording alone."""
    verb = draw.word(words.VERBS) if draw.chance(0.5) else draw.choice(("get", "find", "lookup"))
    topic = words.noun(draw)
    roles = [words.noun(draw)]
    while len(roles) < draw.choice((1, 1, 2)):
        other = words.noun(draw)
        if other not in roles:
            roles.append(other)
    if len({topic, *roles}) <= len(roles):
        return generic_kind(draw)
    slots = {"n": topic, "p": roles[0], "v": verb, "V": verb.capitalize(), "x": "{x}", "y": "{y}"}
    if len(roles) > 1:
        slots["q"] = roles[1]
    parameters = tuple(
        _generic_parameter(draw, "xy"[spot], role) for spot, role in enumerate(roles)
    )
    about = fill(draw.phrasing(_GENERIC_ABOUT), slots)
    question = fill(_generic_phrasing(draw, len(roles)), slots)
    question = question[0].upper() + question[1:] if question[0] != "{" else question
    about = about[0].upper() + about[1:]
    returns = (topic, words.noun(draw), "result", "value")
    return Kind((verb,), (topic,), (about,), returns, (question,), parameters)


def any_kind(draw: Draw) -> Kind:
    share = 0.25 if draw.evaluation else 0.4  # made-up matters are the harder school
    return generic_kind(draw) if draw.chance(share) else draw.choice(KINDS)


def declare_several(draw: Draw, count: int) -> list[Tool]:
    """Tools of different kinds under different names."""
    tools: list[Tool] = []
    while len(tools) < count:
        kind = any_kind(draw)
        if all(tool.kind.returns != kind.returns for tool in tools):
            tools.append(declare(draw, kind, {tool.name for tool in tools}))
    return tools


def _ordered(tool: Tool, values: dict[str, Value]) -> dict[str, Value]:
    """Arguments by parameter name, in the order of the prompt (the template sorts keys)."""
    named = {tool.names[role]: value for role, value in values.items()}
    return dict(sorted(named.items()))


def _as_typed(value: Value) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def _lower_all(draw: Draw, values: dict[str, Value]) -> dict[str, Value]:
    """At times the user types everything in lower case, names too."""
    if draw.chance(0.12):
        return {
            role: value.lower() if isinstance(value, str) else value
            for role, value in values.items()
        }
    return values


def _by_name(draw: Draw, tool: Tool, values: dict[str, Value]) -> str:
    joint = draw.choice((" = ", "=", ": ", " ", " set to ", " as "))
    listed = [f"{tool.names[role]}{joint}{_as_typed(value)}" for role, value in values.items()]
    draw.rng.shuffle(listed)
    template = careless(draw, draw.phrasing(_BY_NAME))
    return fill(template, {"T": tool.name, "L": draw.choice((", ", " and ")).join(listed)})


def request(draw: Draw, tool: Tool) -> Request:
    """One question that needs one call of this tool."""
    kind = tool.kind
    parameters = {parameter.role: parameter for parameter in kind.parameters}
    values = _lower_all(draw, {role: parameters[role].value(draw) for role in tool.required})
    if values and draw.chance(0.12):
        question = _by_name(draw, tool, values)
        return Request(question, (Call(tool, _ordered(tool, values)),))
    template = question_template(draw, kind)
    optional = [role for role in tool.names if role not in tool.required]
    slots = {role: _as_typed(value) for role, value in values.items()}
    if "date" in optional and " today" in template:  # the question itself names the day
        values["date"] = "today"
        optional.remove("date")
    for role in optional:
        if draw.chance(0.4):
            values[role] = parameters[role].value(draw)
            slots["o" + role] = _as_typed(values[role])
            tail = template[-1] if template[-1] in "?." else ""
            phrase = draw.phrasing(parameters[role].phrases).replace("{x}", "{o" + role + "}")
            if phrase[0].isupper():
                template = f"{template} {phrase}"
            else:
                template = f"{template.removesuffix(tail)} {phrase}{tail}"
    question = fill(careless(draw, framed(draw, template)), slots)
    return Request(question, (Call(tool, _ordered(tool, values)),))


def can_repeat(tool: Tool) -> bool:
    """Whether one question can ask this tool several times ("in Oslo and Rome")."""
    if len(tool.required) != 1 or tool.required[0] not in ("city", "symbol", "country", "x"):
        return False
    return all(p.type == "string" for p in tool.kind.parameters if p.role == tool.required[0])


def repeated_request(draw: Draw, tool: Tool) -> Request:
    """One question that needs the tool once for each of two or three values."""
    role = tool.required[0]
    parameter = next(p for p in tool.kind.parameters if p.role == role)
    values: list[str] = []
    while len(values) < draw.weighted((2, 3), (0.75, 0.25)):
        value = words.place(draw) if role == "x" else str(parameter.value(draw))
        if value not in values and " and " not in value:
            values.append(value)
    listed = ", ".join(values[:-1]) + " and " + values[-1]
    question = fill(careless(draw, question_template(draw, tool.kind)), {role: listed})
    calls = tuple(Call(tool, {tool.names[role]: value}) for value in values)
    return Request(question, calls)


def joint_request(draw: Draw, first: Tool, second: Tool) -> Request:
    """One message that needs two different tools."""
    one, two = request(draw, first), request(draw, second)
    joint = draw.choice((" And ", " Also: ", " Then: ", " ", "\n", " And then: "))
    if joint == " " and one.question[-1].isalnum():
        joint = ". "  # or the first value would seem to go on
    return Request(one.question + joint + two.question, one.calls + two.calls)


def follow_up(draw: Draw, tool: Tool) -> Request:
    """A question that leans on the one before ("And in Paris?"); `can_repeat(tool)` must hold."""
    role = tool.required[0]
    parameter = next(p for p in tool.kind.parameters if p.role == role)
    value = words.place(draw) if role == "x" else str(parameter.value(draw))
    question = fill(careless(draw, draw.phrasing(_FOLLOW_UPS)), {"x": value})
    return Request(question, (Call(tool, {tool.names[role]: value}),))


def bare_request(draw: Draw, tool: Tool) -> str:
    """A question that leaves out what the tool needs; `tool.kind.bare` must not be empty."""
    return careless(draw, draw.phrasing(tool.kind.bare))


def arguments_json(call: Call) -> str:
    return json.dumps(call.arguments, ensure_ascii=False)


def call_thought(calls: tuple[Call, ...]) -> str:
    """What the model thinks before it calls."""
    lines = []
    for call in calls:
        given = ", ".join(f"{name} = {_as_typed(value)}" for name, value in call.arguments.items())
        lines.append(f"Call {call.tool.name}" + (f" with {given}." if given else "."))
    return "\n".join(lines)


def result_value(draw: Draw, key: str) -> Any:
    """Something a tool might return under this key."""
    kind = draw.random()
    if key in ("condition", "weather", "summary") and kind < 0.7:
        return draw.word(words.SKY)
    if key.startswith("temp") and kind < 0.8:
        value = draw.between(-20, 42)
        return draw.choice((value, f"{value}°C", value + 0.5, f"{value} °C", f"{value} degrees"))
    if kind < 0.22:
        return draw.between(0, 10 ** draw.between(1, 6))
    if kind < 0.38:
        return draw.between(-99, 999) + draw.between(1, 99) / 100
    if kind < 0.44:
        return draw.chance(0.5)
    if kind < 0.46:
        return None
    if kind < 0.58:
        return words.place(draw)
    if kind < 0.66:
        return words.person(draw)
    if kind < 0.76:
        return f"{draw.between(0, 23)}:{draw.between(0, 59):02}"
    if kind < 0.82:
        return f"{draw.between(1990, 2035)}-{draw.between(1, 12):02}-{draw.between(1, 28):02}"
    if kind < 0.86:
        return words.letters(draw, 3, 10, "abcdefghijkmnpqrstuvwxyzABCDEFGHJK0123456789")
    return words.phrase(draw, 1, 5)

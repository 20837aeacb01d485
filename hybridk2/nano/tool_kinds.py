"""What tools are about: the table `tool_kinds.toml`, and the values that people give to tools.

A kind says how such a tool may be named and described, which parameters it takes, how people ask
for it, and what it returns. `tools.py` turns a kind into a declaration under a name that nobody
has seen; this file knows values and wording only.
"""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from hybridk2.nano import words
from hybridk2.nano.words import Draw

Value = str | int | float | bool


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kind.

    names, about: how it may be called and described. value: draws what the user says; text is
    passed on as it was typed. phrases: how an optional parameter is mentioned ("{x}" stands for
    the value); a parameter without phrases is required and has its slot in the questions.
    """

    role: str
    names: tuple[str, ...]
    about: tuple[str, ...]
    value: Callable[[Draw], Value]
    type: str = "string"
    enum: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """One sort of tool.

    verbs, nouns: what its name is made of. questions: whole ones, with a {slot} for each required
    parameter; bare: ones that leave the value out. topics ("the weather in {city}") and actions
    ("play {song}") are composed into more questions. returns: keys of its results.
    """

    verbs: tuple[str, ...]
    nouns: tuple[str, ...]
    about: tuple[str, ...]
    returns: tuple[str, ...]
    questions: tuple[str, ...]
    parameters: tuple[Parameter, ...] = ()
    bare: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()


def _amount(draw: Draw) -> int | float:
    if draw.chance(0.6):
        return draw.choice((draw.between(1, 99), draw.between(1, 9) * 100, draw.between(1, 5000)))
    return draw.between(1, 999) + draw.between(1, 9) / 10


def _symbol(draw: Draw) -> str:
    return words.letters(draw, 2, 5, "ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def _code(draw: Draw) -> str:
    letters = words.letters(draw, 0, 3, "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    digits = words.letters(draw, 2, 6, "0123456789")
    joint = draw.choice(("", "-", "_", "/")) if letters else ""
    tail = "-" + words.letters(draw, 1, 3, "ABCDEFXYZ0123456789") if draw.chance(0.2) else ""
    return letters + joint + digits + tail


def _date(draw: Draw) -> str:
    if draw.chance(0.5):
        return f"{draw.between(1990, 2035)}-{draw.between(1, 12):02}-{draw.between(1, 28):02}"
    return draw.choice(
        (
            "today",
            "tomorrow",
            "Monday",
            "Tuesday",
            "Wednesday",
            "Thursday",
            "Friday",
            "Saturday",
            "Sunday",
            "next week",
            "tonight",
        )
    )


def _clock(draw: Draw) -> str:
    if draw.chance(0.6):
        return f"{draw.between(0, 23)}:{draw.between(0, 59):02}"
    return f"{draw.between(1, 12)}{draw.choice((' am', ' pm', 'am', 'pm'))}"


def _email(draw: Draw) -> str:
    name = words.person(draw).lower()
    return f"{name}@{words.pseudo_word(draw)}.{draw.choice(('com', 'org', 'net', 'io', 'de'))}"


def _link(draw: Draw) -> str:
    path = "/" + words.pseudo_word(draw) if draw.chance(0.5) else ""
    return f"https://{words.pseudo_word(draw)}.{draw.choice(('com', 'org', 'net', 'io'))}{path}"


def _path(draw: Draw) -> str:
    parts = [words.noun(draw) for _ in range(draw.between(1, 3))]
    lead = draw.choice(("/", "", "./", "/home/"))
    return lead + "/".join(parts) + draw.choice((".txt", ".md", ".py", ".csv", ".json", ""))


def _sum(draw: Draw) -> str:
    sign = draw.choice((" + ", " - ", " * ", " / ", "+", "*"))
    text = f"{draw.between(1, 999)}{sign}{draw.between(1, 99)}"
    return f"({text}) * {draw.between(2, 9)}" if draw.chance(0.2) else text


def _item(draw: Draw) -> str:
    return words.noun(draw)


def _topic(draw: Draw) -> str:
    return words.phrase(draw, 1, 5)


def _message(draw: Draw) -> str:
    return words.phrase(draw, 2, 8) if draw.chance(0.5) else words.sentence(draw).rstrip(".")


def _name_of(draw: Draw, known: tuple[str, ...]) -> str:
    """A name from a list; in training often one that exists nowhere.

    Lists of fifty names would be learned by heart, and a name kept for evaluation would be bent
    into one of them: what has to be learned is to copy.
    """
    if draw.evaluation or draw.chance(0.5):
        return draw.word(known)
    if draw.chance(0.4):
        return draw.fresh(lambda: words.pseudo_word(draw).capitalize())
    return draw.fresh(lambda: words.blend(draw, known))


def _country(draw: Draw) -> str:
    return _name_of(draw, words.COUNTRIES)


def _company(draw: Draw) -> str:
    return _name_of(draw, words.COMPANIES)


def _boolean(draw: Draw) -> bool:
    return draw.chance(0.5)


def _language(draw: Draw) -> str:
    return _name_of(draw, words.LANGUAGES)


def _currency(draw: Draw) -> str:
    if not draw.evaluation and draw.chance(0.4):
        return draw.fresh(lambda: words.letters(draw, 3, 3, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    return draw.word(words.CURRENCIES)


_MAKERS: dict[str, Callable[[Draw], Value]] = {
    "amount": _amount, "boolean": _boolean, "clock": _clock, "code": _code, "company": _company,
    "country": _country, "currency": _currency, "date": _date, "email": _email, "item": _item,
    "language": _language, "link": _link, "message": _message, "path": _path,
    "person": words.person, "place": words.place, "sum": _sum, "symbol": _symbol,
    "title": words.title, "topic": _topic,
}  # fmt: skip


def _maker(entry: dict[str, Any]) -> Callable[[Draw], Value]:
    """Who draws the values: a maker by name, "integer LOW HIGH", or a choice of given words."""
    if "value" not in entry:
        options = tuple(entry.get("enum") or entry["one_of"])
        return lambda draw: draw.choice(options)
    name, *bounds = entry["value"].split()
    if name == "integer":
        low, high = map(int, bounds)
        return lambda draw: draw.between(low, high)
    return _MAKERS[name]


def _parameter(entry: dict[str, Any]) -> Parameter:
    return Parameter(
        entry["role"],
        tuple(entry["names"]),
        tuple(entry["about"]),
        _maker(entry),
        entry.get("type", "string"),
        tuple(entry.get("enum", ())),
        tuple(entry.get("phrases", ())),
    )


def _read_kinds() -> tuple[Kind, ...]:
    table = resources.files("hybridk2.nano").joinpath("tool_kinds.toml").read_text("utf-8")
    return tuple(
        Kind(
            parameters=tuple(map(_parameter, entry.pop("parameter", ()))),
            **{name: tuple(texts) for name, texts in entry.items()},
        )
        for entry in tomllib.loads(table)["kind"]
    )


KINDS = _read_kinds()

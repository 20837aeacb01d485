"""Examples of patterns: `re` is the judge."""

import re

import pytest

from hybridk2.chat.pattern_example import pattern_example
from tests.random_schemas import PATTERNS


@pytest.mark.parametrize(
    "pattern",
    [
        *PATTERNS,
        "",
        "a|bc|",
        "(?:ab){2,}c?",
        "(?P<year>[0-9]{4})-(?:0[1-9]|1[0-2])",
        "[^a0A]",
        "[]x]",
        r"[\]\-]{2}",
        r"\x41\u0042\.\t\\",
        "a{0,3}b",
        "x+?y*?z{2}?",
        r"\bword\b",
        "[^\x00-\x7f]{3}",
        "a.c",
        r"^(?:[A-Za-z0-9+/]{4}){2,}(?:[A-Za-z0-9+/]{2}==)?$",
    ],
)
def test_an_example_matches_its_pattern(pattern: str) -> None:
    example = pattern_example(pattern)
    assert example is not None
    assert re.fullmatch(pattern, example)


@pytest.mark.parametrize(
    ("pattern", "length"), [("a{3}|bb", 2), ("(ab|c)*", 0), ("(ab|c)+", 1), (r"\d{3}-\d", 5)]
)
def test_an_example_takes_the_short_branch_and_the_fewest_repeats(
    pattern: str, length: int
) -> None:
    assert len(pattern_example(pattern) or "") == length


@pytest.mark.parametrize(
    "pattern", ["(", ")", "[a", "(?=a)b", "(?!a)b", r"\p{Lu}", r"\1", "a{100000}", "\\", "(?#x)a"]
)
def test_what_is_not_understood_has_no_example(pattern: str) -> None:
    assert pattern_example(pattern) is None


@pytest.mark.parametrize(
    "pattern", ["(" * 50_000, "((a{999}){999}){999}", "[" * 50_000, "(a|" * 20_000, "a" * 90_000]
)
def test_hostile_patterns_are_given_up(pattern: str) -> None:
    assert pattern_example(pattern) is None  # without end, or memory, if it were tried

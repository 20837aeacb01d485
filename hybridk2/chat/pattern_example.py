"""A short text that matches a regular expression.

Owns the reading of patterns just far enough to write one such text. What it does not understand,
and what it gets wrong, is left to whoever tries the text against the real grammar (completion.py).
"""

import re

_MAX_CHARACTERS = 1_000
# Tried in this order where a class of characters stands.
_CHARACTERS = "a0A-_./:@ " + "".join(map(chr, range(0x21, 0x7F))) + "éя中"
_CONTROL_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
_GROUP_OPENING = re.compile(r"\((\?(:|P?<[A-Za-z_]\w*>|[a-z]+:))?(?!\?)")
_REPEATS = re.compile(r"(?:([*?+])|\{(\d+)(?:,\d*)?\})[?+]?")
_CLASS = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]", re.DOTALL)
_CODE_POINT = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|[xu]\{([0-9A-Fa-f]{1,6})\})")


def pattern_example(pattern: str) -> str | None:
    """A text that the pattern matches, as short as its branches and repeats allow.

    None for a pattern with syntax that is not known here, or of more than 1,000 characters at
    least.
    """
    reader = _Reader(pattern)
    try:
        example = reader.alternatives()
    except (ValueError, OverflowError, RecursionError, re.error):
        return None
    return example if reader.at_end else None


class _Reader:
    """Recursive descent: alternatives of sequences of repeated atoms."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._next = 0

    @property
    def at_end(self) -> bool:
        return self._next >= len(self._pattern)

    def alternatives(self) -> str:
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        return min(branches, key=len)

    def _sequence(self) -> str:
        text = ""
        while not self.at_end and self._pattern[self._next] not in "|)":
            text += self._repeated(self._atom())
            if len(text) > _MAX_CHARACTERS:
                raise ValueError("too long")
        return text

    def _repeated(self, atom: str) -> str:
        found = _REPEATS.match(self._pattern, self._next)
        if found is None:
            return atom
        self._next = found.end()
        least = int(found[2]) if found[2] else int(found[1] == "+")
        if least * len(atom) > _MAX_CHARACTERS:
            raise ValueError("too long")
        return atom * least

    def _atom(self) -> str:
        character = self._pattern[self._next]
        if character == "(":
            return self._group()
        if character == "[":
            return self._one_of(_CLASS)
        if character == "\\":
            return self._escape()
        self._next += 1
        if character in "^$":
            return ""
        return "a" if character == "." else character

    def _group(self) -> str:
        opening = _GROUP_OPENING.match(self._pattern, self._next)
        if opening is None:
            raise ValueError("a group of an unknown kind")
        self._next = opening.end()
        text = self.alternatives()
        if not self._take(")"):
            raise ValueError("an open group")
        return text

    def _escape(self) -> str:
        if code_point := _CODE_POINT.match(self._pattern, self._next):
            self._next = code_point.end()
            return chr(int(code_point[1] or code_point[2] or code_point[3], 16))
        letter = self._pattern[self._next + 1 : self._next + 2]
        if not letter:
            raise ValueError("nothing is escaped")
        if letter in "dDwWsS":
            return self._one_of(re.compile(r"\\."))
        self._next += 2
        if letter in "bBAzZ":
            return ""
        if letter.isalnum() and letter not in _CONTROL_ESCAPES:
            raise ValueError("an unknown escape")
        return _CONTROL_ESCAPES.get(letter, letter)

    def _one_of(self, syntax: re.Pattern[str]) -> str:
        """A character of the class that stands here, written in a syntax that `re` reads too."""
        found = syntax.match(self._pattern, self._next)
        if found is None:
            raise ValueError("an open class")
        self._next = found.end()
        members = re.compile(found[0])
        for character in _CHARACTERS:
            if members.fullmatch(character):
                return character
        raise ValueError("no plain character in the class")

    def _take(self, character: str) -> bool:
        taken = self._pattern.startswith(character, self._next)
        self._next += taken
        return taken

"""Text that a model or a file wrote, made safe to print on a terminal.

A terminal obeys what it is sent: an escape sequence can move the cursor, rename the window, answer
in the person's name, fill the clipboard; a bidirectional override can make code read as what it is
not. Whole sequences are removed, not only their first byte, so that no "[31m" stays behind.
"""

from __future__ import annotations

import re

# Everything that a filter must look at: C0 controls other than tab and newline, DEL, the C1
# controls, bidirectional embeddings, overrides and isolates (not the plain marks of Arabic and
# Hebrew), the two Unicode line separators, and surrogates, which no terminal encoding can carry.
_SUSPECT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_ESC = "\x1b"
_STRING_OPENERS = "]PX^_"  # after ESC: OSC, DCS, SOS, PM, APC, which run to a terminator
_STRING_OPENERS_C1 = "\x9d\x90\x98\x9e\x9f"
_CSI_C1 = "\x9b"
_STRING_TERMINATORS = "\x07\x9c"  # BEL and the one-character ST; ESC \ is the other ST


class TerminalFilter:
    """Removes control sequences from text that comes in pieces, wherever the pieces were cut."""

    def __init__(self) -> None:
        self._state = self._text

    def feed(self, piece: str) -> str:
        """The printable part of the next piece."""
        if self._state == self._text and not _SUSPECT.search(piece):
            return piece
        return "".join(self._state(letter) for letter in piece)

    # One method per state of the parser of ECMA-48; each takes a letter, returns what it prints.

    def _text(self, letter: str) -> str:
        if letter == _ESC:
            self._state = self._escape
        elif letter == _CSI_C1:
            self._state = self._control_sequence
        elif letter in _STRING_OPENERS_C1:
            self._state = self._string
        elif letter in "\u2028\u2029":
            return "\n"
        elif "\ud800" <= letter <= "\udfff":
            return "\ufffd"
        elif not _SUSPECT.match(letter):
            return letter
        return ""

    def _escape(self, letter: str) -> str:
        if letter == "[":
            self._state = self._control_sequence
        elif letter in _STRING_OPENERS:
            self._state = self._string
        elif not " " <= letter <= "/":  # those are intermediates: one more letter follows
            return self._resume(letter, is_part=" " <= letter <= "~")
        return ""

    def _control_sequence(self, letter: str) -> str:
        if " " <= letter <= "?":  # parameters and intermediates
            return ""
        return self._resume(letter, is_part="@" <= letter <= "~")

    def _string(self, letter: str) -> str:
        # A newline ends it too: no honest sequence holds one, and a sequence that is never
        # terminated must not swallow the rest of the answer.
        if letter in _STRING_TERMINATORS or letter == "\n":
            return self._resume(letter, is_part=letter != "\n")
        if letter == _ESC:
            self._state = self._escape  # ESC \ terminates; any other sequence aborts and begins
        return ""

    def _resume(self, letter: str, is_part: bool) -> str:
        """Go back to plain text; a letter that is no part of the sequence is text again."""
        self._state = self._text
        return "" if is_part else self._text(letter)


def printable(text: str) -> str:
    """`text` without control sequences."""
    return TerminalFilter().feed(text)


def printable_line(text: str) -> str:
    """`text` without control sequences, on one line: for names, titles and arguments."""
    return " ".join(printable(text).split())

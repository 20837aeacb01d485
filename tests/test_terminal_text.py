"""What a model or a file wrote cannot command the terminal it is printed on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridk2.cli.terminal_text import TerminalFilter, printable, printable_line

CASES = {
    "colour": ("a\x1b[31mred\x1b[0m", "ared"),
    "cursor": ("a\x1b[2J\x1b[1;1Hb", "ab"),
    "window title, BEL": ("a\x1b]0;owned\x07b", "ab"),
    "window title, ST": ("a\x1b]0;owned\x1b\\b", "ab"),
    "clipboard": ("\x1b]52;c;ZXZpbA==\x07ok", "ok"),
    "hyperlink": ("\x1b]8;;http://evil\x1b\\text\x1b]8;;\x1b\\", "text"),
    "device control": ("\x1bPq#0;2;0;0;0\x1b\\ok", "ok"),
    "application command": ("\x1b_secret\x1b\\ok", "ok"),
    "two characters": ("\x1bcok\x1b7", "ok"),
    "character set": ("\x1b(0ok", "ok"),
    "C1 CSI": ("a\x9b31mred", "ared"),
    "C1 OSC": ("a\x9d0;owned\x9cb", "ab"),
    "bare C1": ("a\x85\x84b", "ab"),
    "bell, backspace, delete": ("a\x07\x08\x7f\x00b", "ab"),
    "carriage return hides what stood there": ("rm -rf /\rls", "rm -rf /ls"),
    "dos line ends": ("a\r\nb", "a\nb"),
    "tab and newline stay": ("a\tb\n", "a\tb\n"),
    "bidirectional override": ("x\u202egnp.exe\u202c", "xgnp.exe"),
    "bidirectional isolate": ("\u2066if\u2069", "if"),
    "plain Hebrew and its marks stay": ("\u200fשלום\u200e", "\u200fשלום\u200e"),
    "joined emoji stay": ("👩\u200d🔬", "👩\u200d🔬"),
    "line separators": ("a\u2028b\u2029c", "a\nb\nc"),
    "lone surrogate": ("a\ud83db", "a\ufffdb"),
    "an unterminated sequence ends with its line": ("\x1b]0;never\nthe answer", "\nthe answer"),
    "a broken sequence gives its letter back": ("\x1b[3\nthe answer", "\nthe answer"),
    "a sequence aborts another": ("\x1b[3\x1b[31mok", "ok"),
    "an escape before text that is no sequence": ("\x1b北京", "北京"),
}


@pytest.mark.parametrize("case", CASES)
def test_control_sequences_are_removed_whole_and_text_stays(case: str) -> None:
    text, expected = CASES[case]
    assert printable(text) == expected


@pytest.mark.parametrize("case", CASES)
def test_it_does_not_matter_where_the_stream_is_cut(case: str) -> None:
    text, expected = CASES[case]
    for cut in range(len(text) + 1):
        stream = TerminalFilter()
        assert stream.feed(text[:cut]) + stream.feed(text[cut:]) == expected, f"cut at {cut}"


@given(
    st.text(alphabet=st.characters() | st.sampled_from("\x1b\x9b\x9d\x07[]0;m\\\n"), max_size=60)
)
def test_nothing_that_commands_a_terminal_ever_passes(text: str) -> None:
    shown = printable(text)
    assert not [letter for letter in shown if ord(letter) < 32 and letter not in "\t\n"]
    assert not [letter for letter in shown if 0x7F <= ord(letter) <= 0x9F]
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    shown.encode()  # and every terminal can carry it
    assert printable(shown) == shown


def test_a_name_is_shown_on_one_line() -> None:
    assert printable_line(" get\n\x1b[2Jweather\t x ") == "get weather x"

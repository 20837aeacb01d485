"""Lines about a conversation, not of it: dim, or yellow where something is not as it should be."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from hybridk2.cli.terminal_text import printable


def note(console: Console, text: str) -> None:
    _print(console, text, "dim")


def warn(console: Console, text: str) -> None:
    _print(console, text, "yellow")


def _print(console: Console, text: str, style: str) -> None:
    # In a pipe or a log a line stays one line, however long; rich would wrap it at 80 columns.
    console.print(Text(printable(text), style=style), soft_wrap=not is_terminal(console))


def is_terminal(console: Console) -> bool:
    """Whether someone watches. Not rich's answer: FORCE_COLOR makes that yes for a pipe too."""
    return console.file.isatty()

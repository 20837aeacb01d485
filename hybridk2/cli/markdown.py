"""Markdown as it streams in: finished blocks are printed once, the last one is drawn again.

Redrawing a whole answer at every token costs quadratic time and flickers once it is taller than the
window; blocks that no later text can change go to the scrollback and are forgotten.
"""

from __future__ import annotations

from markdown_it import MarkdownIt
from rich.console import Console
from rich.markdown import Markdown
from rich.segment import Segment

from hybridk2.cli.terminal_text import printable

# Raw HTML is text here: rich would drop it, and an answer about HTML would lose its subject.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])

Lines = list[list[Segment]]


def split_finished(text: str) -> tuple[str, str]:
    """Cut `text` before its last top-level block: what more text cannot change, and the rest."""
    starts = [
        token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map is not None
    ]
    if len(starts) < 2 or starts[-1] == 0:
        return "", text
    lines = text.splitlines(keepends=True)
    return "".join(lines[: starts[-1]]), "".join(lines[starts[-1] :])


def last_part(text: str, lines: int) -> str:
    """Of an unfinished block, what the last `lines` lines on a screen can show.

    A long code block, drawn whole twelve times a second, would take the processor from the model.
    Its opening fence stays, so that what is left is still code.
    """
    whole = text.splitlines(keepends=True)
    if len(whole) <= lines:
        return text
    fence = whole[0] if whole[0].lstrip().startswith(("```", "~~~")) else ""
    return fence + "".join(whole[-lines:])


def markdown_lines(console: Console, text: str) -> Lines:
    """`text` as this console would draw it: links spelled out, no blank lines around it.

    Filtered after parsing, because "&#x202e;" becomes a bidirectional override only there. Blanks
    that rich pads lines with are cut, so that what the person copies has none.
    """
    markdown = Markdown(text, hyperlinks=False)
    markdown.parsed = _PARSER.parse(text)
    lines = [
        _without_padding([Segment(printable(part.text), part.style) for part in line])
        for line in console.render_lines(markdown, console.options, pad=False)
    ]
    while lines and not lines[0]:
        del lines[0]
    while lines and not lines[-1]:
        del lines[-1]
    return lines


def _without_padding(line: list[Segment]) -> list[Segment]:
    while line:
        text, style, _ = line[-1]
        if style is not None and (style.bgcolor is not None or style.underline):
            break  # a blank that can be seen
        line.pop()
        if kept := text.rstrip(" "):
            line.append(Segment(kept, style))
            break
    return line

"""How a reply is shown while it streams: drawn on a terminal, or written plainly into a pipe.

Both views are told every event after the reply took it, and are context managers: leaving one
brings out whatever is still held back, also when the reply was cut off.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.segment import SegmentLines
from rich.text import Text

from hybridk2.chat.events import (
    Event,
    PromptProgress,
    ReasoningDelta,
    ReasoningEnd,
    TextDelta,
    ToolCallEnd,
    ToolCallStart,
)
from hybridk2.cli.markdown import last_part, markdown_lines, split_finished
from hybridk2.cli.reply import Reply, thought_line
from hybridk2.cli.terminal_text import TerminalFilter, printable_line

_THINKING_LINES = 8  # of a thought under way: enough to follow, little enough to fold calmly
_FRAMES_PER_SECOND = 12


class View(Protocol):
    """What shows a reply."""

    def __enter__(self) -> View: ...

    def __exit__(self, *exception: object) -> None: ...

    def show(self, event: Event) -> None:
        """Show one more event."""


def call_line(name: str, arguments: str) -> str:
    """A tool call on one line, as one would write it."""
    try:
        shown = json.dumps(json.loads(arguments), ensure_ascii=False)
    except (ValueError, RecursionError):  # the model's text, shown as it is
        shown = arguments
    return f"{printable_line(name)}({printable_line(shown)})"


class SilentView:
    """Shows nothing, where the reply is printed whole at its end."""

    def __enter__(self) -> SilentView:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def show(self, event: Event) -> None:
        pass


class PlainView:
    """Writes the answer and nothing else, at once, so that a pipe sees it grow.

    With show_thinking the thought comes first, between the model's own <think> marks.
    """

    def __init__(self, write: Callable[[str], None], show_thinking: bool) -> None:
        self._write = write
        self._show_thinking = show_thinking
        self._filter = TerminalFilter()
        self._thinking = False
        self._line_open = False
        self._calls: dict[int, str] = {}

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end_thought()
        self._end_line()

    def show(self, event: Event) -> None:
        if isinstance(event, ReasoningDelta):
            if self._show_thinking:
                if not self._thinking:
                    self._thinking = True
                    self._put("<think>\n")
                self._put(self._filter.feed(event.text))
            return
        self._end_thought()
        if isinstance(event, TextDelta):
            self._put(self._filter.feed(event.text))
        elif isinstance(event, ToolCallStart):
            self._calls[event.index] = event.name
        elif isinstance(event, ToolCallEnd):
            self._end_line()
            self._put(call_line(self._calls[event.index], event.arguments) + "\n")

    def _end_thought(self) -> None:
        if self._thinking:
            self._end_line()
            self._put("</think>\n\n")
            self._thinking = False
            self._filter = TerminalFilter()

    def _end_line(self) -> None:
        if self._line_open:
            self._put("\n")

    def _put(self, text: str) -> None:
        if text:
            self._write(text)
            self._line_open = not text.endswith("\n")


class LiveView:
    """Draws the reply: the thought dimmed and then folded to a line, the answer as Markdown.

    What can still change is drawn again and again in a region at the bottom, by a thread of rich;
    that thread reads strings which this class replaces and never alters.
    """

    def __init__(
        self,
        reply: Reply,
        console: Console,
        show_thinking: bool,
        count_tokens: Callable[[str], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reply = reply
        self._console = console
        self._show_thinking = show_thinking
        self._count_tokens = count_tokens
        self._clock = clock
        self._began = clock()
        self._read = ""  # how far the prompt is read
        self._filter = TerminalFilter()
        self._thought = ""  # of the run under way, filtered
        self._counted = 0  # characters of the reply's reasoning that folded lines account for
        self._tail = ""  # Markdown not yet printed
        self._blocks = 0  # Markdown blocks printed
        self._calls: dict[int, str] = {}
        self._live = Live(
            get_renderable=self._region,
            console=console,
            refresh_per_second=_FRAMES_PER_SECOND,
            transient=True,
        )

    def __enter__(self) -> LiveView:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._fold()
            self._print_blocks(everything=True)
        finally:
            self._live.stop()

    def show(self, event: Event) -> None:
        if isinstance(event, PromptProgress):
            self._read = f", {event.read_tokens:,} of {event.total_tokens:,} tokens"
        elif isinstance(event, ReasoningDelta):
            self._print_blocks(everything=True)
            self._thought += self._filter.feed(event.text)
        elif isinstance(event, ReasoningEnd):
            self._fold()
        elif isinstance(event, TextDelta):
            self._fold()
            self._tail += self._filter.feed(event.text)
            # Most blocks end with a blank line; parsing at every token would cost quadratic time.
            if "\n\n" in self._tail[-len(event.text) - 1 :]:
                self._print_blocks(everything=False)
        elif isinstance(event, ToolCallStart):
            self._fold()
            self._print_blocks(everything=True)
            self._calls[event.index] = event.name
        elif isinstance(event, ToolCallEnd):
            name = self._calls.pop(event.index)
            self._print(Text("calls " + call_line(name, event.arguments), style="bold"))

    def _fold(self) -> None:
        reasoning = self._reply.reasoning[self._counted :]
        if not reasoning:
            return
        thought, self._thought = self._thought, ""
        self._counted = len(self._reply.reasoning)
        self._filter = TerminalFilter()
        if self._show_thinking:
            self._print(Text(thought.strip(), style="dim"))
        seconds = self._reply.thinking_seconds_at(self._clock())
        line = thought_line(seconds, self._count_tokens(reasoning))
        self._print(Text(line, style="dim italic"))

    def _print_blocks(self, everything: bool) -> None:
        finished, tail = (self._tail, "") if everything else split_finished(self._tail)
        self._tail = tail  # first, so that no frame shows what is about to be printed
        lines = markdown_lines(self._console, finished)
        if lines:
            if self._blocks:
                self._print()
            self._print(SegmentLines(lines, new_lines=True))
            self._blocks += 1

    def _print(self, *content: RenderableType) -> None:
        """Print above the region, redrawn first: rich would put its last frame below once more."""
        self._live.refresh()
        self._console.print(*content)

    def _region(self) -> RenderableType:
        """What is drawn at the bottom until the next frame; never taller than the window."""
        room = max(self._console.height - 3, 1)
        if self._thought:
            seconds = self._reply.thinking_seconds_at(self._clock())
            # More characters than fit are never needed, and wrapping a long thought is slow.
            recent = self._thought.lstrip()[-_THINKING_LINES * self._console.width :]
            text = Text(recent, style="dim")
            lines = self._console.render_lines(text, pad=False)[-min(_THINKING_LINES, room) :]
            return Group(
                Text(f"thinking {seconds:.1f} s", style="dim italic"),
                SegmentLines(lines, new_lines=True),
            )
        if self._calls:
            return Text(f"calling {printable_line(next(iter(self._calls.values())))}", style="dim")
        if self._tail:
            lines = markdown_lines(self._console, last_part(self._tail, room))
            if self._blocks:
                lines.insert(0, [])  # the gap to the block above
            return SegmentLines(lines[-room:], new_lines=True)
        if self._reply.reasoning or self._reply.content:
            return Text("")
        seconds = self._clock() - self._began
        return Text(f"reading {seconds:.1f} s{self._read}", style="dim italic")

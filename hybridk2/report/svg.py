"""The pictures of a benchmark as SVG: what a step is made of, layer by layer, and what overlapped.

Owns the drawing: scales, colours, labels. Every picture stands alone: it brings its style, follows
the viewer's light or dark scheme, and names each of its parts in a tooltip. What the figures mean
is `hybridk2.benchmark`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from hybridk2.benchmark.figures import PHASES, PassFigures
from hybridk2.report.tables import number
from hybridk2.timeline import HostCall, Span, Step

HOST = "host experts"
# By the phase: on a light page, on a dark one. Waiting stands out, handing over does not.
COLOURS: Mapping[str, tuple[str, str]] = {
    "embedding": ("#c46aa8", "#e59bcf"),
    "attention": ("#3b6fd4", "#6d9bff"),
    "dense MLP": ("#1c9a9a", "#4cc9c4"),
    "router": ("#c29a1c", "#e3c558"),
    "handoff": ("#7d8290", "#8d93a1"),
    "shared expert": ("#3f9b4f", "#66c277"),
    "waiting": ("#d2504a", "#f07c74"),
    "adding": ("#b3b8c4", "#626876"),
    "head": ("#8457c9", "#b08cf0"),
    "recorded step": ("#4a6a8c", "#86a8cc"),
    "sampling": ("#6b4f3a", "#b08d74"),
    HOST: ("#e07b28", "#f5a055"),
}
_PAGE, _INK, _QUIET, _LINE = "page", "ink", "quiet", "line"
_GROUNDS = {
    _PAGE: ("#ffffff", "#16171a"),
    _INK: ("#1b1c21", "#e8e9ed"),
    _QUIET: ("#62656f", "#9b9faa"),
    _LINE: ("#e1e2e8", "#2f3238"),
}
_WIDTH = 960.0
_LEFT, _RIGHT = 96.0, 16.0
_LEGEND_HEIGHT, _LEGEND_GLYPH = 22.0, 7.0  # a letter of 12 px takes 7 px at most on the average
_MOST_BAR = 56.0
_LABEL_ROOM = 10.0
_TIMELINE_LAYERS = 3


@dataclass(frozen=True)
class _Scale:
    """From milliseconds to pixels, with round ticks."""

    most: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        return self.first + (self.last - self.first) * value / self.most

    def ticks(self) -> list[float]:
        rough = self.most / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        return [step * count for count in range(int(self.most / step) + 1)]


def steps_by_context(rows: Sequence[tuple[str, PassFigures]]) -> str:
    """One bar per row, its name before it: a median step, put together from its phases."""
    row_height, bar = 44.0, 26.0
    present = [phase for phase in PHASES if any(phase in row.phase_ms for _, row in rows)]
    legend, top = _legend(present, 0)
    longest = max(sum(ms.median for ms in row.phase_ms.values()) for _, row in rows)
    scale = _Scale(longest, _LEFT, _WIDTH - _RIGHT - 90)
    bottom = top + 8 + row_height * len(rows)
    parts = [legend, *_vertical_grid(scale, top + 4, bottom)]
    for place, (name, row) in enumerate(rows):
        y = top + 8 + place * row_height + (row_height - bar) / 2
        parts.append(_text(_LEFT - 10, y + bar / 2 + 4, name, _INK, "end"))
        begin = 0.0
        for phase, ms in row.phase_ms.items():
            tip = f"{name}: {phase} {_ms(ms.median)}, half of them {_ms(ms.lower_quartile)} to "
            tip += _ms(ms.upper_quartile)
            end = begin + ms.median
            parts.append(_rect(phase, scale(begin), y, scale(end) - scale(begin), bar, tip))
            begin = end
        parts.append(_text(scale(begin) + 8, y + bar / 2 + 4, _ms(row.step_ms.median), _QUIET))
    return _picture(parts, bottom + 24, "What a step is made of")


def phases_by_layer(figures: PassFigures) -> str:
    """Every layer's phases on one another, and beside them the time of the host's workers."""
    layers = sorted({layer for layer, _ in figures.layer_ms})
    present = [phase for phase in PHASES if any(found == phase for _, found in figures.layer_ms)]
    legend, top = _legend([*present, *([HOST] if figures.host_layer_ms else [])], 0)
    stacks = {
        layer: [
            (phase, figures.layer_ms[layer, phase])
            for phase in present
            if (layer, phase) in figures.layer_ms
        ]
        for layer in layers
    }
    heights = [sum(ms.median for _, ms in stack) for stack in stacks.values()]
    heights += [ms.median for ms in figures.host_layer_ms.values()]
    bottom = top + 268
    scale = _Scale(max(heights), bottom, top + 16)
    room = (_WIDTH - _LEFT - _RIGHT) / len(layers)
    bar = min(room * 0.6, _MOST_BAR)
    parts = [legend, *_horizontal_grid(scale)]
    for place, layer in enumerate(layers):
        x = _LEFT + room * place + (room - bar * 1.45) / 2
        begin = 0.0
        for phase, ms in stacks[layer]:
            tip = f"layer {layer}: {phase} {_ms(ms.median)}, half of them {_ms(ms.lower_quartile)}"
            tip += f" to {_ms(ms.upper_quartile)}"
            y, height = scale(begin + ms.median), scale(begin) - scale(begin + ms.median)
            parts.append(_rect(phase, x, y, bar, height, tip))
            begin += ms.median
        if (host := figures.host_layer_ms.get(layer)) is not None:
            tip = f"layer {layer}: {HOST} {_ms(host.median)}, beside the others"
            y = scale(host.median)
            parts.append(_rect(HOST, x + bar * 1.1, y, bar * 0.35, bottom - y, tip))
        if place % max(math.ceil(26 / room), 1) == 0:
            parts.append(_text(x + bar * 0.72, bottom + 18, str(layer), _QUIET, "middle"))
    parts.append(
        _text(_LEFT + (_WIDTH - _LEFT - _RIGHT) / 2, bottom + 38, "layer", _QUIET, "middle")
    )
    return _picture(parts, bottom + 48, "Phases of every layer")


def overlap(step: Step) -> str:
    """What both sides did at the same time, in some layers from the middle of a step.

    Only for steps in which the host's workers took part.
    """
    called = [call.layer for call in step.host_calls]
    first = max(len(called) - _TIMELINE_LAYERS, 0) // 2
    shown = called[first : first + _TIMELINE_LAYERS]
    spans = [span for span in step.spans if span.layer in shown]
    calls = [call for call in step.host_calls if call.layer in shown]
    legend, top = _legend(
        [*(phase for phase in PHASES if any(span.phase == phase for span in spans)), HOST], 0
    )
    start = spans[0].began
    scale = _Scale((spans[-1].ended - start) * 1e3, _LEFT, _WIDTH - _RIGHT)
    lanes, lane_height, bar = (top + 30, top + 84), 54.0, 40.0
    bottom = lanes[1] + lane_height
    parts = [legend, *_vertical_grid(scale, top + 24, bottom)]
    for layer in shown:
        x = scale((next(span.began for span in spans if span.layer == layer) - start) * 1e3)
        parts.append(
            f'<line class="s-{_QUIET}" x1="{x:.2f}" x2="{x:.2f}" y1="{top + 6:.1f}"'
            f' y2="{bottom:.1f}" stroke="{_GROUNDS[_QUIET][0]}" stroke-dasharray="2 3"/>'
        )
        parts.append(_text(x + 5, top + 18, f"layer {layer}", _QUIET))
    for name, y in (("this thread", lanes[0]), ("host workers", lanes[1])):
        parts.append(_text(_LEFT - 10, y + bar / 2 + 4, name, _INK, "end"))
    bars: list[tuple[str, Span | HostCall, float]] = [
        (span.phase, span, lanes[0]) for span in spans
    ]
    bars += [(HOST, call, lanes[1]) for call in calls]
    for name, work, y in bars:
        x = scale((work.began - start) * 1e3)
        width = scale((work.ended - start) * 1e3) - x
        tip = f"layer {work.layer}: {name} {_ms(work.seconds * 1e3)}"
        parts.append(_rect(name, x, y, width, bar, tip))
        if width > len(name) * _LEGEND_GLYPH + _LABEL_ROOM:
            parts.append(_text(x + width / 2, y + bar / 2 + 4, name, _PAGE, "middle"))
    return _picture(parts, bottom + 24, "What both sides did at the same time")


def style() -> str:
    """The classes of all pictures: colours of the light scheme, and of the dark one."""
    light: list[str] = []
    dark: list[str] = []
    for name, (by_day, by_night) in {**COLOURS, **_GROUNDS}.items():
        for rules, colour in ((light, by_day), (dark, by_night)):
            rules.append(f".f-{_slug(name)}{{fill:{colour}}}.s-{_slug(name)}{{stroke:{colour}}}")
    return f"{''.join(light)}@media(prefers-color-scheme:dark){{{''.join(dark)}}}"


def _picture(parts: Iterable[str], height: float, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {height:.0f}" '
        f'role="img" aria-label="{escape(title)}" font-family="system-ui, sans-serif" '
        f'font-size="12"><style>{style()}</style>'
        f'<rect class="f-{_PAGE}" width="100%" height="100%" fill="{_GROUNDS[_PAGE][0]}"/>'
        + "".join(parts)
        + "</svg>"
    )


def _legend(names: Sequence[str], y: float) -> tuple[str, float]:
    """The names with their colours, wrapped; and where the space below begins."""
    x, parts = _LEFT, []
    for name in names:
        width = 18 + len(name) * _LEGEND_GLYPH + 14
        if x + width > _WIDTH - _RIGHT:
            x, y = _LEFT, y + _LEGEND_HEIGHT
        parts.append(_rect(name, x, y + 5, 12, 12, name))
        parts.append(_text(x + 18, y + 15, name, _INK))
        x += width
    return "".join(parts), y + _LEGEND_HEIGHT + 6


def _vertical_grid(scale: _Scale, top: float, bottom: float) -> Iterator[str]:
    for tick in scale.ticks():
        x = scale(tick)
        yield _grid_line(x, x, top, bottom)
        yield _text(x, bottom + 16, _ms(tick), _QUIET, "middle")


def _horizontal_grid(scale: _Scale) -> Iterator[str]:
    for tick in scale.ticks():
        y = scale(tick)
        yield _grid_line(_LEFT, _WIDTH - _RIGHT, y, y)
        yield _text(_LEFT - 10, y + 4, _ms(tick), _QUIET, "end")


def _grid_line(x1: float, x2: float, y1: float, y2: float) -> str:
    return (
        f'<line class="s-{_LINE}" x1="{x1:.2f}" x2="{x2:.2f}" y1="{y1:.2f}" y2="{y2:.2f}" '
        f'stroke="{_GROUNDS[_LINE][0]}"/>'
    )


def _rect(name: str, x: float, y: float, width: float, height: float, tip: str) -> str:
    """A part. The colour stands beside its class for viewers that do not read styles."""
    return (
        f'<rect class="f-{_slug(name)}" x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.3):.2f}" '
        f'height="{max(height, 0.3):.2f}" fill="{COLOURS[name][0]}">'
        f"<title>{escape(tip)}</title></rect>"
    )


def _text(x: float, y: float, text: str, ground: str, anchor: str = "start") -> str:
    return (
        f'<text class="f-{ground}" x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" '
        f'fill="{_GROUNDS[ground][0]}">{escape(text)}</text>'
    )


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def _ms(milliseconds: float) -> str:
    """In the unit that they are read best in."""
    if 0 < milliseconds < 1:
        return f"{number(milliseconds * 1e3)} µs"
    if milliseconds < 1000:
        return f"{number(milliseconds)} ms"
    return f"{number(milliseconds / 1e3)} s"

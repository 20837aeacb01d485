"""Routing as pictures: which experts are popular in each layer, and how soon they come again.

Owns the figures behind the two heat maps and their drawing as SVG. Knows no policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridk2.routing_trace import RoutingTrace
from hybridk2.tuner.replay import Counts, count_picks

Figures = NDArray[np.floating[Any]]

DISTANCES = (1, 2, 4, 8, 16, 32, 64)
# More columns than this are less than 8 pixels wide.
_MOST_COLUMNS = 96
# Enough for shares of 1%; all tokens of a long trace would take minutes.
_LOCALITY_TOKENS = 16_384

_LEFT, _TOP, _WIDTH, _ROW = 56, 36, 820, 12
_SWATCHES = 5
# From nothing to most, readable on a light page and on a dark one, and without colours.
_COLOURS = ("#f3f0e7", "#f6d58a", "#f2a154", "#dd6240", "#a92f4e", "#5c1a54")


def popularity(counts: Counts) -> Figures:
    """Each layer's picks by expert, the most picked first, as multiples of the mean.

    counts: (layers, experts). Returns (layers, columns): the mean of neighbours in a column.
    """
    ordered = -np.sort(-counts, axis=1)
    mean = np.maximum(ordered.mean(axis=1, keepdims=True), 1e-300)
    columns = np.array_split(ordered / mean, min(_MOST_COLUMNS, counts.shape[1]), axis=1)
    return np.stack([column.mean(axis=1) for column in columns], axis=1)


def locality(trace: RoutingTrace) -> tuple[Figures, Figures]:
    """How many of a token's experts are picked again so many tokens of its request later: (layers,
    DISTANCES), NaN where no request is as long; and how many would be if each token picked for
    itself: (layers,)."""
    experts = trace.header.experts
    requests = trace.requests[:_LOCALITY_TOKENS]
    order = np.argsort(requests, kind="stable")  # a request's tokens together, in their order
    requests, ids = requests[order], trace.ids[:, order]
    layers, tokens, top_k = ids.shape
    again = np.full((layers, len(DISTANCES)), np.nan)
    by_chance = np.empty(layers)
    for layer in range(layers):
        picked = np.zeros((tokens, experts), bool)
        np.put_along_axis(picked, ids[layer].astype(np.int64), True, axis=1)
        by_chance[layer] = (picked.mean(axis=0) ** 2).sum() / top_k
        for column, distance in enumerate(DISTANCES):
            same = requests[distance:] == requests[:-distance]
            if same.any():
                both = picked[distance:] & picked[:-distance]
                again[layer, column] = both[same].sum() / (same.sum() * top_k)
    return again, by_chance


def popularity_map(trace: RoutingTrace) -> str:
    """The heat map of `popularity`."""
    experts = trace.header.experts
    figures = popularity(count_picks(trace.ids, experts))
    columns = figures.shape[1]
    starts = [column[0] for column in np.array_split(np.arange(experts), columns)]
    names = [f"rank {start + 1}" for start in starts]
    tips = [[f"{value:.2f} times the mean" for value in row] for row in figures]
    shown = [0, columns // 4, columns // 2, 3 * columns // 4, columns - 1]
    # By the square root: a few experts of one layer would leave all others without a colour.
    return _heat_map(
        "popularity", figures, 0.5, "{:.3g} x mean", names, tips, shown, "experts by rank"
    )


def locality_map(trace: RoutingTrace) -> str:
    """The heat map of `locality`, with chance as its last column."""
    again, by_chance = locality(trace)
    figures = np.concatenate([again, by_chance[:, None]], axis=1)
    names = [f"{distance} later" for distance in DISTANCES] + ["by chance"]
    tips = [
        ["beyond the trace" if np.isnan(value) else f"{value:.1%} picked again" for value in row]
        for row in figures
    ]
    shown = range(len(names))
    return _heat_map("locality", figures, 1.0, "{:.0%}", names, tips, shown, "tokens later")


def _heat_map(
    name: str,
    figures: Figures,
    power: float,
    unit: str,
    names: Sequence[str],
    tips: Sequence[Sequence[str]],
    shown: Sequence[int],
    axis: str,
) -> str:
    """figures: (layers, columns), one rectangle each with its tip; NaN is left out. power: of the
    share of the largest that a colour shows. unit: a format of the legend's values. shown: columns
    whose names stand below."""
    layers, columns = figures.shape
    width, bottom = _WIDTH / columns, _TOP + layers * _ROW
    most = float(np.nanmax(figures)) or 1.0
    parts = [
        f'<svg class="{name}" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'aria-label="{escape(name)}" viewBox="0 0 {_LEFT + _WIDTH + 8} {bottom + 44}" '
        'font-family="system-ui, sans-serif" font-size="11" fill="currentColor">'
    ]
    for swatch in range(_SWATCHES + 1):
        share = swatch / _SWATCHES
        x, value = _LEFT + 130 * swatch, escape(unit.format(most * share ** (1 / power)))
        parts.append(f'<path d="M{x} 6h14v14h-14z" fill="{_colour(share)}"/>')
        parts.append(f'<text x="{x + 20}" y="17">{value}</text>')
    for layer in range(layers):
        y = _TOP + layer * _ROW
        if layer % max(layers // 12, 1) == 0:
            parts.append(f'<text x="{_LEFT - 8}" y="{y + 10}" text-anchor="end">{layer}</text>')
        for column, value in enumerate(figures[layer].tolist()):
            if value == value:  # not NaN
                tip = escape(f"MoE layer {layer}, {names[column]}: {tips[layer][column]}")
                colour = _colour((value / most) ** power)
                parts.append(
                    f'<rect x="{_LEFT + column * width:.1f}" y="{y}" width="{width + 0.2:.1f}" '
                    f'height="{_ROW}" fill="{colour}"><title>{tip}</title></rect>'
                )
    for column in sorted(set(shown)):
        x = _LEFT + (column + 0.5) * width
        anchor = "end" if column == columns - 1 else "middle" if column else "start"
        x += {"start": -width / 2, "end": width / 2, "middle": 0}[anchor]
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="{anchor}">'
            f"{escape(names[column])}</text>"
        )
    middle = _LEFT + _WIDTH / 2
    parts.append(f'<text x="{middle}" y="{bottom + 36}" text-anchor="middle">{escape(axis)}</text>')
    parts.append(f'<text x="4" y="{_TOP + 10}">layer</text></svg>')
    return "".join(parts)


def _colour(share: float) -> str:
    """Between two neighbours of _COLOURS. share: 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(_COLOURS) - 1)
    below = min(int(place), len(_COLOURS) - 2)
    first, second = (
        [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
        for colour in _COLOURS[below : below + 2]
    )
    mixed = (round(a + (b - a) * (place - below)) for a, b in zip(first, second, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)

"""The tuning report: one HTML page that opens without a network and runs nothing.

Owns the words and tables around the pictures. What they show is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from hybridk2.report.document import document
from hybridk2.routing_trace import RoutingTrace
from hybridk2.tuner.choice import PARTS, PolicyResult, Tuning
from hybridk2.tuner.routing_picture import locality_map, popularity_map


def page(model: str, about: Sequence[str], trace: RoutingTrace, tuning: Tuning) -> str:
    """The whole page. about: lines on what was run and what the predictions stand on."""
    chosen = tuning.chosen
    gain = chosen.tokens_per_second / tuning.without.tokens_per_second - 1
    sizes = [len(ids) for ids in tuning.placement.resident]
    body = (
        f"<h1>Experts of {escape(model)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in about),
        f"<p><b>{escape(chosen.name)}</b>: {chosen.experts:,} experts on the GPU, {min(sizes)} to "
        f"{max(sizes)} of a layer. {chosen.tokens_per_second:.3g} tok/s predicted, "
        f"{gain:+.0%} on {tuning.without.tokens_per_second:.3g} tok/s without.</p>",
        "<h2>Placements</h2>",
        f"<p>Learned from the trace and replayed on it; held out: learned from {PARTS - 1} of "
        f"{PARTS} parts and replayed on the other. The latter is what to expect of other prompts, "
        "gives the tokens per second, and decides.</p>",
        _table(tuning.policies, chosen),
        "<h2>Caches, for comparison</h2>",
        "<p>Experts that come and go between tokens. The engine does none of this: a miss is "
        "computed where it lies, as an upload takes longer than computing it. Replayed on "
        f"{tuning.caches[0].tokens:,} tokens, from the chosen placement.</p>",
        _table(tuning.caches, None),
        "<h2>Popularity</h2>",
        "<p>Picks of each expert, in each layer the most picked first. A layer that is dark on the "
        "left and light on the right is served by few experts; one that is even gains little."
        "</p>",
        f'<figure class="scroll">{popularity_map(trace)}</figure>',
        "<h2>Locality</h2>",
        "<p>How many of a token's experts are picked again by the token so many places later, "
        "beside what popularity alone would give.</p>",
        f'<figure class="scroll">{locality_map(trace)}</figure>',
    )
    return document(f"HybridK2 tune: {model}", body)


def _table(results: Iterable[PolicyResult], chosen: PolicyResult | None) -> str:
    rows = "".join(
        f"<tr{' class=chosen' if result is chosen else ''}><td>{escape(result.name)}</td>"
        f'<td class="words">{escape(result.meaning)}</td>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(result))
        + "</tr>"
        for result in results
    )
    heads = ("policy", "", "experts", "hits", "held out", "uploads", "tok/s")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _cells(result: PolicyResult) -> tuple[str, ...]:
    return (
        f"{result.experts:,}",
        f"{result.replay.hit_rate:.1%}",
        "" if result.held_out is None else f"{result.held_out.hit_rate:.1%}",
        f"{result.replay.uploads:.3g}" if result.replay.uploads else "",
        f"{result.tokens_per_second:.3g}",
    )

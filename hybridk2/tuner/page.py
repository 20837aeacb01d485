"""The tuning report: one HTML page that opens without a network and runs nothing.

Owns the words and tables around the pictures. What they show is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from hybridk2.routing_trace import RoutingTrace
from hybridk2.tuner.choice import PARTS, PolicyResult, Tuning
from hybridk2.tuner.routing_picture import locality_map, popularity_map

_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 62rem;
  font: 16px/1.6 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; font-size: 1.2rem; }
p { max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.75rem; text-align: right; border-bottom: 1px solid #8884; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tr.chosen { font-weight: 650; }
svg { display: block; width: 100%; min-width: 36rem; height: auto; }
"""


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
        f'<div class="scroll">{popularity_map(trace)}</div>',
        "<h2>Locality</h2>",
        "<p>How many of a token's experts are picked again by the token so many places later, "
        "beside what popularity alone would give.</p>",
        f'<div class="scroll">{locality_map(trace)}</div>',
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever a name may hold: nothing is loaded, nothing runs.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>HybridK2 tune: {escape(model)}</title>\n<style>{_STYLE}</style>\n"
        "</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _table(results: Iterable[PolicyResult], chosen: PolicyResult | None) -> str:
    rows = "".join(
        f"<tr{' class=chosen' if result is chosen else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(result))
        + "</tr>"
        for result in results
    )
    heads = ("policy", "", "experts", "hits", "held out", "uploads", "tok/s")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _cells(result: PolicyResult) -> tuple[str, ...]:
    return (
        result.name,
        result.meaning,
        f"{result.experts:,}",
        f"{result.replay.hit_rate:.1%}",
        "" if result.held_out is None else f"{result.held_out.hit_rate:.1%}",
        f"{result.replay.uploads:.3g}" if result.replay.uploads else "",
        f"{result.tokens_per_second:.3g}",
    )

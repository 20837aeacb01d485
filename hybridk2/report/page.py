"""The benchmark's page: which figures and pictures it shows, and how to read them."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from hybridk2.benchmark.figures import Benchmark, Frontier, PassFigures
from hybridk2.report import svg, tables
from hybridk2.report.document import document


def page(benchmark: Benchmark) -> str:
    """The whole page as HTML."""
    body = (
        f"<h1>{escape(benchmark.model)}</h1>",
        f'<p class="quiet">{escape(tables.subject(benchmark))}</p>',
        '<div class="cards">',
        *(_card(frontier) for frontier in benchmark.frontiers),
        "</div>",
        *_against_the_roofs(benchmark),
        *_one_token(benchmark.frontiers),
        *_one_chunk(benchmark.frontiers),
        *(_layers(frontier, is_last) for frontier, is_last in _last_first(benchmark.frontiers)),
        _glossary(),
    )
    return document(f"HybridK2 bench: {benchmark.model}", body)


def _card(frontier: Frontier) -> str:
    decode, prefill = frontier.decode, frontier.prefill
    return (
        f'<section class="card"><h3>at {frontier.context_tokens:,} tokens</h3>'
        f"<div><b>{tables.number(decode.tokens_per_second.median)}</b> tok/s decode</div>"
        f'<div class="quiet">{tables.number(decode.step_ms.median)} ms a token</div>'
        f"<div>{tables.number(prefill.tokens_per_second.median)} tok/s prefill</div></section>"
    )


def _against_the_roofs(benchmark: Benchmark) -> Iterable[str]:
    yield "<h2>Against the machine's roofs</h2>"
    yield (
        f"<p>In the same run {escape(tables.roofs(benchmark))}. Decoding is bound by reading: "
        "every token reads its experts and all dense weights once. Reading a prompt is bound by "
        "multiplying. Weights that fit into the processor's caches show another roof than weights "
        "in memory.</p>"
    )
    yield _table(tables.rates(benchmark))
    yield f'<p class="quiet">{escape(tables.RATES_NOTE)}</p>'


def _one_token(frontiers: Sequence[Frontier]) -> Iterable[str]:
    last = frontiers[-1]
    largest = sorted(last.decode.phase_ms.items(), key=lambda item: -item[1].median)[:3]
    total = sum(ms.median for ms in last.decode.phase_ms.values())
    shares = ", ".join(f"{name} {ms.median / total:.0%}" for name, ms in largest)
    yield "<h2>One decoded token</h2>"
    yield f"<p>At {last.context_tokens:,} tokens: {escape(shares)}.</p>"
    yield _figure(
        svg.steps_by_context([(f"{row.context_tokens:,}", row.decode) for row in frontiers]),
        "token",
        "By context; every phase is summed over the layers.",
    )
    yield _phase_table([(f"{row.context_tokens:,}", row.decode) for row in frontiers])


def _one_chunk(frontiers: Sequence[Frontier]) -> Iterable[str]:
    yield "<h2>One chunk of a prompt</h2>"
    rows = [(f"{row.context_tokens:,}", row.prefill) for row in frontiers]
    chunks = "; ".join(
        f"{row.prefill.past_tokens:,} to {row.prefill.past_tokens + row.prefill.tokens:,}"
        for row in frontiers
    )
    yield (
        f"<p>Whole chunks on the way to each context, of tokens {chunks}. What was read for one "
        "context is not read again for the next.</p>"
    )
    yield _figure(svg.steps_by_context(rows), "chunk", "By the context that was being reached.")
    yield _phase_table(rows)


def _layers(frontier: Frontier, is_open: bool) -> str:
    context = frontier.context_tokens
    passes = (
        ("decode", "a decoded token", frontier.decode),
        ("prefill", "a chunk", frontier.prefill),
    )
    parts = [
        picture
        for name, what, figures in passes
        for picture in _layer_pictures(f"{name}-{context}", what, figures)
    ]
    return (
        f"<details{' open' if is_open else ''}><summary>Layer by layer at {context:,} tokens"
        f"</summary>{''.join(parts)}</details>"
    )


def _layer_pictures(name: str, what: str, figures: PassFigures) -> Iterable[str]:
    yield _figure(
        svg.phases_by_layer(figures),
        f"layers-{name}",
        f"The phases of {what} in each layer, on one another. The narrow bar is the workers' own "
        "time, which runs beside them.",
    )
    if figures.hidden_share is not None:
        yield _figure(
            svg.overlap(figures.typical),
            f"overlap-{name}",
            f"Layers from the middle of {what} of median length: the shared expert is computed "
            "while the host's workers compute the routed experts, by the workers' own clock. "
            f"Over all of them {figures.hidden_share:.0%} of the workers' time passed while this "
            "thread did not wait for it.",
        )


def _last_first(frontiers: Sequence[Frontier]) -> Iterable[tuple[Frontier, bool]]:
    """The longest context open, the others below it and closed."""
    for frontier in reversed(frontiers):
        yield frontier, frontier is frontiers[-1]


def _glossary() -> str:
    terms = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>"
        for name, meaning in tables.MEANINGS.items()
    )
    return f"<details><summary>What the names mean</summary><dl>{terms}</dl></details>"


def _figure(picture: str, name: str, caption: str) -> str:
    data = base64.b64encode(picture.encode()).decode()
    link = f'<a download="{name}.svg" href="data:image/svg+xml;base64,{data}">Save as SVG</a>'
    return (
        f'<figure><div class="scroll">{picture}</div>'
        f"<figcaption>{escape(caption)} {link}</figcaption></figure>"
    )


def _phase_table(columns: Sequence[tuple[str, PassFigures]]) -> str:
    table = _table(tables.phases(columns))
    return f"<details><summary>In numbers</summary>{table}</details>"


def _table(table: tables.Table) -> str:
    heads, rows = table
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    lines = (
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for cells in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )

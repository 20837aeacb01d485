"""A benchmark's figures as tables of text, for the page and for the terminal.

Owns how figures are put into words and digits. A table is its heads, and rows of as many cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hybridk2.benchmark.figures import Benchmark, Frontier, PassFigures, Spread

Table = tuple[Sequence[str], Sequence[Sequence[str]]]

RATES_NOTE = (
    "Medians, ± half of what the middle half spans; in brackets the share of the roof. Experts: "
    "over their workers' own time, in part of which the shared expert runs on the same cores. "
    "Dense: weights and cached latents, over the time of attention, router, shared expert, dense "
    "layers and head. As planned, where doctor has measured the machine: what plan predicts."
)

MEANINGS: Mapping[str, str] = {
    "embedding": "looking up the tokens' vectors and the angles of their positions",
    "attention": "latent attention with the norm before it: its matrices, and the cached latents",
    "dense MLP": "the feed-forward block of a layer that has no experts, with its norm",
    "router": "the norm before the experts, and which of them each token picks",
    "handoff": "handing the tokens and their picks to the host's workers",
    "shared expert": "the expert that every token passes, while the workers compute the others",
    "waiting": "for the workers, once the shared expert is done",
    "adding": "the workers' share to the shared expert's, and both to the hidden state",
    "head": "the last norm and the logits: reads lm_head, one row for each id of the vocabulary",
    "recorded step": "embedding to logits as one, where a device replays it without being told",
    "sampling": "from logits to a token",
    "host experts": "the workers' own time for the routed experts, beside all other phases",
}


def rates(benchmark: Benchmark) -> Table:
    """A column per context: tokens, bytes and operations per second, against the roofs."""
    read, flop = benchmark.roofs.read_bytes_per_second, benchmark.roofs.expert_flop_per_second
    frontiers = benchmark.frontiers
    decoding, reading = [row.decode for row in frontiers], [row.prefill for row in frontiers]
    planned = [_planned(row) for row in frontiers]
    rows = (
        ("decode tok/s", *(_rate(row.tokens_per_second, 1) for row in decoding)),
        *([("as planned", *planned)] if any(planned) else []),
        ("experts GB/s", *(_rate(row.expert_bytes_per_second, 1e9, read) for row in decoding)),
        ("dense GB/s", *(_rate(row.dense_bytes_per_second, 1e9, read) for row in decoding)),
        ("prefill tok/s", *(_rate(row.tokens_per_second, 1) for row in reading)),
        ("experts TFLOP/s", *(_rate(row.expert_flop_per_second, 1e12, flop) for row in reading)),
    )
    return ("context", *(f"{row.context_tokens:,}" for row in frontiers)), rows


def phases(columns: Sequence[tuple[str, PassFigures]]) -> Table:
    """A row per phase, summed over the layers, in milliseconds; a column per pass, by its name."""
    names = dict.fromkeys(phase for _, column in columns for phase in column.phase_ms)
    rows = [(name, *(_ms(column.phase_ms.get(name)) for _, column in columns)) for name in names]
    rows.append(("whole step", *(_ms(column.step_ms) for _, column in columns)))
    rows.append(("host experts, beside", *(_ms(column.host_ms) for _, column in columns)))
    return ("ms", *(name for name, _ in columns)), rows


def roofs(benchmark: Benchmark) -> str:
    """What the machine reached doing nothing else, as a sentence's end."""
    read, flop = benchmark.roofs.read_bytes_per_second, benchmark.roofs.expert_flop_per_second
    reached = [
        *([] if read is None else [f"read {number(read / 1e9)} GB/s of the experts' memory"]),
        *([] if flop is None else [f"multiplied {number(flop / 1e12)} TFLOP/s"]),
    ]
    return f"all threads {' and '.join(reached)}" if reached else "nothing could be measured"


def subject(benchmark: Benchmark) -> str:
    """Machine, kernels and weights in a line."""
    nodes = f" on {benchmark.nodes} NUMA nodes" if benchmark.nodes > 1 else ""
    return (
        f"{benchmark.machine}: {benchmark.threads} threads{nodes}, {benchmark.isa} kernels, "
        f"{benchmark.dtype} activations; {byte_size(benchmark.weight_bytes)} of weights, loaded in "
        f"{number(benchmark.load_seconds)} s; HybridK2 {benchmark.version}, {benchmark.started_at}"
    )


def number(value: float) -> str:
    """Three digits that count, and all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def byte_size(num_bytes: int) -> str:
    if num_bytes < 1e9:
        return f"{number(num_bytes / 1e6)} MB"
    return f"{number(num_bytes / 1e9)} GB"


def _planned(frontier: Frontier) -> str:
    planned, measured = frontier.planned_tokens_per_second, frontier.decode.tokens_per_second
    return "" if planned is None else f"{number(planned)} ({planned / measured.median - 1:+.0%})"


def _rate(rate: Spread | None, unit: float, roof: float | None = None) -> str:
    if rate is None:
        return "none"
    half = (rate.upper_quartile - rate.lower_quartile) / 2 / unit
    spread = f" ± {half:.2g}" if rate.samples > 1 else ""
    share = "" if roof is None else f" ({rate.median / roof:.0%})"
    return f"{number(rate.median / unit)}{spread}{share}"


def _ms(ms: Spread | None) -> str:
    return "none" if ms is None else number(ms.median)

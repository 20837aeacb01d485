"""How long does a routing trace of a million tokens take: to write, to read, to tune on?

Makes routing with K2's 60 layers, 384 experts and 8 picks a token, and prints seconds and GB/s of
every step, and of every policy its hits and predicted speed. The last line is JSON. Needs 3 GB of
memory and 0.6 GB of disk for a million tokens.

    python bench/replay.py --tokens 1000000
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hybridk2.hardware import gpu_named
from hybridk2.planner import BUILT_IN, Choices, ModelSizes
from hybridk2.routing_trace import TraceWriter, read_trace
from hybridk2.tuner.choice import tune
from hybridk2.tuner.costs import step_cost
from hybridk2.tuner.page import page
from tests.routed_traces import skewed_trace

_BLOCK_TOKENS = 4096
# Preferences are drawn for so many tokens, and those repeated: the replay does not care.
_DRAWN_TOKENS = 8192


@click.command()
@click.option("--tokens", type=click.IntRange(1000), default=1_000_000, show_default=True)
@click.option("--gpu", default="RTX PRO 6000", show_default=True)
@click.option("--host-gbps", type=float, default=200.0, show_default=True)
@click.option("--experts-per-layer", type=int, default=47, show_default=True)
def main(tokens: int, gpu: str, host_gbps: float, experts_per_layer: int) -> None:
    """Write, read and replay a trace of K2's shape."""
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str, num_bytes: int = 0) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - begin
        speed = f", {num_bytes / seconds[name] / 1e9:.2f} GB/s" if num_bytes else ""
        click.echo(f"{name:<20} {seconds[name]:7.2f} s{speed}")

    drawn = skewed_trace(_DRAWN_TOKENS, layers=60, experts=384, top_k=8, seed=0)
    blocks = np.array_split(drawn.ids.swapaxes(0, 1), _DRAWN_TOKENS // _BLOCK_TOKENS)
    file_bytes = drawn.header.payload_bytes(tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        with timed("write", file_bytes):
            writer = TraceWriter(path, drawn.header)
            while writer.tokens < tokens:
                block = blocks[writer.blocks % len(blocks)]
                writer.append(block[: tokens - writer.tokens])
            writer.close()
        with timed("read", file_bytes):
            trace = read_trace(path)
    sizes = ModelSizes.from_config(BUILT_IN["kimi-k2-thinking"])
    cost = step_cost(sizes, host_gbps * 1e9, gpu_named(gpu), Choices())
    with timed("tune"):
        tuning = tune(trace, cost, 60 * experts_per_layer)
    with timed("page"):
        page("K2", [], trace, tuning)
    for result in (*tuning.policies, *tuning.caches):
        click.echo(
            f"{result.name:<20} {result.replay.hit_rate:6.1%} hits, "
            f"{result.tokens_per_second:6.2f} tok/s, replayed on {result.tokens:,} tokens"
        )
    click.echo(json.dumps({"tokens": tokens, "seconds": seconds, **tuning.as_dict()}))


if __name__ == "__main__":
    main()

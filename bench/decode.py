"""A whole checkpoint on this machine: does it load within its memory, and how fast does it answer?

Loads the model as the chat does, reads a prompt of random ids and decodes, several times over.
Decoding reads every dense weight and the picked experts once per token, so those bytes over the
machine's read bandwidth, measured in the same run, are the roof. The largest resident set is
compared with its bound: the weights, 3% and 1 GB.

The last line is JSON. With --check the exit status is 1 when the memory bound does not hold.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time

import click
import torch

from hybridk2.checkpoint import Checkpoint, LoadProgress, locate_model
from hybridk2.config import EngineConfig, K2Config
from hybridk2.engine import Engine
from hybridk2.experts.host import READ_LOOPS
from hybridk2.sampling import SamplingParams

MEMORY_SHARE, MEMORY_BYTES = 1.03, 1e9
GIGA = 1e9


@click.command()
@click.argument("model")
@click.option("--prompt-tokens", default=64, show_default=True)
@click.option("--tokens", default=16, show_default=True, help="Decoded in each run.")
@click.option("--runs", default=5, show_default=True)
@click.option("--context", default=4096, show_default=True)
@click.option("--check", is_flag=True, help="Exit with 1 when the memory bound does not hold.")
def main(model: str, prompt_tokens: int, tokens: int, runs: int, context: int, check: bool) -> None:
    """Load MODEL (a folder, a cached hub id, or nano), prefill and decode."""
    folder = locate_model(model)
    with Checkpoint.open(folder) as checkpoint:
        weight_bytes = checkpoint.expert_bytes + checkpoint.dense_bytes
        token_bytes = bytes_per_token(checkpoint)
    started = time.perf_counter()
    engine = Engine.load(EngineConfig(model=str(folder), context_tokens=context), Progress())
    load_seconds = time.perf_counter() - started
    print(
        f"loaded {weight_bytes / GIGA:.2f} GB in {load_seconds:.1f} s, "
        f"{weight_bytes / GIGA / load_seconds:.2f} GB/s"
    )

    prefill, decode, roofs = [], [], []
    for run in range(runs):
        roofs.append(read_roof(engine))
        generation = engine.submit(
            prompt(engine.config, prompt_tokens, seed=run),
            SamplingParams(temperature=0.0, max_tokens=tokens + 1),
            stop_ids=(),
        )
        assert sum(1 for _ in engine.tokens(generation)) == tokens + 1
        prefill.append(prompt_tokens / generation.prefill_seconds)
        decode.append(tokens / generation.decode_seconds)
    roof = max(roofs)
    shares = [rate * token_bytes / GIGA / roof for rate in decode]
    print(f"prefill {line(prefill)} tok/s of {prompt_tokens} tokens")
    print(
        f"decode {line(decode)} tok/s, {token_bytes / GIGA:.3f} GB read per token: "
        f"{statistics.median(shares):.2f} of the read roof of {roof:.1f} GB/s"
    )

    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    bound_bytes = weight_bytes * MEMORY_SHARE + MEMORY_BYTES
    holds = peak_bytes <= bound_bytes
    print(
        f"largest resident set {peak_bytes / GIGA:.3f} GB, bound {bound_bytes / GIGA:.3f} GB: "
        f"{'pass' if holds else 'FAIL'}"
    )
    print(
        json.dumps(
            {
                "bench": "decode",
                "model": str(model),
                "weight_bytes": weight_bytes,
                "load_seconds": load_seconds,
                "prefill_tokens_per_second": prefill,
                "decode_tokens_per_second": decode,
                "bytes_per_token": token_bytes,
                "read_roof_gigabytes_per_second": roof,
                "peak_resident_bytes": peak_bytes,
                "bound_bytes": bound_bytes,
            }
        )
    )
    engine.close()
    if check and not holds:
        sys.exit(1)


class Progress:
    """One line per stage, rewritten as it goes on a terminal and written at its end elsewhere."""

    def __call__(self, progress: LoadProgress) -> None:
        ended = progress.done_bytes >= progress.total_bytes
        eta = progress.eta_seconds
        left = "" if not eta else f", {eta:.0f} s left"
        text = (
            f"{progress.stage}: {progress.done_bytes / GIGA:.2f} of "
            f"{progress.total_bytes / GIGA:.2f} GB, {progress.gigabytes_per_second:.2f} GB/s{left}"
        )
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{text}\033[K" + ("\n" if ended else ""))
        elif ended:
            sys.stderr.write(text + "\n")


def bytes_per_token(checkpoint: Checkpoint) -> int:
    """Weights that one decoded token reads: all dense ones but the embedding, and its experts."""
    config = checkpoint.config
    embedding_bytes = config.vocab_size * config.hidden_size * torch.bfloat16.itemsize
    picked = config.num_experts_per_tok / config.n_routed_experts
    return int(checkpoint.dense_bytes - embedding_bytes + checkpoint.expert_bytes * picked)


def read_roof(engine: Engine) -> float:
    """Read bandwidth over the experts' memory, GB/s: the fastest of several plain loops."""
    experts = engine.experts
    seconds = min(experts.read_weights_seconds(loop) for loop in range(len(READ_LOOPS)))
    return experts.weight_bytes / GIGA / seconds


def prompt(config: K2Config, tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (tokens,), generator=generator).tolist()


def line(values: list[float]) -> str:
    spread = (max(values) - min(values)) / statistics.median(values)
    return f"{statistics.median(values):.2f} (spread {spread:.0%} of {len(values)} runs)"


if __name__ == "__main__":
    main()

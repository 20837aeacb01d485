"""How close are the host experts to what this machine's memory gives?

Runs K2's true expert shapes (7168 x 2048, INT4 in groups of 32) on random weights and routing, with
so many experts resident that caches do not help. Between the calls, in the same run, it measures
the read roof: all weights read once by plain loops on the same threads; the fastest loop counts.
Decoding few tokens can at best read each weight it needs once, so the share of that roof is the
figure; with many tokens per expert arithmetic takes over, and GFLOP/s is.

The last line is JSON. bench/README.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass

import torch

from hybridk2.checkpoint import QuantizedLinear
from hybridk2.experts.host import READ_LOOPS, HostExperts, available_isas

HIDDEN, INTERMEDIATE, TOP_K = 7168, 2048, 8


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    isa: str
    tokens: int
    median_ms: float
    spread: float  # interquartile range over median
    weight_gigabytes_per_second: float
    share_of_read_roof: float
    gigaflops: float


def main() -> None:
    arguments = parse_arguments()
    experts_of = {isa: load(isa, arguments) for isa in arguments.isa}
    first = next(iter(experts_of.values()))
    roof = ReadRoof(first)
    rows = []
    print(
        f"{arguments.experts} experts, {first.weight_bytes / 1e6:.0f} MB of weights, "
        f"{first.threads} threads, {'2 MB' if first.huge_pages else '4 KB'} pages, "
        f"{arguments.activations} activations"
    )
    print("isa          tokens  median ms  spread  GB/s of weights  of read roof  GFLOP/s")
    for isa, experts in experts_of.items():
        for tokens in arguments.tokens:
            row = measure(experts, tokens, roof, arguments)
            rows.append(row)
            print(
                f"{isa:12s} {tokens:6d} {row.median_ms:10.2f} {row.spread:7.0%} "
                f"{row.weight_gigabytes_per_second:16.1f} {row.share_of_read_roof:13.2f} "
                f"{row.gigaflops:8.0f}"
            )
    print(f"read roof over the whole run: {roof.best():.1f} GB/s ({roof.best_loop()})")
    print(
        json.dumps(
            {
                "bench": "experts",
                "cpu": cpu_name(),
                "threads": first.threads,
                "experts": arguments.experts,
                "huge_pages": first.huge_pages,
                "activations": arguments.activations,
                "read_roof_gigabytes_per_second": roof.best(),
                "rows": [vars(row) for row in rows],
            }
        )
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--experts", type=int, default=32, help="experts resident")
    parser.add_argument("--isa", nargs="+", choices=available_isas(), default=available_isas()[-1:])
    parser.add_argument("--threads", type=int, help="default: one per physical core")
    parser.add_argument("--activations", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--seconds", type=float, default=1.5, help="at least, for every row")
    return parser.parse_args()


class ReadRoof:
    """The best read bandwidth of the run so far, over all loops."""

    def __init__(self, experts: HostExperts) -> None:
        self._experts = experts
        self._gigabytes = experts.weight_bytes / 1e9
        self._best = dict.fromkeys(READ_LOOPS, 0.0)

    def sample(self) -> float:
        """Run every loop once; GB/s of the fastest."""
        rates = []
        for number, name in enumerate(READ_LOOPS):
            rate = self._gigabytes / self._experts.read_weights_seconds(number)
            self._best[name] = max(self._best[name], rate)
            rates.append(rate)
        return max(rates)

    def best(self) -> float:
        return max(self._best.values())

    def best_loop(self) -> str:
        return max(self._best, key=lambda name: self._best[name])


def load(isa: str, arguments: argparse.Namespace) -> HostExperts:
    experts = HostExperts(
        1, arguments.experts, HIDDEN, INTERMEDIATE, isa=isa, threads=arguments.threads
    )
    generator = torch.Generator().manual_seed(1)
    start = 0.0
    seconds = 0.0
    for expert in range(arguments.experts):
        matrices = [
            random_matrix(rows, columns, generator)
            for rows, columns in (
                (INTERMEDIATE, HIDDEN),
                (INTERMEDIATE, HIDDEN),
                (HIDDEN, INTERMEDIATE),
            )
        ]
        start = time.perf_counter()
        experts.load_expert(0, expert, *matrices)
        seconds += time.perf_counter() - start
    print(f"{isa}: repacked at {experts.weight_bytes / 1e9 / seconds:.2f} GB/s on one thread")
    return experts


def random_matrix(rows: int, columns: int, generator: torch.Generator) -> QuantizedLinear:
    packed = torch.randint(
        -(2**31), 2**31, (rows, columns // 8), generator=generator, dtype=torch.int64
    )
    scale = torch.rand(rows, columns // 32, generator=generator) * 0.01 + 0.005
    return QuantizedLinear(packed.to(torch.int32), scale.bfloat16())


def measure(
    experts: HostExperts, tokens: int, roof: ReadRoof, arguments: argparse.Namespace
) -> Row:
    """Medians over calls with fresh random routing each, read roof sampled in between."""
    dtype = getattr(torch, arguments.activations)
    x = torch.randn(tokens, HIDDEN).to(dtype)
    weights = torch.full((tokens, TOP_K), 1 / TOP_K)
    milliseconds, rates, shares = [], [], []
    deadline = time.perf_counter() + arguments.seconds
    while time.perf_counter() < deadline or len(milliseconds) < 5:
        roof_now = roof.sample()
        for _ in range(4):
            ids = torch.rand(tokens, arguments.experts).topk(TOP_K).indices.int()
            start = time.perf_counter()
            experts.wait(experts.submit(0, x, ids, weights))
            seconds = time.perf_counter() - start
            used = ids.unique().numel() / arguments.experts * experts.weight_bytes
            milliseconds.append(seconds * 1e3)
            rates.append(used / 1e9 / seconds)
            shares.append(rates[-1] / roof_now)
    median = statistics.median(milliseconds)
    quartiles = statistics.quantiles(milliseconds, n=4)
    flops = tokens * TOP_K * 3 * HIDDEN * INTERMEDIATE * 2
    return Row(
        experts.isa,
        tokens,
        median,
        (quartiles[2] - quartiles[0]) / median,
        statistics.median(rates),
        statistics.median(shares),
        flops / (median / 1e3) / 1e9,
    )


def cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else "unknown"


if __name__ == "__main__":
    main()

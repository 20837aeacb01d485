"""How close are the host experts to what this machine's memory and arithmetic give?

Runs K2's true expert shapes (7168 x 2048, INT4 in groups of 32) on random weights and routing, with
so many experts resident that caches do not help. Between the calls, in the same run and on the same
threads, it measures two roofs: the read roof, all weights read once by plain loops, and the
arithmetic roof, a loop of nothing but the multiplication that the kernels use. Decoding few tokens
can at best read each weight it needs once; with many tokens per expert arithmetic takes over.

--check prints every target with pass or fail and exits with 1 when one falls short. The last line
is JSON. bench/README.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accuracy import HIDDEN, INTERMEDIATE, TOP_K, Expert, random_expert
from peers.client import PEER_NAMES, WeightFolder
from peers.protocol import Shape
from peers.race import PeerRow, Peers, Race, running_peers
from targets import check_targets

from hybridk2.experts.host import READ_LOOPS, HostExperts, available_isas

TOKENS = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024]
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """One line of the table. Rates and shares are medians over the row's calls and samples."""

    isa: str
    tokens: int
    calls: int
    median_ms: float
    spread: float  # interquartile range over median
    weight_gigabytes_per_second: float
    read_roof_gigabytes_per_second: float
    share_of_read_roof: float
    teraflops: float
    arithmetic_roof_teraflops: float | None  # None: these kernels have no such loop
    share_of_arithmetic_roof: float | None


def main() -> None:
    arguments = parse_arguments()
    experts_of = {isa: load(isa, arguments) for isa in arguments.isa}
    first = next(iter(experts_of.values()))
    rows: list[Row] = []
    peer_rows: list[PeerRow] = []
    print(
        f"{arguments.experts} experts, {first.weight_bytes / 1e6:.0f} MB of weights, "
        f"{first.threads} threads, {'2 MB' if first.huge_pages else '4 KB'} pages, "
        f"{arguments.activations} activations, load {os.getloadavg()[0]:.1f}"
    )
    print(
        "isa          tokens  calls  median ms  spread  GB/s of weights  read roof  share  "
        "TFLOP/s  arithmetic roof  share"
    )
    with load_peers(arguments, first.threads) as peers:
        for experts in experts_of.values():
            for tokens in arguments.tokens:
                row, peers_of_row = measure(experts, tokens, arguments, peers)
                rows.append(row)
                peer_rows += peers_of_row
                print_row(row)
                for peer in peers_of_row:
                    print(
                        f"{peer.peer:12s} {tokens:6d} {'':6s} {peer.median_ms:10.2f} "
                        f"{peer.spread:7.0%} {peer.times_ours:16.2f} times ours ({peer.path})"
                    )
    for line in peers.lines():
        print(line)
    targets = []
    if arguments.check:
        targets = check_targets(experts_of[arguments.isa[-1]], rows, peer_rows, arguments.experts)
    summary = {
        "bench": "experts",
        "cpu": cpu_name(),
        "commit": commit(),
        "threads": first.threads,
        "experts": arguments.experts,
        "huge_pages": first.huge_pages,
        "activations": arguments.activations,
        "rows": [asdict(row) for row in rows],
        "peer_rows": [asdict(row) for row in peer_rows],
        "peers": peers.summary(),
        "targets": [asdict(target) for target in targets],
    }
    print(json.dumps(summary))
    if any(target.passed is False for target in targets):
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--experts", type=int, default=32, help="experts resident")
    parser.add_argument("--isa", nargs="+", choices=available_isas(), default=available_isas()[-1:])
    parser.add_argument("--threads", type=int, help="default: one per physical core")
    parser.add_argument("--activations", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--seconds", type=float, default=2.0, help="at least, for every row")
    parser.add_argument("--peer", nargs="+", choices=PEER_NAMES, default=[])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    return parser.parse_args()


def print_row(row: Row) -> None:
    roof, share = row.arithmetic_roof_teraflops, row.share_of_arithmetic_roof
    print(
        f"{row.isa:12s} {row.tokens:6d} {row.calls:6d} {row.median_ms:10.2f} {row.spread:7.0%} "
        f"{row.weight_gigabytes_per_second:16.1f} {row.read_roof_gigabytes_per_second:10.1f} "
        f"{row.share_of_read_roof:6.2f} {row.teraflops:8.3f} "
        + (f"{'none':>16s}" if roof is None else f"{roof:16.3f}")
        + ("" if share is None else f" {share:6.2f}"),
        flush=True,
    )


@dataclass
class Roofs:
    """Samples of both roofs, taken between the calls of one row."""

    experts: HostExperts
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self._read: list[list[float]] = [[] for _ in READ_LOOPS]
        self._arithmetic: list[float] = []

    def sample(self) -> None:
        """Run every loop once."""
        for number, rates in enumerate(self._read):
            rates.append(self.experts.weight_bytes / self.experts.read_weights_seconds(number))
        rate = self.experts.arithmetic_roof(self.dtype)
        if rate is not None:
            self._arithmetic.append(rate)

    def read(self) -> float:
        """Bytes per second of the loop with the best median."""
        return max(statistics.median(rates) for rates in self._read)

    def arithmetic(self) -> float | None:
        """FLOP per second, median."""
        return statistics.median(self._arithmetic) if self._arithmetic else None


def random_experts(count: int) -> Iterator[Expert]:
    """Gate, up and down of each expert; the same ones in every call."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield random_expert(generator)


def load(isa: str, arguments: argparse.Namespace) -> HostExperts:
    experts = HostExperts(
        1, arguments.experts, HIDDEN, INTERMEDIATE, isa=isa, threads=arguments.threads
    )
    seconds = 0.0
    for number, expert in enumerate(random_experts(arguments.experts)):
        start = time.perf_counter()
        experts.load_expert(0, number, *expert)
        seconds += time.perf_counter() - start
    print(f"{isa}: repacked at {experts.weight_bytes / 1e9 / seconds:.2f} GB/s")
    return experts


@contextmanager
def load_peers(arguments: argparse.Namespace, threads: int) -> Iterator[Peers]:
    """The peers that were asked for, with the weights that ours have."""
    shape = Shape(arguments.experts, HIDDEN, INTERMEDIATE, TOP_K)
    with WeightFolder(shape) as folder:
        if arguments.peer:
            for number, expert in enumerate(random_experts(arguments.experts)):
                folder.add(number, *expert)
        with running_peers(
            arguments.peer,
            folder.files,
            threads=threads,
            max_tokens=max(arguments.tokens),
            purpose="speed",
        ) as peers:
            yield peers


def measure(
    experts: HostExperts, tokens: int, arguments: argparse.Namespace, peers: Peers
) -> tuple[Row, list[PeerRow]]:
    """Medians over calls with fresh random routing each.

    In rounds: both roofs, some calls of ours, the same calls by every peer. Before the calls of
    each engine comes one that is not counted: it finds caches and workers as others left them.
    """
    dtype = getattr(torch, arguments.activations)
    x = torch.randn(tokens, HIDDEN).to(dtype)
    weights = torch.full((tokens, TOP_K), 1 / TOP_K)
    roofs = Roofs(experts, dtype)
    race = Race(peers, x.bfloat16(), weights)
    calls_per_round = 4 if tokens < 64 else 1
    seconds, rates = [], []
    rounds = 0
    deadline = time.perf_counter() + arguments.seconds
    while time.perf_counter() < deadline or rounds < FEWEST_ROUNDS:
        rounds += 1
        roofs.sample()
        routings = [
            torch.rand(tokens, arguments.experts).topk(TOP_K).indices.int()
            for _ in range(calls_per_round)
        ]
        experts.wait(experts.submit(0, x, routings[-1], weights))
        for ids in routings:
            start = time.perf_counter()
            experts.wait(experts.submit(0, x, ids, weights))
            seconds.append(time.perf_counter() - start)
            used_bytes = ids.unique().numel() / arguments.experts * experts.weight_bytes
            rates.append(used_bytes / seconds[-1])
        race.round(torch.stack(routings))
    row = row_of(experts.isa, tokens, seconds, rates, roofs)
    return row, race.rows(row.median_ms)


def row_of(isa: str, tokens: int, seconds: list[float], rates: list[float], roofs: Roofs) -> Row:
    """seconds: of each call; rates: bytes of the weights it needed, per second."""
    median = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4)
    flop_per_second = tokens * TOP_K * 3 * HIDDEN * INTERMEDIATE * 2 / median
    rate, read, arithmetic = statistics.median(rates), roofs.read(), roofs.arithmetic()
    row = Row(
        isa=isa,
        tokens=tokens,
        calls=len(seconds),
        median_ms=median * 1e3,
        spread=(quartiles[2] - quartiles[0]) / median,
        weight_gigabytes_per_second=rate / 1e9,
        read_roof_gigabytes_per_second=read / 1e9,
        share_of_read_roof=rate / read,
        teraflops=flop_per_second / 1e12,
        arithmetic_roof_teraflops=None,
        share_of_arithmetic_roof=None,
    )
    if arithmetic is None:
        return row
    return replace(
        row,
        arithmetic_roof_teraflops=arithmetic / 1e12,
        share_of_arithmetic_roof=flop_per_second / arithmetic,
    )


def cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else "unknown"


def commit() -> str:
    """The commit of this checkout; "unknown" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    run = subprocess.run(command, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()

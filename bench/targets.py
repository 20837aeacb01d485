"""What the host experts must reach, and whether they did: the `--check` of experts.py.

Knows the targets and how to judge a finished run; measures only what the rows do not have: the idle
engine, the memory, the errors.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from accuracy import (
    HIDDEN,
    INTERMEDIATE,
    LARGEST_BFLOAT16_ERROR,
    LARGEST_SUM_ERROR,
    compute_references,
    gaussian,
    outlier_heavy,
    random_expert,
    route,
)
from peers.race import PeerRow

from hybridk2.experts.host import HostExperts

LEAST_SHARE_OF_READ_ROOF = {1: 0.92, 4: 0.85}
LEAST_SHARE_OF_ARITHMETIC_ROOF = {16: 0.60, 64: 0.72, 256: 0.85, 1024: 0.85}
LEAST_TIMES_OURS = {
    "kt": {1: 1.8, 16: 2.0, 256: 2.2, 1024: 2.2},
    "llama.cpp": {1: 1.05, 16: 2.0},
}
# Of vdpbf16ps with bf16 activations, which is what these targets are about.
ROOF_ISAS = ("avx512_bf16", "amx")
MOST_IDLE_SHARE_OF_A_CORE = 0.01
MOST_BITS_PER_WEIGHT = 4.5 * 1.001


class MeasuredRow(Protocol):
    """What the targets need of a row of experts.py."""

    @property
    def isa(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    @property
    def share_of_read_roof(self) -> float: ...
    @property
    def share_of_arithmetic_roof(self) -> float | None: ...


@dataclass(frozen=True)
class Target:
    """One line of the check. passed is None when it was not measured; found says why."""

    name: str
    passed: bool | None
    found: str


def check_targets(
    experts: HostExperts,
    rows: Sequence[MeasuredRow],
    peer_rows: Sequence[PeerRow],
    num_experts: int,
) -> list[Target]:
    """Judge the rows of `experts`, print and return every target."""
    own = {row.tokens: row for row in rows if row.isa == experts.isa}
    targets = [
        *speed_targets(experts.isa, own),
        *peer_targets(peer_rows),
        idle_target(experts),
        memory_target(experts, num_experts),
        *error_targets(experts.isa),
    ]
    for target in targets:
        verdict = {True: "pass", False: "FAIL", None: "not measured"}[target.passed]
        print(f"{verdict}: {target.name}: {target.found}", flush=True)
    return targets


def speed_targets(isa: str, rows: dict[int, MeasuredRow]) -> Iterator[Target]:
    for tokens, least in LEAST_SHARE_OF_READ_ROOF.items():
        name = f"{tokens} tokens, at least {least:.2f} of the read roof"
        row = rows.get(tokens)
        yield judged(name, None if row is None else row.share_of_read_roof, least, "no such row")
    for tokens, least in LEAST_SHARE_OF_ARITHMETIC_ROOF.items():
        name = f"{tokens} tokens, at least {least:.2f} of the vdpbf16ps roof"
        row = rows.get(tokens)
        if isa not in ROOF_ISAS:
            yield Target(name, None, f"{isa} does not use vdpbf16ps")
            continue
        share = None if row is None else row.share_of_arithmetic_roof
        yield judged(name, share, least, "no such row" if row is None else "no such loop")


def peer_targets(rows: Sequence[PeerRow]) -> Iterator[Target]:
    times = {(row.peer, row.tokens): row.times_ours for row in rows}
    for peer, least_of in LEAST_TIMES_OURS.items():
        for tokens, least in least_of.items():
            name = f"{tokens} tokens, at least {least:.2f} times {peer}"
            yield judged(name, times.get((peer, tokens)), least, "the peer was not in this run")


def judged(name: str, found: float | None, least: float, missing: str) -> Target:
    if found is None:
        return Target(name, None, missing)
    return Target(name, found >= least, f"{found:.3f}")


def idle_target(experts: HostExperts) -> Target:
    """CPU time of the whole process while nothing is asked of the engine."""
    x = torch.randn(64, HIDDEN).bfloat16()
    experts.wait(experts.submit(0, x, torch.zeros(64, 1).int(), torch.ones(64, 1)))
    time.sleep(0.1)
    seconds = 2.0
    before = time.process_time()
    time.sleep(seconds)
    share = (time.process_time() - before) / seconds
    name = f"an idle engine, below {MOST_IDLE_SHARE_OF_A_CORE:.0%} of one core"
    return Target(name, share < MOST_IDLE_SHARE_OF_A_CORE, f"{share:.2%}")


def memory_target(experts: HostExperts, num_experts: int) -> Target:
    bits = experts.weight_bytes * 8 / (num_experts * 3 * HIDDEN * INTERMEDIATE)
    name = "weights in memory, 4.5 bits and at most 0.1%"
    return Target(name, bits <= MOST_BITS_PER_WEIGHT, f"{bits:.4f} bits")


def error_targets(isa: str) -> Iterator[Target]:
    """Two tokens over eight experts; accuracy.py has more of them, and the peers'."""
    generator = torch.Generator().manual_seed(2)
    matrices = [random_expert(generator) for _ in range(8)]
    inputs = [
        route(kind, x, len(matrices), generator)
        for kind, x in (
            ("gaussian", gaussian(2, generator)),
            ("outlier-heavy", outlier_heavy(2, generator)),
        )
    ]
    compute_references(inputs, matrices)
    with HostExperts(1, len(matrices), HIDDEN, INTERMEDIATE, isa=isa) as experts:
        for number, expert in enumerate(matrices):
            experts.load_expert(0, number, *expert)
        for one in inputs:
            for dtype, most, what in (
                (torch.bfloat16, LARGEST_BFLOAT16_ERROR, "bfloat16 output"),
                (torch.float32, LARGEST_SUM_ERROR, "fp32 sums of fp32 activations"),
            ):
                x = one.x.to(dtype)
                out = experts.wait(experts.submit(0, x, one.expert_ids, one.weights))
                error = (out.to(dtype).double() - one.reference).norm() / one.reference.norm()
                name = f"{one.kind}: {what}, relative error at most {most:g}"
                yield Target(name, error.item() <= most, f"{error.item():.2e}")

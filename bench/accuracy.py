"""How far are the host experts from exact arithmetic, and other engines on the same weights?

Random INT4 experts of K2's true shapes, top 8; the reference is fp64 throughout, on the same INT4
weights and on activations that bfloat16 holds exactly. The figure is ||out - ref|| / ||ref|| over
all tokens of a call: once of the fp32 sums as they come, once of them rounded to bfloat16, as the
rest of the model takes them.

The last line is JSON. bench/README.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peers.client import PEER_NAMES, PeerError, WeightFolder
from peers.protocol import Shape
from peers.race import Peers, running_peers
from torch import Tensor

from hybridk2.checkpoint import QuantizedLinear
from hybridk2.experts.host import HostExperts, available_isas

HIDDEN, INTERMEDIATE, TOP_K = 7168, 2048, 8
OUTLIER_CHANNELS, OUTLIER_FACTOR = HIDDEN // 128, 30.0
LARGEST_BFLOAT16_ERROR = 0.003
LARGEST_SUM_ERROR = 1e-5

Expert = tuple[QuantizedLinear, QuantizedLinear, QuantizedLinear]


@dataclass(frozen=True)
class Inputs:
    """Activations of one kind with routing and the exact result, for the largest call."""

    kind: str
    x: Tensor  # (tokens, hidden) bfloat16
    expert_ids: Tensor  # (tokens, k) int32
    weights: Tensor  # (tokens, k) float32
    reference: Tensor  # (tokens, hidden) float64


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    engine: str
    path: str
    activations: str
    inputs: str
    tokens: int
    error_of_sums: float
    error_of_bfloat16: float


def main() -> None:
    arguments = parse_arguments()
    generator = torch.Generator().manual_seed(1)
    experts = [random_expert(generator) for _ in range(arguments.experts)]
    tokens = max(arguments.tokens)
    inputs = [
        route("gaussian", gaussian(tokens, generator), arguments.experts, generator),
        route("outlier-heavy", outlier_heavy(tokens, generator), arguments.experts, generator),
    ]
    compute_references(inputs, experts)
    print(
        "engine      path                          activations  inputs         tokens  "
        "fp32 sums  as bfloat16"
    )
    rows = []
    for row in our_rows(experts, inputs, arguments):
        rows.append(row)
        print_row(row)
    shape = Shape(arguments.experts, HIDDEN, INTERMEDIATE, TOP_K)
    with WeightFolder(shape) as folder:
        for number, expert in enumerate(experts if arguments.peer else ()):
            folder.add(number, *expert)
        with running_peers(
            arguments.peer,
            folder.files,
            threads=arguments.threads or torch.get_num_threads(),
            max_tokens=tokens,
            purpose="accuracy",
        ) as peers:
            for row in peer_rows(peers, inputs, arguments):
                rows.append(row)
                print_row(row)
    for line in peers.lines():
        print(line)
    checks = run_checks(rows) if arguments.check else {}
    print(
        json.dumps(
            {
                "bench": "accuracy",
                "experts": arguments.experts,
                "rows": [vars(row) for row in rows],
                "peers": peers.summary(),
                "checks": checks,
            }
        )
    )
    if False in checks.values():
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--experts", type=int, default=16, help="experts to route among")
    parser.add_argument("--isa", nargs="+", choices=available_isas(), default=available_isas())
    parser.add_argument("--threads", type=int, help="default: one per physical core")
    parser.add_argument(
        "--peer", nargs="*", choices=PEER_NAMES, default=list(PEER_NAMES), help="default: all"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    return parser.parse_args()


def random_expert(generator: torch.Generator) -> Expert:
    def matrix(rows: int, columns: int) -> QuantizedLinear:
        packed = torch.randint(
            -(2**31), 2**31, (rows, columns // 8), generator=generator, dtype=torch.int64
        )
        scale = torch.rand(rows, columns // 32, generator=generator) * 0.01 + 0.005
        return QuantizedLinear(packed.to(torch.int32), scale.bfloat16())

    return (
        matrix(INTERMEDIATE, HIDDEN),
        matrix(INTERMEDIATE, HIDDEN),
        matrix(HIDDEN, INTERMEDIATE),
    )


def gaussian(tokens: int, generator: torch.Generator) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=generator)


def outlier_heavy(tokens: int, generator: torch.Generator) -> Tensor:
    """Gaussian with one channel in 128, the same for all tokens, 30 times the others' size.

    Of mean square 1 again, as after the norm before the experts.
    """
    x = gaussian(tokens, generator)
    x[:, torch.randperm(HIDDEN, generator=generator)[:OUTLIER_CHANNELS]] *= OUTLIER_FACTOR
    return x / x.square().mean(dim=1, keepdim=True).sqrt()


def route(kind: str, x: Tensor, experts: int, generator: torch.Generator) -> Inputs:
    tokens = len(x)
    weights = torch.rand(tokens, TOP_K, generator=generator) + 0.1
    return Inputs(
        kind,
        x.bfloat16(),
        torch.rand(tokens, experts, generator=generator).topk(TOP_K).indices.int(),
        weights / weights.sum(dim=1, keepdim=True),
        torch.zeros(tokens, HIDDEN, dtype=torch.float64),
    )


def compute_references(inputs: list[Inputs], experts: list[Expert]) -> None:
    """Fill in the exact results; each expert is dequantised once."""
    for number, expert in enumerate(experts):
        gate, up, down = (exact(matrix) for matrix in expert)
        for one in inputs:
            token, slot = (one.expert_ids == number).nonzero(as_tuple=True)
            rows = one.x[token].double()
            inner = torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)
            out = (inner @ down.T) * one.weights[token, slot, None].double()
            one.reference.index_add_(0, token, out)


def exact(matrix: QuantizedLinear) -> Tensor:
    """fp64 weights from the checkpoint's form, independent of any engine."""
    rows = len(matrix.packed)
    nibbles = (matrix.packed[:, :, None] >> (4 * torch.arange(8, dtype=torch.int32))) & 15
    groups = (nibbles.double() - 8).view(rows, -1, 32)
    return (groups * matrix.scale.double()[:, :, None]).view(rows, -1)


def our_rows(
    experts: list[Expert], inputs: list[Inputs], arguments: argparse.Namespace
) -> Iterator[Row]:
    for isa in arguments.isa:
        with HostExperts(
            1, len(experts), HIDDEN, INTERMEDIATE, isa=isa, threads=arguments.threads
        ) as host:
            for number, expert in enumerate(experts):
                host.load_expert(0, number, *expert)
            for dtype in (torch.bfloat16, torch.float32):
                for one in inputs:
                    for tokens in arguments.tokens:
                        ids, weights = one.expert_ids[:tokens], one.weights[:tokens]
                        x = one.x[:tokens].to(dtype)
                        out = host.wait(host.submit(0, x, ids, weights))
                        name = str(dtype).removeprefix("torch.")
                        yield compare("hybridk2", isa, name, one, out)


def peer_rows(peers: Peers, inputs: list[Inputs], arguments: argparse.Namespace) -> Iterator[Row]:
    for peer in list(peers.running):
        try:
            for path in peer.features.paths:
                for one in inputs:
                    for tokens in arguments.tokens:
                        ids, weights = one.expert_ids[:tokens], one.weights[:tokens]
                        out = peer.output(path, one.x[:tokens], ids, weights)
                        yield compare(peer.name, path, "its own", one, out)
        except PeerError as reason:
            peers.drop(peer, reason)


def compare(engine: str, path: str, activations: str, inputs: Inputs, out: Tensor) -> Row:
    tokens = len(out)
    reference = inputs.reference[:tokens]

    def error(result: Tensor) -> float:
        return ((result.double() - reference).norm() / reference.norm()).item()

    return Row(engine, path, activations, inputs.kind, tokens, error(out), error(out.bfloat16()))


def print_row(row: Row) -> None:
    print(
        f"{row.engine:11s} {row.path:29s} {row.activations:12s} {row.inputs:14s} "
        f"{row.tokens:6d} {row.error_of_sums:10.1e} {row.error_of_bfloat16:12.3%}",
        flush=True,
    )


def run_checks(rows: list[Row]) -> dict[str, bool | None]:
    """Print every target with pass or fail; None: not measured."""
    ours = [row for row in rows if row.engine == "hybridk2"]
    worst = max(row.error_of_bfloat16 for row in ours)
    sums = max(row.error_of_sums for row in ours if row.activations == "float32")
    checks: dict[str, bool | None] = {}

    def check(target: str, passed: bool | None, found: str) -> None:
        checks[target] = passed
        verdict = {True: "pass", False: "FAIL", None: "not measured"}[passed]
        print(f"{verdict}: {target}: {found}")

    check("bfloat16 output, at most 0.3%", worst <= LARGEST_BFLOAT16_ERROR, f"{worst:.3%}")
    check("fp32 sums, below 1e-5", sums < LARGEST_SUM_ERROR, f"{sums:.1e}")
    for kind in sorted({row.inputs for row in rows}):
        peers = [row for row in rows if row.engine != "hybridk2" and row.inputs == kind]
        own = max(row.error_of_bfloat16 for row in ours if row.inputs == kind)
        best = min(peers, key=lambda row: row.error_of_bfloat16, default=None)
        check(
            f"{kind}: below every measured peer",
            None if best is None else own < best.error_of_bfloat16,
            "no peer ran"
            if best is None
            else f"{own:.3%}, {best.engine} {best.path} {best.error_of_bfloat16:.3%}",
        )
    return checks


if __name__ == "__main__":
    main()

"""The same calls for every peer, in turns with ours, and how many times as long each takes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field

from torch import Tensor

from peers.client import Peer, PeerError
from peers.protocol import Features, Purpose, WeightFiles

__all__ = ["PeerRow", "Race", "running_peers"]


@dataclass(frozen=True)
class PeerRow:
    """One peer at one number of tokens. Its best path counts; all that were tried are named."""

    peer: str
    tokens: int
    path: str
    calls: int
    median_ms: float
    spread: float  # interquartile range over median; 0 of a single call
    times_ours: float  # its median over ours: above 1, ours is faster
    path_medians_ms: dict[str, float]


@dataclass
class Peers:
    """Those that run, and why the others do not."""

    running: list[Peer] = field(default_factory=list)
    features: dict[str, Features] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def drop(self, peer: Peer, reason: PeerError) -> None:
        """A peer that failed takes no further part."""
        self.running.remove(peer)
        self.unavailable[peer.name] = str(reason)
        peer.close()

    def lines(self) -> Iterator[str]:
        """What a reader must know of the peers, for the end of the table."""
        for name, features in self.features.items():
            yield f"{name}: {features.version}"
            yield from (f"{name}: {remark}" for remark in features.remarks)
        for name, reason in self.unavailable.items():
            yield f"{name}: does not run here: {reason}"

    def summary(self) -> dict[str, object]:
        """For the JSON."""
        return {
            "loaded": {name: asdict(features) for name, features in self.features.items()},
            "unavailable": dict(self.unavailable),
        }


@contextmanager
def running_peers(
    names: Sequence[str], files: WeightFiles, *, threads: int, max_tokens: int, purpose: Purpose
) -> Iterator[Peers]:
    """Start these peers one after the other; end them on leaving."""
    peers = Peers()
    with ExitStack() as stack:
        for name in names:
            try:
                peer = Peer(name, files, threads=threads, max_tokens=max_tokens, purpose=purpose)
            except PeerError as reason:
                peers.unavailable[name] = str(reason)
            else:
                stack.callback(peer.close)
                peers.running.append(peer)
                peers.features[name] = peer.features
        yield peers


class Race:
    """One number of tokens. The first round tries every path of a peer, later ones its fastest.

    The fastest is the one of the least median so far: a path that was unlucky at first comes back
    when the others turn out slower.
    """

    def __init__(self, peers: Peers, x: Tensor, weights: Tensor) -> None:
        """x: (tokens, hidden) bfloat16; weights: (tokens, k) float32."""
        self._peers = peers
        self._x = x
        self._weights = weights
        self._milliseconds: dict[str, dict[str, list[float]]] = {}

    def round(self, routings: Tensor) -> None:
        """Every peer computes these: (calls, tokens, k) int32. One that fails is out."""
        for peer in list(self._peers.running):
            known = self._milliseconds.setdefault(peer.name, {})
            try:
                for path in [_fastest(known)] if known else peer.features.paths:
                    times = peer.milliseconds(path, self._x, routings, self._weights)
                    known.setdefault(path, []).extend(times)
            except PeerError as reason:
                self._peers.drop(peer, reason)

    def rows(self, our_median_ms: float) -> list[PeerRow]:
        rows = []
        for peer in self._peers.running:
            known = self._milliseconds[peer.name]
            path = _fastest(known)
            times = known[path]
            median = statistics.median(times)
            quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [median] * 3
            rows.append(
                PeerRow(
                    peer.name,
                    len(self._x),
                    path,
                    len(times),
                    median,
                    (quartiles[2] - quartiles[0]) / median,
                    median / our_median_ms,
                    {one: statistics.median(samples) for one, samples in known.items()},
                )
            )
        return rows


def _fastest(known: dict[str, list[float]]) -> str:
    return min(known, key=lambda path: statistics.median(known[path]))

"""Who computes which experts of a chunk: the host, or the device, to which the host's experts then
have to be copied.

Pure: knows how many tokens picked each expert and what an expert costs where; no routing, no
tensors, no machine. The costs are measured by whoever asks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class ExpertCosts:
    """What one expert with m tokens takes, in seconds from measured speeds.

    On the host max(bytes / read, m flops / host arithmetic): its weights are read once. On the
    device max(bytes / bus, fixed + m flops / device arithmetic), copies running beside the work,
    and without the bus where it lives there. fixed: of an expert whatever its tokens: unpacking.

    expert_bytes: of its panels. token_flops: of one token, two for each weight.
    """

    expert_bytes: int
    token_flops: float
    host_bytes_per_second: float
    host_flops: float
    bus_bytes_per_second: float
    device_flops: float
    device_fixed_seconds: float

    def on_host(self, tokens: NDArray[np.int64]) -> Seconds:
        """Seconds of experts with so many tokens each, on the host."""
        reading = self.expert_bytes / self.host_bytes_per_second
        computing = tokens.astype(np.float64) * (self.token_flops / self.host_flops)
        return np.maximum(reading, computing)

    def on_device(self, tokens: NDArray[np.int64]) -> Seconds:
        """The same of experts that live on the device."""
        computing = tokens.astype(np.float64) * (self.token_flops / self.device_flops)
        return self.device_fixed_seconds + computing

    def streamed(self, tokens: NDArray[np.int64]) -> Seconds:
        """The same of experts that are copied to the device first."""
        copying = self.expert_bytes / self.bus_bytes_per_second
        return np.maximum(copying, self.on_device(tokens))


@dataclass(frozen=True)
class Split:
    """Experts with tokens, ascending ids, by who computes them, and how long each side takes."""

    host: tuple[int, ...]
    streamed: tuple[int, ...]
    resident: tuple[int, ...]
    host_seconds: float
    device_seconds: float

    @property
    def seconds(self) -> float:
        """Both sides work at once."""
        return max(self.host_seconds, self.device_seconds)


def split(counts: NDArray[np.int64], resident: NDArray[np.bool_], costs: ExpertCosts) -> Split:
    """The split of one layer that takes least time: max(host's sum, device's sum).

    counts: (experts,), tokens that picked each. resident: (experts,), which live on the device;
    the others live on the host.

    Experts go to the device in the order of what the host would take for each second that the
    device takes, most first: with the bus as the limit that is by tokens, the largest first. The
    best of these prefixes is at most max over experts of h g / (h + g) above the optimum, h and g
    being an expert's seconds on the host and streamed. (Were experts divisible, the optimum would
    be such a prefix and a share s of the next one, and no split is shorter. Giving that expert to
    the device adds at most (1 - s) g, to the host s h; the smaller of both is largest at
    s = g / (h + g).)
    """
    at_home = np.flatnonzero((counts > 0) & resident)
    elsewhere = np.flatnonzero((counts > 0) & ~resident)
    host, streamed = costs.on_host(counts[elsewhere]), costs.streamed(counts[elsewhere])
    # Of equal ratios the one with more tokens first, then that of the lower id.
    order = np.lexsort((-counts[elsewhere], -host / streamed))
    # After the first 0 .. all of them have gone to the device.
    host_sums = np.append(host[order][::-1].cumsum()[::-1], 0.0)
    base = float(costs.on_device(counts[at_home]).sum())
    device_sums = base + np.append(0.0, streamed[order].cumsum())
    moved = int(np.maximum(host_sums, device_sums).argmin())
    return Split(
        tuple(np.sort(elsewhere[order[moved:]]).tolist()),
        tuple(np.sort(elsewhere[order[:moved]]).tolist()),
        tuple(at_home.tolist()),
        float(host_sums[moved]),
        float(device_sums[moved]),
    )

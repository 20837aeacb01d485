"""What an expert costs on this machine, measured with the very things that will compute it.

Owns the measurements behind `prefill_split.ExpertCosts`: a second or so at start, on experts that
are loaded. Knows no model and keeps nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import groupby

import torch

from hybridk2.device import Device
from hybridk2.experts.host import HostExperts
from hybridk2.experts.prefill import ExpertProducts
from hybridk2.experts.stream import ExpertStream
from hybridk2.prefill_split import ExpertCosts

# With which arithmetic is measured: tokens enough that reading an expert's weights does not count,
# few enough to be done at once; experts enough for every thread.
_HOST_TOKENS = 64
_HOST_EXPERTS = 8
_DEVICE_TOKENS = 512
_ROUNDS = 3


def measure_expert_costs(
    experts: HostExperts,
    loaded: Sequence[tuple[int, int]],
    stream: ExpertStream,
    products: ExpertProducts,
    device: Device,
    clock: Callable[[], float] = time.perf_counter,
) -> ExpertCosts:
    """Time experts on the host, on the bus and on the device, each alone; medians of a few rounds.

    loaded: (slot, expert) of experts that the host has, in order: the more, the less of them a
    processor's cache holds; the bus and the host's bandwidth are measured on all. clock: seconds.
    """
    token_flops = 6.0 * experts.hidden * experts.intermediate
    all_bytes = len(loaded) * experts.expert_bytes
    layers = [
        (slot, [expert for _, expert in found])
        for slot, found in groupby(loaded, key=lambda place: place[0])
    ]

    first_slot, first = layers[0][0], layers[0][1][:_HOST_EXPERTS]

    def read() -> None:
        for slot, ids in layers:
            _compute(experts, slot, ids, tokens=1)

    def multiply() -> None:
        _compute(experts, first_slot, first, _HOST_TOKENS)

    def copy() -> None:
        for slot, ids in layers:
            for _ in stream.panels(slot, ids):
                pass
        stream.wait()

    [panel] = [panel.clone() for _, panel in stream.panels(first_slot, first[:1])]

    def work(tokens: int) -> Callable[[], None]:
        x = torch.randn(tokens, experts.hidden, dtype=torch.bfloat16, device=device.torch_device)

        def products_of_an_expert() -> None:
            products(panel, x)
            device.wait()

        return products_of_an_expert

    few, many = (_median(work(tokens), clock) for tokens in (1, _DEVICE_TOKENS))
    # Of the tokens beyond one; unpacking varies, so they never count for less than a tenth of all.
    token_seconds = max(many - few, 0.1 * many) / (_DEVICE_TOKENS - 1)
    return ExpertCosts(
        expert_bytes=experts.expert_bytes,
        token_flops=token_flops,
        host_bytes_per_second=all_bytes / _median(read, clock),
        host_flops=len(first) * _HOST_TOKENS * token_flops / _median(multiply, clock),
        bus_bytes_per_second=all_bytes / _median(copy, clock),
        device_flops=token_flops / token_seconds,
        device_fixed_seconds=max(many - _DEVICE_TOKENS * token_seconds, 0.0),
    )


def _compute(experts: HostExperts, slot: int, ids: Sequence[int], tokens: int) -> None:
    """Every token picks all of these experts."""
    x = torch.randn(tokens, experts.hidden, dtype=torch.bfloat16)
    picks = torch.tensor([ids], dtype=torch.int32).expand(tokens, -1).contiguous()
    experts.wait(experts.submit(slot, x, picks, torch.ones(picks.shape)))


def _median(run: Callable[[], None], clock: Callable[[], float]) -> float:
    """Seconds of one run: the median of some, after one that is not counted."""
    run()
    seconds = []
    for _ in range(_ROUNDS):
        began = clock()
        run()
        seconds.append(clock() - began)
    return statistics.median(seconds)

"""How fast this machine's graphics card is, and the way to it and back.

Owns a copy within the card, one over the bus, a product, and the handoff of a layer by every
mechanism; a few seconds, 3 GB of the card and 1 GB of the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hybridk2.config import KIMI_K2_THINKING
from hybridk2.device import Device, select_device
from hybridk2.errors import EngineError, OutOfMemoryError
from hybridk2.experts.handoff import (
    HostFunctionRouter,
    MailboxRouter,
    StreamRouter,
    measure_handoff,
)
from hybridk2.experts.host import DeviceStream, HostExperts, card_stream
from hybridk2.hardware import GpuProfile

# (what is being measured, rounds done, rounds in all)
OnProgress = Callable[[str, int, int], None]

_COPIED_BYTES = 1 << 30
_PRODUCT_ROWS = 8192
_IN_A_ROW = 10  # copies and products, behind which launching them is hidden
_ROUNDS = 5
_CROSSINGS: tuple[type[StreamRouter], ...] = (MailboxRouter, HostFunctionRouter)
# Of the experts that a handoff is measured with nobody computes any: only the tokens are K2's.
_WIDTH, _EXPERTS = 32, 8


@dataclass(frozen=True)
class CardFigures:
    """profile: for plans. handoff_seconds: of each mechanism, a layer there and back."""

    profile: GpuProfile
    handoff_seconds: dict[str, float]


def measure_card(on_progress: OnProgress) -> CardFigures:
    """Measure the card that an engine would take.

    on_progress may raise, which ends it. Raises ConfigError for a card that cannot be used, with
    the reason, OutOfMemoryError for one that is in use, EngineError when it or a handoff fails.
    """
    device = select_device("cuda")
    try:
        return figures_of(device, card_stream(device.torch_device.index), on_progress)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"measuring {device.name} takes 3 GB of it: {error}. Close what uses it"
        ) from error
    except RuntimeError as error:  # as torch reports whatever CUDA says
        reason = str(error).strip().split("\n")[0]
        raise EngineError(f"{device.name} failed while it was measured: {reason}") from error


def figures_of(
    device: Device,
    stream: DeviceStream,
    on_progress: OnProgress,
    *,
    copied_bytes: int = _COPIED_BYTES,
    product_rows: int = _PRODUCT_ROWS,
) -> CardFigures:
    """See `measure_card`. stream: of that device. copied_bytes, product_rows: of one copy, of the
    square matrices of one product."""
    memory = device.memory_bytes()
    assert memory is not None, f"{device.name} has no memory of its own"
    at = device.torch_device
    on_progress("the card: copies", 0, 3)
    source = torch.empty(copied_bytes, dtype=torch.uint8, device=at)
    target = torch.empty_like(source)
    pinned = device.host_buffer((copied_bytes,), torch.uint8)
    within = 2 * copied_bytes / _seconds(device, lambda: target.copy_(source))
    over = copied_bytes / _seconds(device, lambda: device.copy(target, pinned))
    on_progress("the card: a product", 1, 3)
    factor = torch.randn(product_rows, product_rows, dtype=torch.bfloat16, device=at)
    product_seconds = _seconds(device, lambda: factor @ factor)
    on_progress("the card: handoffs", 2, 3)
    handoffs = _handoffs(device, stream)
    profile = GpuProfile(
        name=device.name,
        memory_bytes=memory[1],
        bytes_per_second=within,
        flops=2 * product_rows**3 / product_seconds,
        bus_bytes_per_second=over,
        handoff_seconds=min(handoffs.values()),
        measured=True,
    )
    return CardFigures(profile, handoffs)


def _handoffs(device: Device, stream: DeviceStream) -> dict[str, float]:
    """Seconds of a layer's crossing by mechanism, in steps of K2's number of layers."""
    config = KIMI_K2_THINKING
    layers, hidden, top_k = config.num_moe_layers, config.hidden_size, config.num_experts_per_tok
    found = {}
    with HostExperts(1, _EXPERTS, hidden, _WIDTH) as experts:
        for kind in _CROSSINGS:
            router = kind(
                experts, device, stream, submissions=layers, top_k=top_k, dtype=torch.bfloat16
            )
            try:
                found[kind.name] = measure_handoff(
                    router,
                    device,
                    submissions=layers,
                    rows=1,
                    hidden=hidden,
                    top_k=top_k,
                    dtype=torch.bfloat16,
                )
            finally:
                router.close()
    return found


def _seconds(device: Device, run: Callable[[], object]) -> float:
    """Of one run among several in a row: the median of some rounds, after one not counted."""
    found = []
    for _ in range(1 + _ROUNDS):
        device.wait()
        began = time.perf_counter()
        for _ in range(_IN_A_ROW):
            run()
        device.wait()
        found.append((time.perf_counter() - began) / _IN_A_ROW)
    return statistics.median(found[1:])

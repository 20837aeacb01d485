"""Crossings to the host's experts that only enqueue work for the device, and which of them is best.

A step may be recorded and replayed; nothing is read back in it. Owns the choice and its
measurement; how a handoff works is the extension's (csrc/handoff.h).
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from hybridk2.device import Device
from hybridk2.errors import EngineError
from hybridk2.experts.host import (
    HANDOFF_TOKENS,
    DeviceStream,
    Handoff,
    HandoffMechanism,
    HostExperts,
)
from hybridk2.experts.router import HOST_SHARE, AsyncRouter, PendingExperts

logger = logging.getLogger(__name__)

# How long a layer's answer may take. A layer of eight tokens is milliseconds of work; a machine
# that swaps, or a thread that died, is not worth waiting for.
TIMEOUT_SECONDS = 5.0

# Steps that measure_handoff times, behind two that compile and warm.
_MEASURED_STEPS = 30


class StreamRouter(AsyncRouter):
    """What the mechanisms share: tensors checked, addresses handed to the extension."""

    records = True
    mechanism: ClassVar[HandoffMechanism]

    def __init__(
        self,
        experts: HostExperts,
        device: Device,
        stream: DeviceStream,
        *,
        submissions: int,
        top_k: int,
        dtype: torch.dtype,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        """stream: of that device (`host.card_stream`). submissions: how many a step has: one for
        each MoE layer, and one more for each that defers experts. top_k, dtype: of every call.
        timeout_seconds: after which an answer is an error.

        Raises EngineError for a shape or dtype that cannot cross, OutOfMemoryError.
        """
        self.submissions = submissions
        self._experts = experts
        self._device = device
        self._top_k = top_k
        self._dtype = dtype
        self._handoff = Handoff(experts, stream, self.mechanism, top_k, dtype, timeout_seconds)

    def submit(self, slot: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> PendingExperts:
        """See AsyncRouter.submit; up to HANDOFF_TOKENS tokens, all on the device. What goes wrong
        with their experts is raised by `end_step`."""
        tokens = x.shape[0]
        if tokens > HANDOFF_TOKENS:
            raise EngineError(f"{tokens} tokens at once: expected at most {HANDOFF_TOKENS}")
        inputs = (
            self._checked("x", x, self._dtype, (tokens, self._experts.hidden)),
            self._checked("expert_ids", expert_ids, torch.int32, (tokens, self._top_k)),
            self._checked("weights", weights, torch.float32, (tokens, self._top_k)),
        )
        addresses = (tensor.data_ptr() for tensor in inputs)
        self._handoff.submit(self._device.stream(), slot, tokens, *addresses)
        return PendingExperts(slot, inputs)

    def collect(self, pending: PendingExperts) -> Tensor:
        """See AsyncRouter.collect. Zeros, or anything else, in a step that fails."""
        x = pending.inputs[0]
        out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        self._handoff.collect(self._device.stream(), pending.slot, x.shape[0], out.data_ptr())
        return out

    def begin_step(self) -> None:
        self._handoff.begin_step(self._device.stream(), self.submissions)

    def end_step(self) -> None:
        self._handoff.end_step()

    def reset(self) -> None:
        self._handoff.reset()

    def close(self) -> None:
        """Recorded steps must not be replayed afterwards."""
        self._handoff.close()

    def _checked(
        self, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, int]
    ) -> Tensor:
        """The tensor, contiguous; EngineError for another dtype, shape or device."""
        device = self._device.torch_device
        found = (tensor.dtype, tuple(tensor.shape), tensor.device.type)
        if found != (dtype, shape, device.type):
            raise EngineError(
                f"{name}: expected {dtype} {shape} on {device.type}, "
                f"found {found[0]} {found[1]} on {found[2]}"
            )
        return tensor.contiguous()


class HostFunctionRouter(StreamRouter):
    """The device's stream calls functions of the host: copies, a call that starts the experts, one
    that waits for them, a copy back."""

    name = "host-functions"
    mechanism = "host-functions"


class MailboxRouter(StreamRouter):
    """Kernels write a layer's tokens into memory that the workers look at, and wait there for the
    sum. The workers' first thread looks from `begin_step` to the step's last submission."""

    name = "mailbox"
    mechanism = "mailbox"


def measure_handoff(
    router: AsyncRouter,
    device: Device,
    *,
    submissions: int,
    rows: int,
    hidden: int,
    top_k: int,
    dtype: torch.dtype,
) -> float:
    """Median seconds that a layer takes to cross to the host and back when no expert has anything
    to do, in steps as they are decoded: recorded ones where the device and the router can.

    submissions: of a step, as the router was made for. rows: tokens of each. hidden, top_k, dtype:
    as the experts and the router have them.

    Raises EngineError when a step fails; the router is reset then.
    """
    x = device.place(torch.zeros(rows, hidden, dtype=dtype))
    expert_ids = device.place(torch.full((rows, top_k), HOST_SHARE, dtype=torch.int32))
    weights = device.place(torch.zeros(rows, top_k))
    kept: list[tuple[PendingExperts, Tensor]] = []  # a stream may be behind

    def layers() -> None:
        kept.clear()
        for _ in range(submissions):
            pending = router.submit(0, x, expert_ids, weights)
            kept.append((pending, router.collect(pending)))

    def timed(step: Callable[[], None]) -> float:
        try:
            started = time.perf_counter()
            router.begin_step()
            step()
            device.wait()
            router.end_step()
            return time.perf_counter() - started
        except BaseException:
            try:
                device.wait()
            finally:
                router.reset()
            raise

    timed(layers)
    step: Callable[[], None] = layers
    if router.records and device.replays_steps:
        try:
            step = device.record(layers)
        except RuntimeError as error:
            router.reset()
            raise EngineError(f"its steps cannot be recorded: {error}") from error
    timed(step)
    return statistics.median(timed(step) for _ in range(_MEASURED_STEPS)) / submissions


def fastest_router(
    routers: Sequence[AsyncRouter], seconds: Callable[[AsyncRouter], float]
) -> AsyncRouter:
    """The one whose handoff takes least; the others are closed, and all figures logged.

    seconds: measures one, such as by `measure_handoff`. One that fails with an EngineError is said
    to, and not chosen. Raises the last such error when all do.
    """
    measured: dict[AsyncRouter, float] = {}
    failure: EngineError | None = None
    for router in routers:
        try:
            measured[router] = seconds(router)
        except EngineError as error:
            failure = error
            logger.warning("handoff by %s does not work here: %s", router.name, error)
    if not measured:
        raise failure or EngineError("no handoff to choose from")
    chosen = min(measured, key=lambda router: measured[router])
    for router in routers:
        if router is not chosen:
            router.close()
    figures = ", ".join(f"{router.name} {took * 1e6:.1f} us" for router, took in measured.items())
    logger.info("handoff to the host's experts: %s (%s a layer)", chosen.name, figures)
    return chosen

"""A device whose work is done by a fake stream, later, and the routers that give it work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hybridk2 import _native
from hybridk2.device import CpuDevice
from hybridk2.experts.handoff import HostFunctionRouter, MailboxRouter, StreamRouter
from hybridk2.experts.host import HostExperts
from hybridk2.experts.router import PendingExperts

STREAM_ROUTERS: list[type[StreamRouter]] = [HostFunctionRouter, MailboxRouter]

# Seconds; uniform from 0, before everything that the stream does.
DELAY = 100e-6


class FakedDevice(CpuDevice):
    """Records what the stream is given; what torch computes is done at once and never recorded."""

    name = "faked"
    replays_steps = True

    def __init__(self, seed: int = 0, delay: float = DELAY) -> None:
        self.fake_stream = _native.FakeStream(seed, delay)

    def wait(self) -> None:
        self.fake_stream.synchronize()

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        self.fake_stream.begin_recording()
        try:
            step()
        finally:
            self.fake_stream.end_recording()
        return self.fake_stream.replay


@contextmanager
def opened(
    kind: type[StreamRouter],
    experts: HostExperts,
    device: FakedDevice,
    *,
    submissions: int,
    top_k: int,
    dtype: torch.dtype = torch.bfloat16,
    timeout_seconds: float = 30.0,
) -> Iterator[StreamRouter]:
    router = kind(
        experts,
        device,
        device.fake_stream,
        submissions=submissions,
        top_k=top_k,
        dtype=dtype,
        timeout_seconds=timeout_seconds,
    )
    try:
        yield router
    finally:
        router.close()


class WaitingRouter(MailboxRouter):
    """For a device whose other work is done at once: a sum is there when `collect` returns."""

    records = False

    def collect(self, pending: PendingExperts) -> Tensor:
        result = super().collect(pending)
        self._device.wait()
        return result

"""Between card and host: handoffs, copies of panels, and whether both sides work at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from gpu.shaped_model import Alias
from gpu.table import Table, median_seconds
from hybridk2.config import K2Config
from hybridk2.device import Device
from hybridk2.errors import EngineError
from hybridk2.experts.handoff import StreamRouter, measure_handoff
from hybridk2.experts.host import HostExperts
from hybridk2.experts.router import HOST_SHARE, AsyncRouter, PendingExperts
from hybridk2.experts.stream import ExpertStream

HANDOFF_MICROSECONDS = 25.0
# Tokens that keep two experts of any size busy for longer than the seconds of a router.
_BUSY_TOKENS = 8192
_NO_PATIENCE = 1e-4

OpenRouter = Callable[..., StreamRouter]


class NobodyRouter(AsyncRouter):
    """No crossing and no sum: what the device does by itself."""

    name = "nobody"
    records = True

    def __init__(self, device: Device) -> None:
        self._device = device

    def submit(self, slot: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> PendingExperts:
        return PendingExperts(slot, (x, expert_ids, weights))

    def collect(self, pending: PendingExperts) -> Tensor:
        return torch.zeros(
            pending.inputs[0].shape, dtype=torch.float32, device=self._device.torch_device
        )


class PicksByPosition:
    """A layer of which the host computes the first `on_host` picks of a token, whatever they are,
    and the device the others, from as many panels as it holds."""

    def __init__(
        self,
        on_host: int,
        packed: Tensor,
        arithmetic: Callable[..., Tensor],
        intermediate: int,
    ) -> None:
        self._on_host = on_host
        self._packed = packed
        self._arithmetic = arithmetic
        self._intermediate = intermediate

    def split(self, slot: int, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        position = torch.arange(expert_ids.shape[1], device=expert_ids.device)
        is_host = (position < self._on_host) | (expert_ids == HOST_SHARE)
        places = torch.where(is_host, HOST_SHARE, expert_ids % len(self._packed))
        return torch.where(position < self._on_host, expert_ids, HOST_SHARE), places.int()

    def compute(self, slot: int, x: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        return self._arithmetic(x, places, weights, self._packed, intermediate=self._intermediate)

    def is_resident(self, slot: int, expert: int) -> bool:
        return False


def measure_handoffs(
    table: Table, device: Device, config: K2Config, open_router: OpenRouter, kinds: list[type]
) -> None:
    layers = config.num_moe_layers
    best = float("inf")
    for kind in kinds:
        router = open_router(kind, submissions=layers)
        try:
            seconds = measure_handoff(
                router,
                device,
                submissions=layers,
                rows=1,
                hidden=config.hidden_size,
                top_k=config.num_experts_per_tok,
                dtype=torch.bfloat16,
            )
        finally:
            router.close()
        table.figure(f"handoff by {kind.name}, a layer", seconds * 1e6, "us")
        best = min(best, seconds * 1e6)
    table.at_most("handoff by the best, a layer", best, "us", HANDOFF_MICROSECONDS)


def check_lost_server(
    table: Table, device: Device, experts: HostExperts, open_router: OpenRouter, kind: type
) -> None:
    """The workers are busy with something else for longer than the router waits: its step must end
    with an error in time, and once they are back the next step must work."""
    router = open_router(kind, submissions=1, timeout_seconds=_NO_PATIENCE)
    call = _one_call(router, device)
    picks = torch.arange(2, dtype=torch.int32).expand(_BUSY_TOKENS, -1).contiguous()
    x = torch.zeros(_BUSY_TOKENS, experts.hidden, dtype=torch.bfloat16)
    something_else = experts.submit(0, x, picks, torch.zeros(picks.shape))
    began = time.perf_counter()
    failed = False
    try:
        call()
    except EngineError:
        failed = True
    seconds = time.perf_counter() - began
    experts.wait(something_else)
    if failed:
        _reset(router)
    router.close()
    table.at_least(f"{kind.name}: an answer that never comes is an error", float(failed), "", 1.0)
    table.at_most(f"{kind.name}: it comes within", seconds, "s", 10.0)
    router = open_router(kind, submissions=1)
    _one_call(router, device)()
    router.close()


def _reset(router: StreamRouter) -> None:
    """The workers finish what they began, for which this router has no patience."""
    until = time.perf_counter() + 10
    while True:
        try:
            router.reset()
        except EngineError:
            if time.perf_counter() > until:
                raise
            time.sleep(0.01)
        else:
            return


def _one_call(router: Any, device: Device) -> Callable[[], None]:
    hidden, top_k = router._experts.hidden, router._top_k
    x = device.place(torch.zeros(1, hidden, dtype=torch.bfloat16))
    ids = device.place(torch.arange(top_k, dtype=torch.int32)[None].contiguous())
    weights = device.place(torch.zeros(1, top_k))

    def call() -> None:
        router.begin_step()
        kept = router.submit(0, x, ids, weights)
        router.collect(kept)
        device.wait()
        router.end_step()

    return call


def host_step(
    experts: HostExperts, config: K2Config, alias: Alias, picks: int
) -> Callable[[], None]:
    """The host's share of a step of one token, by itself: every MoE layer's, one after another."""
    generator = torch.Generator().manual_seed(1)
    layers = []
    for slot in range(config.num_moe_layers):
        scores = torch.rand(1, config.n_routed_experts, generator=generator)
        ids = scores.topk(picks, dim=-1).indices.int()
        layers.append((alias.slot(slot), alias.expert_ids(slot, ids).int().contiguous()))
    x = torch.randn(1, config.hidden_size, generator=generator).bfloat16()
    weights = torch.ones(1, picks)

    def run() -> None:
        for slot, ids in layers:
            experts.wait(experts.submit(slot, x, ids, weights))

    return run


def measure_bus(
    table: Table, device: Device, stream: ExpertStream, experts: HostExperts, ids: Sequence[int]
) -> None:
    """These panels of the first layer to the card, alone and beside the host's kernels, which read
    the same memory."""
    total = len(ids) * experts.expert_bytes

    def copy() -> None:
        for _ in stream.panels(0, ids):
            pass
        stream.wait()

    table.figure("panels to the card, alone", total / median_seconds(device, copy, 5) / 1e9, "GB/s")
    with _busy(experts, ids[:8]):
        speed = total / median_seconds(device, copy, 5) / 1e9
    table.figure("panels to the card, beside busy kernels of the host", speed, "GB/s")


@contextmanager
def _busy(experts: HostExperts, ids: Sequence[int]) -> Iterator[None]:
    stop = Event()
    picks = torch.tensor([list(ids)], dtype=torch.int32)
    x, weights = torch.zeros(1, experts.hidden, dtype=torch.bfloat16), torch.ones(picks.shape)

    def work() -> None:
        while not stop.is_set():
            experts.wait(experts.submit(0, x, picks, weights))

    thread = Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()

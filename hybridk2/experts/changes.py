"""Residents that follow the routing: swaps carried out between steps of decoding.

Owns the moment and the copy. Which swaps pay `placement_changes` says, from what was picked and
from what a hit saves and an upload costs, which is measured here.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hybridk2.device import Device
from hybridk2.errors import ConfigError, EngineError
from hybridk2.experts.resident import ResidentExperts
from hybridk2.experts.router import HOST_SHARE
from hybridk2.experts.stream import ExpertMemory, host_bytes
from hybridk2.placement_changes import ChangingPlacement, SwapCosts
from hybridk2.prefill_split import ExpertCosts

logger = logging.getLogger(__name__)

# After each step at most so many: an upload of K2's takes a bus half a millisecond, a token 50.
_MOST_SWAPS = 2
_ROUNDS = 5


class ChangingResidents:
    """Moves experts onto the device when that pays. The host has a copy of every expert.

    uploads: so far.
    """

    def __init__(
        self,
        experts: ExpertMemory,
        resident: ResidentExperts,
        costs: SwapCosts,
        window_tokens: int,
    ) -> None:
        """window_tokens: see ChangingPlacement. Raises ConfigError unless the host has every expert
        of the device: one that leaves it must be computed somewhere."""
        mask = resident.mask()
        for slot, expert in np.argwhere(mask).tolist():
            try:
                experts.expert_regions(slot, expert)
            except EngineError as error:
                raise ConfigError(
                    f"layer slot {slot}, expert {expert} is on the device alone. A placement that "
                    "changes needs --keep-host-copy"
                ) from error
        self._experts = experts
        self._resident = resident
        self._costs = costs
        self._placement = ChangingPlacement(mask, window_tokens)
        self.uploads = 0

    def after_step(self, picks: Tensor) -> None:
        """A step of decoding is done. picks: (MoE layers, tokens, top_k) int32 on the host. The
        next one finds the swaps made."""
        self._placement.observe(picks.numpy())
        for swap in self._placement.swaps(self._costs, _MOST_SWAPS):
            packed = self._packed(swap.layer, swap.entering)
            self._resident.replace(swap.layer, swap.leaving, swap.entering, packed)
            self._placement.make(swap)
            self.uploads += 1
            logger.debug("layer slot %d: expert %d leaves the device for %d", *swap)

    def _packed(self, slot: int, expert: int) -> Tensor:
        pieces = [
            host_bytes(r.address, r.bytes) for r in self._experts.expert_regions(slot, expert)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def measure_swap_costs(
    costs: ExpertCosts,
    resident: ResidentExperts,
    device: Device,
    hidden: int,
    top_k: int,
    clock: Callable[[], float] = time.perf_counter,
) -> SwapCosts:
    """What a hit saves: what the host takes for an expert of one token, less what the device takes
    for one more; and what an upload costs. The device is timed now, on the layer with the most
    residents; clock: seconds."""
    slot = int(resident.mask().sum(axis=1).argmax())
    here = np.flatnonzero(resident.mask()[slot])[:top_k]

    def seconds(hits: int) -> float:
        ids = np.full((1, top_k), HOST_SHARE, np.int32)
        ids[0, :hits] = here[:hits]
        x = torch.randn(1, hidden, dtype=torch.bfloat16, device=device.torch_device)
        _, places = resident.split(slot, device.place(torch.from_numpy(ids)))
        weights = torch.ones(1, top_k, device=device.torch_device)
        found = []
        for _ in range(1 + _ROUNDS):
            device.wait()
            began = clock()
            resident.compute(slot, x, places, weights)
            device.wait()
            found.append(clock() - began)
        return statistics.median(found[1:])

    on_device = (seconds(len(here)) - seconds(0)) / max(len(here), 1)
    on_host = float(costs.on_host(np.array(1)))
    return SwapCosts(on_host - on_device, costs.expert_bytes / costs.bus_bytes_per_second)

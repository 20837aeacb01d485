"""Routed experts that live on the device, in the panels that the host's kernels read.

Owns their memory there, and the table that says which expert lies in which place; decoding asks it
with operations of the device alone, so that a recorded step finds whatever the table says when it
is replayed. Does not know who chose them, nor how a device computes: that is given to it.
"""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hybridk2.device import Device
from hybridk2.errors import EngineError
from hybridk2.experts import panels
from hybridk2.experts.router import HOST_SHARE
from hybridk2.placement import Mask


class ResidentArithmetic(Protocol):
    """The weighted sum of picked experts; as `panels.resident_experts`, where a card has kernels
    for few rows that only enqueue work."""

    def __call__(
        self, x: Tensor, places: Tensor, weights: Tensor, panels: Tensor, *, intermediate: int
    ) -> Tensor: ...


class ResidentExperts:
    """The experts of every MoE layer that live on the device.

    Each layer keeps as many as it had at first; which ones, `replace` changes between steps.
    expert_bytes: of one.
    """

    def __init__(
        self,
        mask: Mask,
        hidden: int,
        intermediate: int,
        device: Device,
        arithmetic: ResidentArithmetic = panels.resident_experts,
    ) -> None:
        """Take the memory, which `load` then fills. mask: (MoE layers, experts), True where the
        expert lives here. hidden, intermediate: of an expert."""
        self.expert_bytes = panels.expert_bytes(hidden, intermediate)
        self._intermediate = intermediate
        self._device = device
        self._arithmetic = arithmetic
        self._lock = threading.Lock()
        self._places = [
            {expert: place for place, expert in enumerate(np.flatnonzero(row).tolist())}
            for row in mask
        ]
        self._mask = mask.copy()
        self._loaded: set[tuple[int, int]] = set()
        # Shifted by one, so that HOST_SHARE finds an entry of its own.
        table = np.full((mask.shape[0], mask.shape[1] + 1), HOST_SHARE, np.int32)
        for slot, places in enumerate(self._places):
            for expert, place in places.items():
                table[slot, expert + 1] = place
        self._table = device.place(torch.from_numpy(table))
        self._panels = [
            torch.empty(
                len(places), self.expert_bytes, dtype=torch.uint8, device=device.torch_device
            )
            for places in self._places
        ]

    @property
    def num_bytes(self) -> int:
        """Of the device's memory, for panels."""
        return sum(map(len, self._places)) * self.expert_bytes

    def is_resident(self, slot: int, expert: int) -> bool:
        """Whether that expert lives on the device."""
        return expert in self._places[slot]

    def mask(self) -> Mask:
        """(MoE layers, experts), True where the expert lives here now."""
        return self._mask.copy()

    def panel(self, slot: int, expert: int) -> Tensor:
        """One expert's panels, uint8 (expert_bytes,), where they lie."""
        return self._panels[slot][self._places[slot][expert]]

    def load(self, slot: int, expert: int, packed: Tensor) -> None:
        """Put an expert, as `HostExperts.pack_expert` gives it, into its place. Any thread.

        Raises EngineError for one that does not live here, was loaded before or has another size.
        """
        where = f"layer slot {slot}, expert {expert}"
        self._check_packed(where, packed)
        with self._lock:
            if not self.is_resident(slot, expert):
                raise EngineError(f"{where} is not one of those on {self._device.name}")
            if (slot, expert) in self._loaded:
                raise EngineError(f"{where} was loaded before onto {self._device.name}")
            self._loaded.add((slot, expert))
        self.panel(slot, expert).copy_(packed)

    def check_loaded(self) -> None:
        """Raises EngineError, naming the first, if an expert that lives here was never loaded."""
        for slot, places in enumerate(self._places):
            for expert in places:
                if (slot, expert) not in self._loaded:
                    raise EngineError(f"layer slot {slot}, expert {expert} was not loaded")

    def split(self, slot: int, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Who computes which of a layer's picks, by operations of the device alone.

        expert_ids: (tokens, k) int32 on the device, HOST_SHARE for none. Returns host_ids, where
        HOST_SHARE stands for those that live here, and places for `compute`, both like expert_ids.
        """
        found = self._table[slot].index_select(0, (expert_ids + 1).flatten())
        places = found.view_as(expert_ids)
        return torch.where(places == HOST_SHARE, expert_ids, HOST_SHARE), places

    def compute(self, slot: int, x: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of this place's share: (tokens, hidden) fp32.

        x: (tokens, hidden); places: (tokens, k) int32 of `split`; weights: (tokens, k) fp32.
        """
        if not self._places[slot]:
            return torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        return self._arithmetic(
            x, places, weights, self._panels[slot], intermediate=self._intermediate
        )

    def replace(self, slot: int, leaving: int, entering: int, packed: Tensor) -> None:
        """Between steps: give one expert's place to another, which decoding finds from then on.

        packed: as for `load`. The host must have the one that leaves. Raises EngineError if it does
        not live here or the other does.
        """
        where = f"layer slot {slot}, expert {entering}"
        places = self._places[slot]
        if leaving not in places or entering in places:
            raise EngineError(f"{where} cannot take the place of expert {leaving}")
        self._check_packed(where, packed)
        self.panel(slot, leaving).copy_(packed)
        place = places[entering] = places.pop(leaving)
        self._loaded.discard((slot, leaving))
        self._loaded.add((slot, entering))
        self._mask[slot, [leaving, entering]] = False, True
        self._table[slot, leaving + 1] = HOST_SHARE
        self._table[slot, entering + 1] = place

    def _check_packed(self, where: str, packed: Tensor) -> None:
        if packed.dtype != torch.uint8 or packed.shape != (self.expert_bytes,):
            raise EngineError(
                f"{where}: expected {self.expert_bytes} packed bytes, "
                f"found {packed.dtype} {tuple(packed.shape)}"
            )

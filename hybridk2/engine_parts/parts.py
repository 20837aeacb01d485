"""The parts themselves, and what those for the host and those for a card have in common.

Owns no decision.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import psutil
import torch

from hybridk2.checkpoint import Checkpoint, LoadProgress
from hybridk2.config import EngineConfig
from hybridk2.device import Device
from hybridk2.experts.host import HostExperts, reserved_page_bytes, usable_cores
from hybridk2.kv_cache import PAGE_TOKENS, PagedLatentCache
from hybridk2.model.k2 import K2Model
from hybridk2.model.loading import dense_threads
from hybridk2.placement import Mask

OnProgress = Callable[[LoadProgress], None]


@dataclass(frozen=True)
class EngineParts:
    """A loaded model and what it computes with. device: of all but experts that are on the host.
    context_tokens: of one request, at most. resources: what `close` gives back, in the right order.
    """

    device: Device
    model: K2Model
    experts: HostExperts
    cache: PagedLatentCache
    context_tokens: int
    resources: ExitStack

    def close(self) -> None:
        """Give back threads and memory. No step may be under way."""
        self.resources.close()


def available_bytes(checkpoint: Checkpoint, choices: EngineConfig) -> int:
    """Host memory for the model. The kernel does not count reserved 1 GB pages as available."""
    free_bytes = psutil.virtual_memory().available
    if choices.huge_pages:
        free_bytes += min(reserved_page_bytes(), checkpoint.expert_bytes)
    return free_bytes


def host_experts(
    checkpoint: Checkpoint,
    choices: EngineConfig,
    elsewhere: Mask | None = None,
    *,
    spins_when_idle: bool,
) -> HostExperts:
    """The host's experts with their threads, not loaded yet. For the rest see HostExperts."""
    config = checkpoint.config
    threads = choices.threads or usable_cores()
    torch.set_num_threads(dense_threads(checkpoint, threads))
    return HostExperts.of_model(
        config,
        isa=choices.isa,
        threads=threads,
        huge_pages=choices.huge_pages,
        elsewhere=elsewhere,
        spins_when_idle=spins_when_idle,
    )


def whole_pages(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS) * PAGE_TOKENS

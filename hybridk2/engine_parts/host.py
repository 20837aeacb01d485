"""An engine that computes everything on the host."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from hybridk2.checkpoint import Checkpoint
from hybridk2.config import EngineConfig
from hybridk2.device import Device
from hybridk2.engine_parts.parts import (
    EngineParts,
    OnProgress,
    available_bytes,
    host_experts,
    whole_pages,
)
from hybridk2.experts.loading import check_memory, load_experts
from hybridk2.experts.router import ThreadRouter
from hybridk2.kv_cache import LatentFormat, PagedLatentCache
from hybridk2.model.loading import dense_bytes, load_model
from hybridk2.model.moe import RoutedExperts
from hybridk2.planner import CPU_CHUNK_TOKENS


def load_onto_host(
    checkpoint: Checkpoint,
    choices: EngineConfig,
    device: Device,
    context_tokens: int,
    on_progress: OnProgress,
) -> EngineParts:
    """See `load_parts`. The cache holds two conversations of the context's length, so that a second
    one does not push out the first."""
    config = checkpoint.config
    chunk_tokens = whole_pages(choices.prefill_chunk_tokens or CPU_CHUNK_TOKENS)
    dtype = getattr(torch, choices.dtype)
    cache_tokens = choices.kv_cache_tokens or 2 * context_tokens
    check_memory(
        checkpoint,
        available_bytes(checkpoint, choices),
        dense_bytes=dense_bytes(checkpoint, dtype),
        cache_bytes=LatentFormat.plain(config, dtype).bytes_for(config, cache_tokens),
    )
    with ExitStack() as resources:
        # Between two calls torch's threads compute on the workers' cores, and spin there.
        experts = host_experts(checkpoint, choices, spins_when_idle=False)
        resources.callback(experts.close)
        load_experts(checkpoint, experts, on_progress)
        routed = RoutedExperts(ThreadRouter(experts, device), deferred=choices.defer_experts)
        model = load_model(checkpoint, experts, device, dtype, on_progress, routed=routed)
        cache = PagedLatentCache(config, cache_tokens, chunk_tokens, device, dtype)
        return EngineParts(device, model, experts, cache, context_tokens, resources.pop_all())

"""What an engine is made of, from a checkpoint and a person's choices.

Owns the order of things: what the choices mean on this machine, whether all of it fits, and only
then memory, threads and weights. Knows neither requests nor tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from hybridk2.checkpoint import Checkpoint
from hybridk2.config import EngineConfig, K2Config
from hybridk2.device import Device, select_device
from hybridk2.errors import ConfigError
from hybridk2.experts.host import HostExperts, reserved_page_bytes, usable_cores
from hybridk2.experts.loading import LoadProgress, check_memory, load_experts
from hybridk2.experts.router import ThreadRouter
from hybridk2.kv_cache import PAGE_TOKENS, LatentFormat, PagedLatentCache
from hybridk2.model.k2 import K2Model
from hybridk2.model.loading import dense_bytes, dense_threads, load_model
from hybridk2.model.moe import RoutedExperts
from hybridk2.planner import CPU_CHUNK_TOKENS

logger = logging.getLogger(__name__)

OnProgress = Callable[[LoadProgress], None]

# Where the user sets no context: as much as a long conversation needs, 2.3 GB of cache for K2. The
# model's own limit of 262,144 tokens would be 18 GB.
_DEFAULT_CONTEXT_TOKENS = 32_768


@dataclass(frozen=True)
class EngineParts:
    """A loaded model and what it computes with. context_tokens: of one request, at most."""

    model: K2Model
    experts: HostExperts
    cache: PagedLatentCache
    context_tokens: int


def load_parts(
    checkpoint: Checkpoint, choices: EngineConfig, on_progress: OnProgress | None
) -> EngineParts:
    """Everything in its place.

    Raises the HybridK2Error of whatever is wrong with the checkpoint, the choices or the machine's
    memory, before large memory is taken.
    """
    config = checkpoint.config
    device = select_device(choices.device)
    _check_choices(choices, config, device)
    context_tokens = _context_tokens(choices, config)
    for words in choices.approximations:
        logger.warning("approximate, as asked for: %s", words)
    parts = _on_the_host(checkpoint, choices, device, context_tokens, on_progress)
    logger.info(
        "model %s: %s activations on %s, %d threads, context %d tokens, cache %d tokens",
        choices.model,
        choices.dtype,
        device.name,
        parts.experts.threads,
        context_tokens,
        parts.cache.capacity_tokens,
    )
    return parts


def _check_choices(choices: EngineConfig, config: K2Config, device: Device) -> None:
    """Refuse what means nothing for this model or device, before anything is read."""
    if choices.about_a_card and device.memory_bytes() is None:
        options = ", ".join(choices.about_a_card)
        raise ConfigError(
            f"{options}: about a card, and this engine computes on the CPU. Leave them out, or say "
            "--device cuda to learn why no card is used"
        )
    if choices.defer_experts > config.num_experts_per_tok:
        raise ConfigError(
            f"--defer-experts: the model picks {config.num_experts_per_tok} experts for a token, "
            f"{choices.defer_experts} of them cannot be deferred"
        )


def _on_the_host(
    checkpoint: Checkpoint,
    choices: EngineConfig,
    device: Device,
    context_tokens: int,
    on_progress: OnProgress | None,
) -> EngineParts:
    config = checkpoint.config
    chunk_tokens = _whole_pages(choices.prefill_chunk_tokens or CPU_CHUNK_TOKENS)
    dtype = getattr(torch, choices.dtype)
    cache_tokens = choices.kv_cache_tokens or 2 * context_tokens
    check_memory(
        checkpoint,
        _available_bytes(checkpoint, choices),
        dense_bytes=dense_bytes(checkpoint, dtype),
        cache_bytes=LatentFormat.plain(config, dtype).bytes_for(config, cache_tokens),
    )
    experts = _host_experts(checkpoint, choices)
    try:
        load_experts(checkpoint, experts, on_progress or (lambda progress: None))
        routed = RoutedExperts(ThreadRouter(experts, device), deferred=choices.defer_experts)
        model = load_model(checkpoint, experts, device, dtype, on_progress, routed=routed)
        cache = PagedLatentCache(config, cache_tokens, chunk_tokens, device, dtype)
    except BaseException:
        experts.close()
        raise
    return EngineParts(model, experts, cache, context_tokens)


def _available_bytes(checkpoint: Checkpoint, choices: EngineConfig) -> int:
    """Host memory for the model. The kernel does not count reserved 1 GB pages as available."""
    available_bytes = psutil.virtual_memory().available
    if choices.huge_pages:
        available_bytes += min(reserved_page_bytes(), checkpoint.expert_bytes)
    return available_bytes


def _host_experts(checkpoint: Checkpoint, choices: EngineConfig) -> HostExperts:
    config = checkpoint.config
    threads = choices.threads or usable_cores()
    torch.set_num_threads(dense_threads(checkpoint, threads))
    return HostExperts(
        config.num_moe_layers,
        config.n_routed_experts,
        config.hidden_size,
        config.moe_intermediate_size,
        isa=choices.isa,
        threads=threads,
        huge_pages=choices.huge_pages,
    )


def _whole_pages(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS) * PAGE_TOKENS


def _context_tokens(choices: EngineConfig, config: K2Config) -> int:
    longest = config.max_position_embeddings
    if choices.context_tokens is None:
        return min(longest, _DEFAULT_CONTEXT_TOKENS)
    if choices.context_tokens > longest:
        raise ConfigError(
            f"context: {choices.context_tokens} tokens asked for, the model was trained for "
            f"{longest} at most"
        )
    return choices.context_tokens

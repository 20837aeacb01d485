"""What an engine is made of, from a checkpoint and a person's choices.

Owns the order of things: what the choices mean on this machine, whether all of it fits, and only
then memory, threads and weights. Knows neither requests nor tokens.
"""

from __future__ import annotations

import logging

from hybridk2.checkpoint import Checkpoint
from hybridk2.config import EngineConfig, K2Config
from hybridk2.device import Device, select_device
from hybridk2.engine_parts.card import load_onto_card
from hybridk2.engine_parts.host import load_onto_host
from hybridk2.engine_parts.parts import EngineParts, OnProgress
from hybridk2.errors import ConfigError

__all__ = ["EngineParts", "load_parts"]

logger = logging.getLogger(__name__)

# Where the user sets no context: as much as a long conversation needs, 2.3 GB of cache for K2. The
# model's own limit of 262,144 tokens would be 18 GB.
_DEFAULT_CONTEXT_TOKENS = 32_768


def load_parts(
    checkpoint: Checkpoint, choices: EngineConfig, on_progress: OnProgress
) -> EngineParts:
    """Everything in its place.

    Raises the HybridK2Error of whatever is wrong with the checkpoint, the choices or the machine's
    memory, before large memory is taken.
    """
    device = select_device(choices.device)
    _check_choices(choices, checkpoint.config, device)
    context_tokens = _context_tokens(choices, checkpoint.config)
    for words in choices.approximations:
        logger.warning("approximate, as asked for: %s", words)
    load = load_onto_host if device.memory_bytes() is None else load_onto_card
    parts = load(checkpoint, choices, device, context_tokens, on_progress)
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
    is_card = device.memory_bytes() is not None
    if choices.about_a_card and not is_card:
        options = ", ".join(choices.about_a_card)
        raise ConfigError(
            f"{options}: about a card, and this engine computes on the CPU. Leave them out, or say "
            "--device cuda to learn why no card is used"
        )
    if is_card and choices.dtype != "bfloat16":
        raise ConfigError(
            f"--dtype {choices.dtype}: for comparisons on the CPU. Say --device cpu with it"
        )
    if choices.defer_experts > config.num_experts_per_tok:
        raise ConfigError(
            f"--defer-experts: the model picks {config.num_experts_per_tok} experts for a token, "
            f"{choices.defer_experts} of them cannot be deferred"
        )


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

"""What goes onto a card that is there, from its free memory and a person's choices.

Owns the decision and the refusal, with all numbers, before anything is allocated. The sums are
`plan`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybridk2.config import EngineConfig
from hybridk2.errors import OutOfMemoryError
from hybridk2.hardware import described_machine, gpu_of_memory
from hybridk2.placement import Mask, Placement, uniform
from hybridk2.planner.plan import GPU_RESERVED_CHUNK_TOKENS, Choices, Plan, plan
from hybridk2.planner.sizes import ModelSizes
from hybridk2.planner.timing import GPU_CHUNK_TOKENS

# Speeds say nothing about what fits; a plan wants one.
_ANY_SPEED = 1e11


@dataclass(frozen=True)
class CardLayout:
    """resident: (MoE layers, experts), True where the expert lives on the card. chunk_tokens: of a
    prompt, computed at a time. plan: with the bytes of everything."""

    plan: Plan
    resident: Mask
    chunk_tokens: int


def lay_out_card(
    sizes: ModelSizes,
    choices: EngineConfig,
    *,
    cache_tokens: int,
    free_bytes: int,
    host_bytes: int,
    placement: Placement | None,
) -> CardLayout:
    """Place a model on a card with so many free bytes, beside a host with so many.

    Without a placement as many experts live on the card as fit, evenly spread: nothing is known of
    them. A prompt's chunk is as long as what is left lets it be.

    placement: made for this model. Raises OutOfMemoryError with what is missing where and the
    nearest settings.
    """
    machine = described_machine(_ANY_SPEED, host_bytes)
    wanted = Choices(
        context_tokens=cache_tokens,
        kv_dtype=choices.kv_dtype,
        dense=choices.dense,
        resident_experts=None if placement is None else placement.num_resident,
        keep_host_copy=choices.keep_host_copy,
        chunk_tokens=choices.prefill_chunk_tokens or GPU_RESERVED_CHUNK_TOKENS,
    )
    made = plan(sizes, replace(machine, gpu=gpu_of_memory(free_bytes)), wanted)
    if not made.fits:
        raise OutOfMemoryError(_refusal(made))
    layers, experts = sizes.moe_layers, sizes.experts_per_layer
    resident = (
        uniform(layers, experts, made.resident_experts) if placement is None else placement.mask()
    )
    chunk_tokens = choices.prefill_chunk_tokens or _longest_chunk(made)
    return CardLayout(made, resident, chunk_tokens)


def _longest_chunk(made: Plan) -> int:
    """Twice as long as long as its activations fit beside everything else."""
    card = made.places[0]
    left = card.capacity_bytes - card.needed_bytes
    chunk = GPU_RESERVED_CHUNK_TOKENS
    while chunk < GPU_CHUNK_TOKENS:
        longer = 2 * chunk - GPU_RESERVED_CHUNK_TOKENS
        if longer * made.sizes.prompt_token_bytes > left:
            break
        chunk *= 2
    return chunk


def _refusal(made: Plan) -> str:
    lines = []
    for place in made.places:
        if place.shortfall_bytes:
            parts = ", ".join(f"{_gb(size)} {what}" for what, size in place.contents if size)
            lines.append(
                f"{place.name}: {_gb(place.needed_bytes)} are needed ({parts}), "
                f"{_gb(place.capacity_bytes)} are free, {_gb(place.shortfall_bytes)} are missing"
            )
    enough = [
        nearest.effect if nearest.options.startswith(("--gpu", "--ram")) else nearest.options
        for nearest in made.nearest
    ]
    return f"the model does not fit. {'; '.join(lines)}. Enough would be: {'; or '.join(enough)}"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.3f} GB"

"""What goes onto a card fits to the byte, or is refused with what is missing and what would do."""

from __future__ import annotations

import numpy as np
import pytest

from hybridk2.config import KIMI_K2_THINKING, EngineConfig
from hybridk2.engine_parts.card import _RING_SLOTS
from hybridk2.errors import OutOfMemoryError
from hybridk2.placement import Placement
from hybridk2.planner import GPU_RESERVED_CHUNK_TOKENS, CardLayout, ModelSizes, lay_out_card

K2 = ModelSizes.from_config(KIMI_K2_THINKING)
CONTEXT = 32_768
LATENTS = CONTEXT * 70_272
RESERVE = 1_900_000_000
HOST = 768 * 10**9
# All weights but the routed experts and the embedding, in bf16.
DENSE = K2.layer_bytes + K2.head_bytes


def laid_out(
    free_bytes: int,
    choices: EngineConfig | None = None,
    *,
    host_bytes: int = HOST,
    placement: Placement | None = None,
) -> CardLayout:
    return lay_out_card(
        K2,
        choices or EngineConfig(),
        cache_tokens=CONTEXT,
        free_bytes=free_bytes,
        host_bytes=host_bytes,
        placement=placement,
    )


def placement_of(experts: int) -> Placement:
    mask = np.zeros((60, 384), bool)
    mask.ravel()[np.linspace(0, mask.size - 1, experts).astype(int)] = True
    return Placement.from_mask("a model", "made up", mask)


def test_a_card_that_holds_exactly_what_is_needed_is_enough_and_one_byte_less_is_not() -> None:
    needed = DENSE + LATENTS + RESERVE
    layout = laid_out(needed)
    assert layout.plan.places[0].needed_bytes == needed
    assert (layout.plan.resident_experts, layout.chunk_tokens) == (0, 2048)
    with pytest.raises(OutOfMemoryError) as caught:
        laid_out(needed - 1)
    message = str(caught.value)
    for part in (f"{needed / 1e9:,.3f} GB are needed", f"{LATENTS / 1e9:,.3f} GB latent cache"):
        assert part in message
    assert "Enough would be: --kv-dtype fp8; or --context 16384" in message


@pytest.mark.parametrize("per_layer", [1, 7, 384])
def test_without_a_placement_as_many_experts_as_fit_fill_the_card(per_layer: int) -> None:
    row = 60 * K2.expert_bytes
    layout = laid_out(DENSE + LATENTS + RESERVE + per_layer * row)
    assert layout.resident.sum(axis=1).tolist() == [per_layer] * 60
    assert layout.plan.resident_experts_per_layer == per_layer
    one_less = laid_out(DENSE + LATENTS + RESERVE + per_layer * row - 1)
    # What is left over goes to the first layers.
    assert one_less.resident.sum() == per_layer * 60 - 1
    assert one_less.resident.sum(axis=1).tolist() == [per_layer] * 59 + [per_layer - 1]


def test_a_placement_is_taken_as_it_is_or_refused() -> None:
    wanted = placement_of(100)
    needed = DENSE + LATENTS + RESERVE + 100 * K2.expert_bytes
    layout = laid_out(needed, placement=wanted)
    assert np.array_equal(layout.resident, wanted.mask())
    host = dict(layout.plan.places[1].contents)
    assert host["routed experts"] == K2.routed_bytes - 100 * K2.expert_bytes
    with pytest.raises(OutOfMemoryError, match="--placement of 99 experts at most"):
        laid_out(needed - 1, placement=wanted)


def test_a_copy_on_the_host_takes_the_hosts_memory() -> None:
    layout = laid_out(
        DENSE + LATENTS + RESERVE + 100 * K2.expert_bytes,
        EngineConfig(keep_host_copy=True),
        placement=placement_of(100),
    )
    assert dict(layout.plan.places[1].contents)["routed experts"] == K2.routed_bytes


def test_experts_on_the_card_make_a_host_large_enough_that_is_not_without_them() -> None:
    host = K2.routed_bytes - 5 * 60 * K2.expert_bytes + K2.embedding_bytes + 10**9
    card = DENSE + LATENTS + RESERVE + 5 * 60 * K2.expert_bytes
    assert laid_out(card, host_bytes=host).plan.resident_experts == 300
    with pytest.raises(OutOfMemoryError, match=r"host memory: .* are missing"):
        laid_out(card - 1, host_bytes=host)


def test_what_is_left_makes_chunks_longer_and_a_chunk_that_was_asked_for_is_counted() -> None:
    token = K2.prompt_token_bytes
    fits = DENSE + LATENTS + RESERVE
    for chunk in (2048, 4096, 8192, 16_384):
        exact = fits + (chunk - 2048) * token
        none = placement_of(1)
        assert laid_out(exact + K2.expert_bytes, placement=none).chunk_tokens == chunk
        choices = EngineConfig(prefill_chunk_tokens=chunk)
        assert laid_out(exact, choices).chunk_tokens == chunk
        with pytest.raises(OutOfMemoryError):
            laid_out(exact - 1, choices)
    assert laid_out(fits + 10**12, placement=placement_of(1)).chunk_tokens == 16_384


def test_the_reserve_has_room_for_what_attention_leaves_between_its_programs() -> None:
    """On 192 multiprocessors, more than a card has. What no part of the reserve is named for is the
    context's and the allocator's."""
    mla = pytest.importorskip("hybridk2.model.triton.mla", reason="Triton is not installed")
    hopper = pytest.importorskip("hybridk2.model.hopper.attention")
    heads, rank = KIMI_K2_THINKING.num_attention_heads, KIMI_K2_THINKING.kv_lora_rank
    taken = []
    for rows in range(1, 9):
        for tiling in mla.TILINGS:
            shares = mla.splits_for(rows, heads, 192, tiling)
            taken.append(rows * heads * shares * (4 * rank + 2 * 4 * tiling.parts))
        taken.append(rows * heads * hopper.shares_for(rows, 192) * (2 * rank + 2 * 4))
    assert max(taken) <= 26e6
    chunk = GPU_RESERVED_CHUNK_TOKENS * K2.prompt_token_bytes
    ring = _RING_SLOTS * K2.expert_bytes
    assert RESERVE - chunk - ring - max(taken) >= 0.7e9

"""The latent cache gives back what was written, and reuses exactly what is allowed."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from hybridk2.config import K2Config
from hybridk2.device import CpuDevice
from hybridk2.errors import EngineError
from hybridk2.kv_cache import PAGE_TOKENS, CacheSequence, LatentFormat, PagedLatentCache
from tests.test_config import K2_THINKING

CHUNK = 2 * PAGE_TOKENS
CONFIG = dataclasses.replace(
    K2Config.from_dict(K2_THINKING), num_hidden_layers=2, kv_lora_rank=3, qk_rope_head_dim=2
)


def make_cache(capacity_tokens: int = 64 * PAGE_TOKENS) -> PagedLatentCache:
    return PagedLatentCache(CONFIG, capacity_tokens, CHUNK, CpuDevice(), torch.float32)


def latents_of(token_ids: Sequence[int], start: int, layer: int, mark: float) -> torch.Tensor:
    """Rows that tell which token, position, layer and writer they belong to."""
    rows = [[token, start + i, layer, mark, 1.0] for i, token in enumerate(token_ids)]
    return torch.tensor(rows)


def extend(sequence: CacheSequence, token_ids: Sequence[int], mark: float = 0.0) -> None:
    sequence.reserve(len(token_ids))
    for layer in range(CONFIG.num_hidden_layers):
        sequence.write(layer, latents_of(token_ids, sequence.length, layer, mark))
    sequence.advance(token_ids)


def contents(sequence: CacheSequence, layer: int, block_keys: int = PAGE_TOKENS) -> torch.Tensor:
    # A write of nothing tells the sequence that reading starts anew after a reopening.
    sequence.write(layer, torch.empty(0, CONFIG.latent_dim))
    return torch.cat([block for _, block in sequence.read_blocks(layer, block_keys)])


def run(cache: PagedLatentCache, token_ids: list[int], *, repeatable: bool, mark: float) -> int:
    """Prefill as the engine does, in aligned chunks; returns how many tokens were reused."""
    sequence = cache.open(token_ids, repeatable=repeatable)
    reused = sequence.length
    while sequence.length < len(token_ids):
        start = sequence.length
        end = min(start - start % CHUNK + CHUNK, len(token_ids))
        extend(sequence, token_ids[start:end], mark)
    for layer in range(CONFIG.num_hidden_layers):
        found = contents(sequence, layer)
        torch.testing.assert_close(found[:, :3], latents_of(token_ids, 0, layer, 0)[:, :3])
    sequence.close()
    return reused


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 127, 128, 129, 300])
@pytest.mark.parametrize("block_keys", [1, 64, 100, 128, 10_000])
def test_blocks_cover_the_past_once_and_start_at_fixed_places(tokens: int, block_keys: int) -> None:
    cache = make_cache()
    sequence = cache.open([0], repeatable=False)
    ids = list(range(tokens))
    extend(sequence, ids)
    sequence.write(1, torch.empty(0, CONFIG.latent_dim))
    expected_first = 0
    for first, block in sequence.read_blocks(1, block_keys):
        assert first == expected_first
        assert first % (max(block_keys // PAGE_TOKENS, 1) * PAGE_TOKENS) == 0
        torch.testing.assert_close(block, latents_of(ids, 0, 1, 0)[first : first + len(block)])
        expected_first += len(block)
    assert expected_first == tokens


@pytest.mark.parametrize("tokens", [2, 64, 65, 128, 129, 200, 256, 257])
def test_the_same_prompt_again_computes_only_its_last_token(tokens: int) -> None:
    cache = make_cache()
    ids = [7 * i % 1000 for i in range(tokens)]
    assert run(cache, ids, repeatable=False, mark=1) == 0
    assert run(cache, ids, repeatable=False, mark=2) == tokens - 1


def test_the_next_turn_of_a_conversation_reads_only_what_is_new() -> None:
    cache = make_cache()
    first_turn = list(range(150))
    assert run(cache, first_turn, repeatable=False, mark=1) == 0
    assert run(cache, [*first_turn, *range(900, 930)], repeatable=False, mark=2) == 150


@pytest.mark.parametrize("same", [0, 1, 63, 64, 65, 100, 128, 199])
def test_reuse_ends_exactly_where_the_tokens_part(same: int) -> None:
    cache = make_cache()
    ids = list(range(200))
    other = ids[:same] + [5000 + i for i in range(200 - same)]
    run(cache, ids, repeatable=False, mark=1)
    assert run(cache, other, repeatable=False, mark=2) == same


def test_the_same_tokens_after_another_past_are_not_reused() -> None:
    cache = make_cache()
    run(cache, [1, *range(200)], repeatable=False, mark=1)
    assert run(cache, [2, *range(200)], repeatable=False, mark=2) == 0


@pytest.mark.parametrize("tokens", [100, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 50])
def test_a_repeatable_sequence_reuses_whole_chunks_of_cold_starts_only(tokens: int) -> None:
    cache = make_cache()
    ids = list(range(tokens))
    assert run(cache, ids, repeatable=True, mark=1) == 0
    whole = (tokens - 1) // CHUNK * CHUNK
    assert run(cache, ids, repeatable=True, mark=2) == whole


def test_pages_computed_from_an_odd_start_never_reach_a_repeatable_sequence() -> None:
    cache = make_cache()
    ids = list(range(4 * CHUNK))
    run(cache, ids[: CHUNK + 10], repeatable=False, mark=1)
    # Starts at CHUNK + 10, so its second chunk is a part and all behind it rest on that part.
    assert run(cache, ids, repeatable=False, mark=2) == CHUNK + 10
    sequence = cache.open(ids, repeatable=True)
    assert sequence.length == CHUNK
    assert set(contents(sequence, 0)[:, 3].tolist()) == {1.0}
    sequence.close()


def test_a_repeatable_page_takes_the_place_of_one_that_is_not() -> None:
    cache = make_cache()
    ids = list(range(2 * CHUNK + 1))
    run(cache, ids[:10], repeatable=False, mark=1)
    run(cache, ids, repeatable=False, mark=2)
    assert run(cache, ids, repeatable=True, mark=3) == 0
    assert run(cache, ids, repeatable=True, mark=4) == 2 * CHUNK


def test_a_full_cache_forgets_the_oldest_and_says_when_nothing_can_be_forgotten() -> None:
    cache = make_cache(capacity_tokens=4 * PAGE_TOKENS)
    run(cache, [1] * (2 * PAGE_TOKENS), repeatable=False, mark=1)
    run(cache, [2] * (2 * PAGE_TOKENS), repeatable=False, mark=2)
    run(cache, [3] * PAGE_TOKENS, repeatable=False, mark=3)
    # The end of the oldest sequence went; its start is still known.
    assert run(cache, [1] * (PAGE_TOKENS + 1), repeatable=False, mark=4) == PAGE_TOKENS
    held = cache.open([9, 9], repeatable=False)
    extend(held, [9] * (4 * PAGE_TOKENS))
    with pytest.raises(EngineError, match="latent cache is full"):
        held.reserve(1)
    held.close()
    assert cache.available_tokens == 4 * PAGE_TOKENS


def test_random_conversations_always_read_what_they_wrote() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    cache = make_cache(capacity_tokens=12 * PAGE_TOKENS)
    past: list[list[int]] = [[]]
    for step in range(300):
        base = past[draw(len(past))]
        ids = base[: draw(len(base) + 1)] + [draw(3) for _ in range(1 + draw(150))]
        ids = ids[: 5 * PAGE_TOKENS]
        run(cache, ids, repeatable=bool(draw(2)), mark=step)
        past.append(ids)
        assert cache.available_tokens == 12 * PAGE_TOKENS, "a page leaked"


def halves(latents: torch.Tensor) -> torch.Tensor:
    return (latents / 2).to(torch.float64)


def doubles(stored: torch.Tensor) -> torch.Tensor:
    return (stored * 2).float()


def test_latents_are_kept_in_their_format_and_come_back_in_the_activations() -> None:
    """A format's ways in and out lie between attention and memory, pages and single rows alike."""
    kept = LatentFormat(torch.float64, CONFIG.latent_dim, halves, doubles)
    cache = PagedLatentCache(CONFIG, 1024, CHUNK, CpuDevice(), torch.float32, kept)
    sequence = cache.open([0], repeatable=False)
    extend(sequence, list(range(70)))
    sequence.reserve(1)
    single = latents_of([70], 70, 0, 0)
    cache.write_rows(0, torch.tensor([sequence.next_row]), single)
    row = cache.latents(0).flatten(0, 1)[sequence.next_row]
    assert torch.equal(row, halves(single)[0])
    sequence.advance([70])
    torch.testing.assert_close(contents(sequence, 0), latents_of(list(range(71)), 0, 0, 0))
    layers, width = CONFIG.num_hidden_layers, CONFIG.latent_dim
    assert kept.bytes_for(CONFIG, 1024) == layers * (1024 + PAGE_TOKENS) * width * 8
    assert kept.bytes_for(CONFIG, 1024) == cache._latents.nbytes


def test_what_nobody_wants_is_written_where_no_sequence_reads() -> None:
    cache = make_cache(4 * PAGE_TOKENS)
    sequence = cache.open([0], repeatable=False)
    ids = list(range(4 * PAGE_TOKENS))
    extend(sequence, ids)
    rows = torch.full((3,), cache.nobodys_row)
    cache.write_rows(0, rows, torch.full((3, CONFIG.latent_dim), float("nan")))
    torch.testing.assert_close(contents(sequence, 0), latents_of(ids, 0, 0, 0))

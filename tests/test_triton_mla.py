"""Split-KV attention over the paged cache against softmax in fp64, with derived tolerances."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybridk2.config import KIMI_K2_THINKING
from hybridk2.planner import ModelSizes
from tests.paged_attention import PAGE, PagedAttention, assert_attends
from tests.triton_kernels import DEVICE, INTERPRETED
from tests.triton_offline import CARDS, MOST_SHARED_BYTES, MOST_STACK_BYTES, compiled

mla = pytest.importorskip("hybridk2.model.triton.mla", reason="Triton is not installed")
latents = pytest.importorskip("hybridk2.model.triton.latents")

# What one program may have of shared memory on sm_90. Its sums of 64 heads fill half of all
# registers; Triton 3.6 spills nothing there, 3.9 64 bytes a thread, and 272 with FP8 latents.
MOST_HOPPER_BYTES = 227 * 1024
MOST_HOPPER_STACK_BYTES = 272
BIG = 2**31  # elements: one more than a 32-bit offset reaches


class Problem(PagedAttention):
    def decode(self, cache: Tensor | None = None, splits: int = 3, tiling: object = None) -> Tensor:
        cache = self.cache if cache is None else cache
        on_device = (t.to(DEVICE) for t in (self.q, cache, self.table, self.lengths))
        heads = self.q.shape[1]
        tiling = tiling or mla.tiling_for(self.q.dtype, cache.dtype, heads, MOST_SHARED_BYTES)
        return mla.decode(
            *on_device, scale=self.scale, rank=self.rank, splits=splits, tiling=tiling
        ).cpu()


def problem(
    lengths: list[int],
    *,
    heads: int = 3,
    rank: int = 32,
    rope: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> Problem:
    return Problem.random(lengths, heads=heads, rank=rank, rope=rope, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_every_length_around_a_page_are_attended_to(dtype: torch.dtype) -> None:
    given = problem([0, 1, 63, 64, 65, 130], dtype=dtype)
    assert_attends(given.decode(), given)


@pytest.mark.parametrize("splits", [1, 2, 7, 33])
def test_any_number_of_splits_gives_the_same_within_the_tolerance(splits: int) -> None:
    given = problem([200, 33])
    assert_attends(given.decode(splits=splits), given)


@pytest.mark.parametrize("tiling", [*mla.TILINGS, mla.Tiling(16, 64, 4, 1)])
def test_every_tiling_gives_the_same_within_the_tolerance(tiling: object) -> None:
    given = problem([129], heads=40)
    assert_attends(given.decode(tiling=tiling), given)


def test_a_split_row_of_one_key_is_that_key() -> None:
    given = problem([1], heads=16, dtype=torch.float32)
    assert torch.equal(given.decode()[0], given.keys(0)[:, : given.rank].expand(16, -1).float())


def test_large_scores_do_not_overflow() -> None:
    given = problem([70], dtype=torch.float32)
    loud = Problem(given.q * 40, given.cache, given.table, given.lengths, given.rank)
    assert_attends(loud.decode(), loud)


def test_a_rows_bits_do_not_depend_on_its_neighbours() -> None:
    given = problem([100, 17, 0, 64])
    together = given.decode()
    for row in range(4):
        here = slice(row, row + 1)
        alone = Problem(
            given.q[here], given.cache, given.table[here], given.lengths[here], given.rank
        )
        assert torch.equal(together[here], alone.decode())


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_one_rows_nan_stays_its_own() -> None:
    given = problem([65, 65, 65])
    given.cache[given.table[1, 1], 0, 5] = torch.nan
    found = given.decode()
    assert found[1].isnan().all()
    others = torch.tensor([0, 2])
    clean = Problem(
        given.q[others], given.cache, given.table[others], given.lengths[others], given.rank
    )
    assert_attends(found[others], clean)


def test_queries_may_be_a_transposed_view() -> None:
    given = problem([40, 70])
    heads_first = given.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert not heads_first.is_contiguous()
    seen = Problem(heads_first, given.cache, given.table, given.lengths, given.rank)
    assert torch.equal(seen.decode(), given.decode())


def test_k2s_dimensions() -> None:
    given = problem([70], heads=64, rank=512, rope=64)
    assert_attends(given.decode(splits=2), given)


def test_pages_beyond_two_to_the_31_elements_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 32-bit offsets the page would be looked for outside the cache. The cache is 4.4 GB of
    address space of which two pages are ever touched; nor may the interpreter copy it."""
    if INTERPRETED:
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    given = problem([70], rank=512, rope=64, heads=2)
    size = PAGE * 576
    cache = torch.empty(BIG // size + 8, PAGE, 576, dtype=torch.bfloat16, device=DEVICE)
    far = torch.tensor([[cache.shape[0] - 1, cache.shape[0] - 3, 0]], dtype=torch.int32)
    assert int(far[0, 1]) * size > BIG
    for place in range(2):
        cache[far[0, place]] = given.cache[given.table[0, place]].to(DEVICE)
    there = Problem(given.q, given.cache, far, given.lengths, given.rank)
    assert_attends(there.decode(cache), given)


@pytest.mark.soak
def test_the_last_position_of_the_longest_context_is_attended_to() -> None:
    """Half a minute: 4,096 tiles, all but the last of one page of zeros, and the last key so loud
    that the output is that key."""
    longest = 262_144
    table = torch.zeros(1, longest // PAGE, dtype=torch.int32)
    table[0, -1] = 1
    cache = torch.zeros(2, PAGE, 48).bfloat16()
    cache[1, -1] = 4.0
    given = Problem(torch.full((1, 1, 48), 4.0), cache, table, torch.tensor([longest]).int(), 32)
    found = mla.decode(
        *(t.to(DEVICE) for t in (given.q, cache, table, given.lengths)),
        scale=1.0,
        rank=32,
        splits=64,
        tiling=mla.Tiling(16, 64, 4, 1),
    )
    assert torch.equal(found.cpu(), torch.full((1, 1, 32), 4.0))


# -- FP8 latents -------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (32, 16), (192, 32)])
def test_fp8_keeps_each_value_to_half_a_step_and_the_rotated_key_whole(
    rank: int, rope: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp2(torch.randint(-12, 12, (40, 1), generator=generator))
    given = (torch.randn(40, rank + rope, generator=generator) * spread).bfloat16()
    given[3] = 0
    stored = latents.quantise_latents(given, rank=rank)
    assert stored.shape == (40, latents.token_bytes(rank, rope))
    found = latents.dequantise_latents(stored, rank=rank)
    assert torch.equal(found[:, rank:], given[:, rank:])
    # Half a step of a 4-bit significand, or of the subnormal codes: 2^-10 of the scale, which is
    # at most 2 / 448 of the group's largest.
    groups = latents.groups_of(rank)
    padded = torch.nn.functional.pad(given[:, :rank].double(), (0, groups * 128 - rank))
    largest = padded.unflatten(1, (groups, 128)).abs().amax(2, keepdim=True)
    least = (largest * 2 / 448 * 2.0**-10).expand(-1, -1, 128).flatten(1)[:, :rank]
    error = (found[:, :rank].double() - given[:, :rank].double()).abs()
    assert (error <= torch.maximum(given[:, :rank].double().abs() * 2.0**-4, least)).all()


def test_fp8_takes_the_bytes_that_the_planner_counts() -> None:
    config = KIMI_K2_THINKING
    counted = ModelSizes.from_config(config).latent_bytes("fp8") // config.num_hidden_layers
    assert latents.token_bytes(config.kv_lora_rank, config.qk_rope_head_dim) == counted == 656


def test_every_fp8_code_is_read_as_its_value() -> None:
    """All 254 codes that are numbers, each the value of one key that is all a head sees."""
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    rank, rope = 256, 16
    largest = torch.full((2,), 448.0)
    given = torch.cat((values, largest, torch.zeros(rope))).view(1, -1)
    stored = latents.quantise_latents(given, rank=rank)
    assert torch.equal(stored[0, : len(codes)], codes)  # scale 1 or the codes would differ
    cache = torch.zeros(1, PAGE, stored.shape[1], dtype=torch.uint8)
    cache[0, 0] = stored
    one = torch.ones(1, dtype=torch.int32)
    found = mla.decode(
        torch.zeros(1, 1, rank + rope, device=DEVICE),
        *(tensor.to(DEVICE) for tensor in (cache, torch.zeros(1, 1).int(), one)),
        scale=1.0,
        rank=rank,
        splits=1,
        tiling=mla.Tiling(16, 32, 4, 1),
    )
    assert torch.equal(found.cpu().flatten()[: len(codes)], values)


@pytest.mark.parametrize(("rank", "rope", "heads"), [(32, 16, 3), (512, 64, 20)])
def test_fp8_attention_is_exact_on_what_is_stored(rank: int, rope: int, heads: int) -> None:
    given = problem([1, 70], rank=rank, rope=rope, heads=heads)
    stored = latents.quantise_latents(given.cache, rank=rank)
    kept = latents.dequantise_latents(stored, rank=rank)
    assert_attends(given.decode(stored), given, kept)


def test_a_latent_that_is_no_number_makes_its_fp8_group_none_and_no_other() -> None:
    given = torch.ones(2, 256 + 16).bfloat16()
    given[0, 3], given[1, 200] = torch.nan, torch.inf
    found = latents.dequantise_latents(latents.quantise_latents(given, rank=256), rank=256)
    assert found[0, :128].isnan().all()
    assert found[1, 128:256].isnan().all()
    assert torch.equal(found[0, 128:], given[0, 128:])
    assert torch.equal(found[1, :128], given[1, :128])


# -- What a card would get ---------------------------------------------------------------------


def launch_k2(program_bytes: int = MOST_SHARED_BYTES) -> None:
    """K2's decoding with bf16 queries, with FP8 latents, and with fp32 queries."""
    table, lengths = torch.empty(1, 512, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    cache = torch.empty(4, PAGE, 576, dtype=torch.bfloat16)
    stored = torch.empty(4, PAGE, 656, dtype=torch.uint8)
    q = torch.empty(1, 64, 576, dtype=torch.bfloat16)
    for queries, kept in ((q, cache), (q, stored), (q.float(), cache)):
        tiling = mla.tiling_for(queries.dtype, kept.dtype, 64, program_bytes)
        mla.decode(queries, kept, table, lengths, scale=0.1, rank=512, splits=66, tiling=tiling)


def launch_k2_on_hopper() -> None:
    launch_k2(MOST_HOPPER_BYTES)


@pytest.mark.parametrize(
    ("launch", "cards", "most_bytes", "most_stack_bytes"),
    [
        (launch_k2, CARDS, MOST_SHARED_BYTES, MOST_STACK_BYTES),
        (launch_k2_on_hopper, (90,), MOST_HOPPER_BYTES, MOST_HOPPER_STACK_BYTES),
    ],
)
def test_the_kernels_compile_for_every_card_within_its_shared_memory(
    launch: Callable[[], None], cards: tuple[int, ...], most_bytes: int, most_stack_bytes: int
) -> None:
    found = compiled(__name__, launch.__name__, cards)
    assert {(kernel.kernel, kernel.card) for kernel in found} == {
        (name, card) for name in ("_attend", "_join") for card in cards
    }
    for kernel in found:
        assert kernel.shared_bytes <= most_bytes, kernel
        assert kernel.stack_bytes <= most_stack_bytes, kernel


def test_a_card_gets_the_tiling_that_has_room_there() -> None:
    hopper, hopper_fp8, everywhere, fp8, fp32 = mla.TILINGS
    for latents_dtype, large, small in (
        (torch.bfloat16, hopper, everywhere),
        (torch.uint8, hopper_fp8, fp8),
    ):
        given = torch.bfloat16, latents_dtype
        assert mla.tiling_for(*given, 64, MOST_HOPPER_BYTES) == large
        assert mla.tiling_for(*given, 64, MOST_SHARED_BYTES) == small
        assert mla.tiling_for(*given, 8, MOST_HOPPER_BYTES) == small
    assert mla.tiling_for(torch.float32, torch.bfloat16, 64, MOST_HOPPER_BYTES) == fp32


def test_splits_fill_a_card_and_never_vanish() -> None:
    hopper, hopper_fp8, everywhere, *_ = mla.TILINGS
    assert mla.splits_for(1, 64, 132, everywhere) == 66
    assert mla.splits_for(8, 64, 132, everywhere) == 8
    assert mla.splits_for(8, 64, 10, everywhere) == 1
    assert mla.splits_for(1, 64, 132, hopper_fp8) == 132
    assert mla.splits_for(1, 64, 132, hopper) == 66
    assert mla.splits_for(8, 64, 132, hopper) == 8

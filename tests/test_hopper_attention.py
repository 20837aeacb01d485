"""The attention kernel of Hopper cards: its PTX, its launches, and on such a card its numbers.

Without one, what would reach the driver is looked at; the numbers' tests skip.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridk2.config import KIMI_K2_THINKING, K2Config
from hybridk2.cuda_driver import CudaDriver
from hybridk2.device import CpuDevice, CudaDevice
from hybridk2.errors import DriverError
from hybridk2.model.loading import fp8_latents, paged_mix_for
from tests.faked_driver import INVALID_PTX, KERNEL, MAP_VALUE, FakedDriver
from tests.paged_attention import PAGE, PagedAttention, assert_attends

triton = pytest.importorskip("triton", reason="Triton is not installed")
attention = pytest.importorskip("hybridk2.model.hopper.attention")
mla = pytest.importorskip("hybridk2.model.triton.mla")

PTX = resources.files("hybridk2.model.hopper").joinpath("attention.ptx").read_text()
SOURCE = Path(__file__).resolve().parents[1] / "hybridk2" / "model" / "hopper" / "attention.cu"
ARGUMENTS = "6Qqfi"
ARGUMENT_BYTES = (len(MAP_VALUE), len(MAP_VALUE), struct.calcsize(ARGUMENTS))


# -- What is shipped ---------------------------------------------------------------------------


def test_the_ptx_belongs_to_the_source_beside_it() -> None:
    made_of = re.match(r"// By make ptx, from attention.cu with sha256 ([0-9a-f]{64})\n", PTX)
    assert made_of, PTX[:100]
    found = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    assert made_of[1] == found, "attention.cu has changed since attention.ptx was made: make ptx"


def test_the_kernel_assembles_for_hopper_without_spilling(tmp_path: Path) -> None:
    """168 registers are what 384 threads may have each."""
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    source = tmp_path / "attention.ptx"
    source.write_text(PTX)
    command = [assembler, "-arch=sm_90a", "-v", source, "-o", tmp_path / "attention.cubin"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert "0 bytes spill stores, 0 bytes spill loads" in said, said
    registers = re.search(r"Used (\d+) registers", said)
    assert registers, said
    assert int(registers[1]) <= 168, said


def test_old_drivers_take_the_ptx() -> None:
    assert re.findall(r"^\.version .*|^\.target .*", PTX, re.M) == [
        ".version 8.0",
        ".target sm_90a",
    ]


def kernel_constants() -> dict[str, int]:
    """The source's integers of the outermost level, by name."""
    values: dict[str, int] = {}
    for line in re.findall(r"^constexpr int ([^;]+);", SOURCE.read_text(), re.M):
        for definition in line.split(","):
            name, expression = definition.split("=")
            values[name.strip()] = eval(expression.replace("/", "//"), {}, values)
    return values


def test_launches_are_made_with_the_kernels_own_constants() -> None:
    kernel = kernel_constants()
    for name, ours in (
        ("kHeads", attention.HEADS),
        ("kRank", attention.RANK),
        ("kDim", attention.DIM),
        ("kPage", mla.PAGE_TOKENS),
        ("kKeys", attention.KEYS),
        ("kThreads", attention.THREADS),
        ("kMostShares", attention.MOST_SHARES),
        ("kSharedBytes", attention.SHARED_BYTES),
    ):
        assert kernel[name] == ours, name
    assert kernel.get("kCluster", 1) == attention.CLUSTER
    parameters = re.findall(r"\.param .*_param_\d\[(\d+)\]", PTX)
    assert tuple(map(int, parameters)) == ARGUMENT_BYTES


# -- What reaches the driver -------------------------------------------------------------------


class HopperHost(CpuDevice):
    """The host, taken for a Hopper card."""

    capability = (9, 0)
    has_kernels = True
    multiprocessors = 132
    program_bytes = 227 * 1024

    def stream(self) -> int:
        return 2**40 + 8


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> FakedDriver:
    made = FakedDriver(argument_bytes=ARGUMENT_BYTES)
    monkeypatch.setattr(CudaDriver, "load", lambda: CudaDriver(made))
    return made


def k2_inputs(rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    q = torch.zeros(rows, 64, 576, dtype=dtype)
    cache = torch.zeros(5, 2, PAGE, 576, dtype=torch.bfloat16)[:, 1]
    return q, cache, torch.zeros(rows, 7, dtype=torch.int32), torch.ones(rows, dtype=torch.int32)


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_a_launch_fills_the_card_once_and_takes_its_arguments_along(
    faked: FakedDriver, rows: int
) -> None:
    made = attention.HopperAttention(CudaDriver(faked), HopperHost(), scale=0.25)
    q, cache, table, lengths = k2_inputs(rows)
    found = made.decode(q, cache, table, lengths)
    assert (found.shape, found.dtype) == ((rows, 64, 512), torch.float32)
    (launch,) = faked.launches
    shares = {1: 132, 2: 66, 3: 44, 8: 16}[rows]
    assert (launch.kernel, launch.grid, launch.block) == (KERNEL, (shares, rows, 1), (384, 1, 1))
    assert launch.shared_bytes == attention.SHARED_BYTES
    assert faked.function_attributes == [(KERNEL, 8, attention.SHARED_BYTES)]
    assert launch.stream == 2**40 + 8
    assert set(launch.attributes) == {2, 6} | ({4} if attention.CLUSTER > 1 else set())
    *maps, arguments = launch.arguments
    assert maps == [MAP_VALUE, MAP_VALUE]
    *pointers, table_stride, scale, last = struct.unpack(ARGUMENTS, arguments)
    page_table, length, means, stats, counters, out = pointers
    assert (page_table, length) == (table.data_ptr(), lengths.data_ptr())
    assert out == found.data_ptr()
    assert 0 not in (means, stats, counters)
    assert table_stride == 7
    assert scale == pytest.approx(0.25 * 1.4426950408889634, rel=1e-7)
    assert last == shares


def test_tiles_and_queries_are_cut_from_where_they_lie(faked: FakedDriver) -> None:
    made = attention.HopperAttention(CudaDriver(faked), HopperHost(), scale=1.0)
    _, cache, table, lengths = k2_inputs(3)
    q = torch.zeros(3, 70, 584).bfloat16()[:, 2:66, :576]
    made.decode(q, cache, table, lengths)
    tiles, queries = faked.maps
    assert tiles.address == cache.data_ptr()
    assert (tiles.sizes, tiles.box) == ((64, 64, 9, 5), (64, 32, 9, 1))
    assert tiles.strides == (1152, 128, 2 * PAGE * 576 * 2)
    assert queries.address == q.data_ptr()
    assert (queries.sizes, queries.box) == ((64, 64, 9, 3), (64, 64, 9, 1))
    assert queries.strides == (584 * 2, 128, 70 * 584 * 2)


def test_all_launches_count_in_the_same_memory_which_begins_with_zeros(faked: FakedDriver) -> None:
    made = attention.HopperAttention(CudaDriver(faked), HopperHost(), scale=1.0)
    for rows in (1, 8, 1):
        made.decode(*k2_inputs(rows))
    places = {
        struct.unpack(ARGUMENTS, launch.arguments[2])[4]: launch.grid for launch in faked.launches
    }
    assert set(places) == {made._counters.data_ptr()}
    assert (made._counters.nbytes, int(made._counters.count_nonzero())) == (36 * 8, 0)
    assert [launch.grid for launch in faked.launches] == [(132, 1, 1), (16, 8, 1), (132, 1, 1)]


@pytest.mark.parametrize("rows", range(1, 9))
def test_what_a_launch_leaves_between_its_programs_is_what_it_says(
    faked: FakedDriver, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    made = attention.HopperAttention(CudaDriver(faked), HopperHost(), scale=1.0)
    q, cache, table, lengths = k2_inputs(rows)
    taken = []
    new_empty = Tensor.new_empty

    def counted(*arguments: Any, **options: Any) -> Tensor:
        tensor = new_empty(*arguments, **options)
        taken.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(Tensor, "new_empty", counted)
    out = made.decode(q, cache, table, lengths)
    assert sum(taken) - out.nbytes <= 8.72e6


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("q", lambda q, cache: (q[:, :32], cache)),
        ("9 rows", lambda q, cache: (torch.zeros(9, 64, 576).bfloat16(), cache)),
        ("strides", lambda q, cache: (torch.zeros(1, 64, 580).bfloat16()[:, :, :576], cache)),
        ("q at", lambda q, cache: (torch.zeros(64 * 576 + 1).bfloat16()[1:].view(q.shape), cache)),
        ("q: torch.float32", lambda q, cache: (q.float(), cache)),
    ],
)
def test_what_the_kernel_would_misread_is_refused(
    faked: FakedDriver, name: str, wrong: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    made = attention.HopperAttention(CudaDriver(faked), HopperHost(), scale=1.0)
    q, cache, table, lengths = k2_inputs(1)
    q, cache = wrong(q, cache)
    table, lengths = table.expand(len(q), -1), lengths.repeat(len(q))
    with pytest.raises(AssertionError, match=name):
        made.decode(q, cache, table, lengths)
    assert not faked.launches


# -- Who computes ------------------------------------------------------------------------------


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The queries that Triton's kernel was given."""
    calls: list[Any] = []

    def decode(q: Tensor, *_: Any, **__: Any) -> Tensor:
        calls.append(q)
        return q.new_zeros(*q.shape[:2], 512)

    monkeypatch.setattr(mla, "decode", decode)
    return calls


def test_bf16_is_attended_to_by_this_kernel_and_everything_else_by_triton(
    faked: FakedDriver, by_triton: list[Any]
) -> None:
    mix = paged_mix_for(KIMI_K2_THINKING, HopperHost())
    assert mix is not None
    q, cache, table, lengths = k2_inputs(2)
    mix(q, cache, table, lengths)
    assert (len(faked.launches), len(by_triton)) == (1, 0)
    scale = struct.unpack(ARGUMENTS, faked.launches[0].arguments[2])[7]
    assert scale == pytest.approx(KIMI_K2_THINKING.softmax_scale * 1.4426950408889634, rel=1e-7)
    stored = fp8_latents(KIMI_K2_THINKING).encode(cache)
    mix(q, stored, table, lengths)
    mix(q.float(), cache, table, lengths)
    mix(*k2_inputs(9))
    assert (len(faked.launches), len(by_triton)) == (1, 3)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_cards_keep_tritons_kernel(
    faked: FakedDriver,
    by_triton: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
) -> None:
    monkeypatch.setattr(HopperHost, "capability", capability)
    assert_left_to_triton(KIMI_K2_THINKING, faked, by_triton)


@pytest.mark.parametrize(
    "other", [{"num_attention_heads": 32}, {"kv_lora_rank": 256}, {"qk_rope_head_dim": 32}]
)
def test_other_dimensions_keep_tritons_kernel(
    faked: FakedDriver, by_triton: list[Any], other: dict[str, int]
) -> None:
    assert_left_to_triton(dataclasses.replace(KIMI_K2_THINKING, **other), faked, by_triton)


def assert_left_to_triton(config: K2Config, faked: FakedDriver, by_triton: list[Any]) -> None:
    mix = paged_mix_for(config, HopperHost())
    assert mix is not None
    mix(*k2_inputs(1))
    assert len(by_triton) == 1
    assert not faked.images


def test_a_kernel_that_the_driver_refuses_is_replaced_with_a_warning(
    faked: FakedDriver, by_triton: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    faked.refusals["cuModuleLoadDataEx"] = INVALID_PTX
    faked.jit_log = b"unknown instruction"
    mix = paged_mix_for(KIMI_K2_THINKING, HopperHost())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    said = record.getMessage()
    assert said.startswith("attention of decoding by Triton's kernel, which is slower: cuModule")
    assert said.endswith("CUDA_ERROR_INVALID_PTX (218): unknown instruction")
    assert mix is not None
    mix(*k2_inputs(1))
    assert len(by_triton) == 1


def test_a_driver_without_the_calls_is_no_obstacle(
    by_triton: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load() -> CudaDriver:
        raise DriverError("no such call")

    monkeypatch.setattr(CudaDriver, "load", load)
    mix = paged_mix_for(KIMI_K2_THINKING, HopperHost())
    assert [record.getMessage() for record in caplog.records] == [
        "attention of decoding by Triton's kernel, which is slower: no such call"
    ]
    assert mix is not None
    mix(*k2_inputs(1))
    assert len(by_triton) == 1


# -- What a card computes ----------------------------------------------------------------------


def obstacle() -> str | None:
    if not torch.cuda.is_available():
        return "there is no card here"
    found = torch.cuda.get_device_capability()
    return None if found == (9, 0) else f"the card has compute capability {found}"


on_a_card = pytest.mark.skipif(obstacle() is not None, reason=f"needs a Hopper card: {obstacle()}")


class Bench:
    """The kernel on the card, with scale 1."""

    def __init__(self) -> None:
        self.device = CudaDevice()
        self.at = self.device.torch_device
        self.attention = attention.HopperAttention(CudaDriver.load(), self.device, 1.0)

    def decode(self, given: PagedAttention) -> Tensor:
        """given: on the card."""
        assert given.scale == 1.0
        return self.attention.decode(given.q, given.cache, given.table, given.lengths)

    def assert_right(self, given: PagedAttention, found: Tensor | None = None) -> None:
        """A share's mean is rounded to fp16, relatively by 2^-11, or 2^-25 where that has subnormal
        numbers. A sum goes through the keys of a share, then through the shares."""
        rows = len(given.q)
        shares = attention.shares_for(rows, self.device.multiprocessors)
        most = -(-int(given.lengths.max()) // (attention.KEYS * shares)) * attention.KEYS
        assert_attends(
            self.decode(given) if found is None else found,
            given,
            additions=most + attention.KEYS + shares,
            relative_rounding=2.0**-11,
            absolute_rounding=2.0**-25,
        )


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    yield Bench()
    torch.cuda.empty_cache()


def on_card(bench: Bench, lengths: list[int]) -> PagedAttention:
    """Scores of order 1. What the table says behind a row's pages is no page at all."""
    made = PagedAttention.random(lengths, heads=64, rank=512, rope=64)
    for row, length in enumerate(lengths):
        made.table[row, -(-length // PAGE) :] = 2**30
    small = dataclasses.replace(made, q=made.q / 16, scale=1.0)
    return small.to(bench.at)


LENGTHS = [0, 1, 31, 32, 33, 63, 64, 65, 4097, 262_144]


@on_a_card
@pytest.mark.parametrize("length", LENGTHS)
def test_a_row_of_any_length_is_attended_to(bench: Bench, length: int) -> None:
    bench.assert_right(on_card(bench, [length]))


@on_a_card
@pytest.mark.parametrize(
    "lengths",
    [
        [130, 0],
        [4097, 1, 64, 33],
        [0, 1, 31, 32, 33, 63, 64, 65],
        [65, 262_144, 4097, 0, 32, 1, 5000, 63],
    ],
)
def test_rows_of_mixed_lengths_are_attended_to(bench: Bench, lengths: list[int]) -> None:
    bench.assert_right(on_card(bench, lengths))


def rising_to(top: float) -> Callable[[int], Tensor]:
    return lambda length: torch.linspace(-top, top, length)


def one_late(length: int) -> Tensor:
    scores = torch.full((length,), -3.0)
    scores[length - 2] = 300.0
    return scores


@on_a_card
@pytest.mark.parametrize(
    "scores_of",
    [
        pytest.param(one_late, id="one that outweighs all, late"),
        pytest.param(lambda length: one_late(length).flip(0), id="one that outweighs all, early"),
        pytest.param(lambda length: torch.full((length,), 5.0), id="all equal"),
        pytest.param(lambda length: torch.full((length,), -2000.0), id="all next to nothing"),
        pytest.param(rising_to(2000.0), id="steeply rising"),
        pytest.param(lambda length: rising_to(2000.0)(length).flip(0), id="steeply falling"),
        pytest.param(rising_to(2.7), id="rising by less than makes weights be counted anew"),
        pytest.param(rising_to(30.0), id="rising slowly, by more"),
        pytest.param(lambda length: torch.arange(length) % 300 / 5, id="rising again and again"),
    ],
)
@pytest.mark.parametrize("lengths", [[40], [4097], [40_000], [9000, 70, 33, 2000]])
def test_weights_of_every_kind_are_right(
    bench: Bench, lengths: list[int], scores_of: Callable[[int], Tensor]
) -> None:
    """A query is one number, in the column that keys' scores are in, so that scores are exact but
    for one rounding. Heads have them by 1/2, 1 or 2, so neighbours' weights grow at other keys."""
    given = on_card(bench, lengths)
    given.q.zero_()
    given.q[:, :, 512] = torch.tensor([0.5, 1.0, 2.0], device=bench.at).repeat(22)[:64]
    for row, length in enumerate(lengths):
        tokens = torch.arange(length, device=bench.at)
        place = given.table[row, tokens // PAGE].long(), tokens % PAGE
        given.cache[(*place, torch.full_like(tokens, 512))] = (
            scores_of(length).bfloat16().to(bench.at)
        )
    bench.assert_right(given)


@on_a_card
def test_queries_in_another_order_and_pages_that_lie_apart_are_read_as_they_lie(
    bench: Bench,
) -> None:
    given = on_card(bench, [70, 4097])
    wanted = bench.decode(given)
    apart = torch.full((len(given.cache), 3, PAGE, 576), torch.nan, device=bench.at).bfloat16()
    apart[:, 1] = given.cache
    heads_first = given.q.transpose(0, 1).contiguous().transpose(0, 1)
    seen = dataclasses.replace(given, q=heads_first, cache=apart[:, 1])
    assert torch.equal(bench.decode(seen), wanted)


@on_a_card
def test_hopper_finds_pages_beyond_two_to_the_31_elements(bench: Bench) -> None:
    given = on_card(bench, [70])
    pages = 2**31 // (PAGE * 576) + 8
    cache = torch.empty(pages, PAGE, 576, dtype=torch.bfloat16, device=bench.at)
    far = torch.tensor([[pages - 1, pages - 3]], dtype=torch.int32, device=bench.at)
    cache[far[0].long()] = given.cache[given.table[0, :2].long()]
    seen = dataclasses.replace(given, cache=cache, table=far)
    assert torch.equal(bench.decode(seen), bench.decode(given))


@on_a_card
def test_on_hopper_one_rows_nan_stays_its_own(bench: Bench) -> None:
    given = on_card(bench, [65, 4097, 65])
    clean = bench.decode(given)
    given.cache[given.table[1, 40].long(), 0, 5] = torch.nan
    found = bench.decode(given)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


@on_a_card
def test_a_rows_bits_do_not_depend_on_what_the_others_read(bench: Bench) -> None:
    """Of as many rows: a row's place among them, and what they are, changes nothing."""
    given = on_card(bench, [4097, 65, 0, 300])
    wanted = bench.decode(given)
    order = torch.tensor([2, 0, 3, 1], device=bench.at)
    moved = dataclasses.replace(
        given, q=given.q[order], table=given.table[order], lengths=given.lengths[order]
    )
    assert torch.equal(bench.decode(moved), wanted[order])
    given.lengths[1:] = torch.tensor([1, 0, 33], dtype=torch.int32, device=bench.at)
    assert torch.equal(bench.decode(given)[0], wanted[0])


@on_a_card
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_a_recorded_step_gives_the_same_bits_at_every_length_a_hundred_times(
    bench: Bench, rows: int
) -> None:
    lengths = [4097, 1, 64, 33, 5000, 0, 300, 65][:rows]
    given = on_card(bench, lengths)
    others = [[length * share // 4 for length in lengths] for share in (4, 3, 1, 0, 2)]
    choices = [torch.tensor(some, dtype=torch.int32, device=bench.at) for some in others]
    wanted = []
    for choice in choices:
        given.lengths.copy_(choice)
        wanted.append(bench.decode(given))
        assert torch.equal(bench.decode(given), wanted[-1])
    found = torch.empty_like(wanted[0])

    def step() -> None:
        # Twice, and behind each other's kernels: a launch may begin before what it is behind ends.
        found.copy_(bench.decode(given))
        found.copy_(bench.decode(given))

    replay = bench.device.record(step)
    for number in range(100):
        given.lengths.copy_(choices[number % len(choices)])
        replay()
        assert torch.equal(found, wanted[number % len(choices)]), f"replay {number}"


@on_a_card
def test_launches_of_other_rows_in_between_change_nothing(bench: Bench) -> None:
    """Each number of rows has counters of its own. Nothing is waited for until the end."""
    problems = [on_card(bench, [700 + row for row in range(rows)]) for rows in range(1, 9)]
    wanted = [bench.decode(given) for given in problems]
    found = [[bench.decode(given) for given in problems] for _ in range(50)]
    for turn in found:
        for given, one, other in zip(problems, turn, wanted, strict=True):
            assert torch.equal(one, other), f"{len(given.q)} rows"

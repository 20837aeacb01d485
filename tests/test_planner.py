"""Plans: the published sizes, the tables of the notes on GPUs, the settings that fit, and sums."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hybridk2.checkpoint import Checkpoint, describe_folder
from hybridk2.config import KIMI_K2_THINKING, DenseDtype, KvDtype
from hybridk2.errors import CheckpointError
from hybridk2.hardware import gpu_named
from hybridk2.planner import BUILT_IN, Choices, ModelSizes, Plan, plan
from hybridk2.synthesis import synthesize, synthetic_config
from tests.described_machine import WORKSTATION

K2 = ModelSizes.from_config(KIMI_K2_THINKING)
K = 1024


def with_card(
    name: str, kv_dtype: KvDtype = "bf16", dense: DenseDtype = "bf16", context: int = 32 * K
) -> Plan:
    machine = replace(WORKSTATION, gpu=gpu_named(name))
    return plan(K2, machine, Choices(context, kv_dtype, dense))


def test_k2_thinking_has_the_bytes_of_its_published_files() -> None:
    """Figures of facts.md, computed from the published tensors."""
    assert K2.expert_bytes == 24_772_608
    assert K2.routed_bytes == 60 * 384 * 24_772_608
    assert K2.latent_bytes("bf16") == 70_272
    everything = K2.routed_bytes + K2.layer_bytes + K2.head_bytes + K2.embedding_bytes
    # The files have weight_shape besides: two int32 for each matrix.
    assert everything + 60 * 384 * 3 * 8 == 594_205_904_896
    per_token = 60 * 8 * K2.expert_bytes
    assert per_token == pytest.approx(11.89e9, rel=1e-3)
    assert K2.layer_bytes + K2.head_bytes == pytest.approx(21.10e9, rel=1e-3)
    assert list(BUILT_IN.values()) == [KIMI_K2_THINKING]


# GB left for resident experts, and how many of them per layer. None: it does not fit.
MEMORY_FIT: list[tuple[str, DenseDtype, list[tuple[float, int] | None]]] = [
    ("RTX 4090", "bf16", [(0.5, 0), None, None, None]),
    ("RTX 4090", "int8", [(10.2, 6), (3.3, 2), (7.2, 4), (2.0, 1)]),
    ("RTX 5090", "bf16", [(8.9, 5), (2.0, 1), (6.0, 4), (0.7, 0)]),
    ("RTX 5090", "int8", [(18.6, 12), (11.7, 7), (15.7, 10), (10.4, 7)]),
    ("RTX 6000 Ada", "bf16", [(26.2, 17), (19.3, 13), (23.3, 15), (18.0, 12)]),
    ("RTX PRO 6000", "bf16", [(77.3, 52), (70.4, 47), (74.4, 50), (69.2, 46)]),
]
COLUMNS: list[tuple[int, KvDtype]] = [
    (32 * K, "bf16"),
    (128 * K, "bf16"),
    (128 * K, "fp8"),
    (256 * K, "fp8"),
]


@pytest.mark.parametrize(("card", "dense", "cells"), MEMORY_FIT)
def test_the_memory_fit_table_of_24_32_48_and_96_gb_is_reproduced(
    card: str, dense: DenseDtype, cells: list[tuple[float, int] | None]
) -> None:
    for (context, kv_dtype), cell in zip(COLUMNS, cells, strict=True):
        made = with_card(card, kv_dtype, dense, context)
        assert made.fits == (cell is not None), (context, kv_dtype)
        if cell is None:
            assert made.nearest
            continue
        gigabytes, experts = cell
        assert made.free_gpu_bytes is not None
        # Within 3%, and the 0.05 that the table's rounding may hide.
        expected = pytest.approx(gigabytes, rel=0.03, abs=0.05)
        assert made.free_gpu_bytes / 1e9 == expected, (context, kv_dtype)
        # The table has whole experts of each layer. A card takes single ones, so layers may differ
        # by one: 19.3 GB are 779, 13 in every layer but one, and the table's 13 is 0.13% more.
        mean = made.resident_experts / K2.moe_layers
        assert 0.97 * experts <= mean < experts + 1, (context, kv_dtype)


# Tokens per second without and with overlap, 8K of context, nothing resident.
DECODE_TABLE = [
    (100, {"RTX 4090": (6.7, 7.0), "RTX 5090": (7.3, 7.5), "H200": (7.8, 7.9)}),
    (200, {"RTX 4090": (11.2, 12.1), "RTX 5090": (12.8, 13.4), "H200": (14.5, 14.8)}),
    (300, {"RTX 4090": (14.4, 15.9), "RTX 5090": (17.2, 18.3), "H200": (20.3, 20.9)}),
    (400, {"RTX 4090": (16.9, 18.8), "RTX 5090": (20.7, 22.3), "H200": (25.4, 26.3)}),
    (600, {"RTX 4090": (20.2, 23.1), "RTX 5090": (26.1, 28.7), "H200": (34.0, 35.6)}),
]


@pytest.mark.parametrize(("gigabytes", "cards"), DECODE_TABLE)
def test_the_decode_table_is_reproduced(
    gigabytes: int, cards: dict[str, tuple[float, float]]
) -> None:
    for name, (serial, overlapped) in cards.items():
        # Of a card that has no room for experts, as the table has it.
        card = replace(gpu_named(name), memory_bytes=235 * 10**8)
        machine = replace(WORKSTATION, host_read_bytes_per_second=gigabytes * 1e9, gpu=card)
        made = plan(K2, machine, Choices(8 * K))
        assert made.resident_experts == 0
        # The table's last digit is worth up to 0.7%.
        assert made.decode_tokens_per_second == pytest.approx(overlapped, rel=0.01)
        alone = made.decode.seconds + made.decode.overlapped_seconds
        assert 1 / alone == pytest.approx(serial, rel=0.01)


@pytest.mark.parametrize(("context", "ran"), [(8 * K, (7.24, 7.31)), (32 * K, (7.07, 7.08))])
def test_a_card_that_was_measured_is_planned_as_it_ran(
    context: int, ran: tuple[float, float]
) -> None:
    """bench/results/gpu-session-2026-11-25-09e99dc.txt: no expert on the card, both crossings."""
    host_seconds = 0.124  # 119 to 129 ms
    card = replace(
        gpu_named("H100"),
        memory_bytes=235 * 10**8,  # no room for experts
        bytes_per_second=2.99e12,
        handoff_seconds=16.4e-6,
        measured=True,
    )
    speed = 60 * 8 * K2.expert_bytes / host_seconds
    machine = replace(WORKSTATION, host_read_bytes_per_second=speed, gpu=card)
    made = plan(K2, machine, Choices(context))
    assert made.resident_experts == 0
    for tokens_per_second in ran:
        assert made.decode_tokens_per_second == pytest.approx(tokens_per_second, rel=0.15)


def test_experts_on_the_card_are_not_also_in_host_memory() -> None:
    made = with_card("RTX PRO 6000")
    card, host = (dict(place.contents) for place in made.places)
    assert made.free_gpu_bytes is not None
    assert 0 <= made.free_gpu_bytes - card["routed experts"] < K2.expert_bytes
    assert made.resident_experts_per_layer == 52
    assert card["routed experts"] == made.resident_experts * K2.expert_bytes
    assert card["routed experts"] + host["routed experts"] == K2.routed_bytes


@pytest.mark.parametrize(
    ("ram", "card"),
    [(512, None), (598, None), (512, "RTX 4090"), (560, "RTX 4090"), (560, "RTX 5090")],
)
@pytest.mark.parametrize("context", [32 * K, 256 * K])
def test_every_nearest_setting_fits(ram: int, card: str | None, context: int) -> None:
    """Each is tried as the command line would: a setting that mends one place is not made to mend
    the other."""
    gpu = gpu_named(card) if card else None
    machine = replace(WORKSTATION, ram_bytes=ram * 10**9, gpu=gpu)
    made = plan(K2, machine, Choices(context))
    assert not made.fits
    assert made.nearest
    failing = {place.name for place in made.places if place.shortfall_bytes}
    mended: set[str] = set()
    for nearest in made.nearest:
        words = nearest.options.replace('"', "").split("--")[1:]
        options = {word.split(maxsplit=1)[0]: word.split(maxsplit=1)[1].strip() for word in words}
        again = plan(
            K2,
            replace(
                machine,
                ram_bytes=int(options.get("ram", ram)) * 10**9,
                gpu=gpu_named(options["gpu"]) if "gpu" in options else gpu,
            ),
            Choices(
                int(options.get("context", context)),
                options.get("kv-dtype", "bf16"),  # type: ignore[arg-type]
                options.get("dense", "bf16"),  # type: ignore[arg-type]
            ),
        )
        short = {place.name for place in again.places if place.shortfall_bytes}
        assert nearest.place in failing
        assert nearest.place not in short, f"{nearest.options} mends nothing"
        mended.add(nearest.place)
    assert mended == failing


def test_a_token_on_the_cpu_takes_its_bytes_over_their_speeds_and_the_layers_overhead() -> None:
    made = plan(K2, WORKSTATION, Choices(decode_context_tokens=1000))
    routers = 2 * K2.router_bytes  # fp32 in memory
    expected = (
        (60 * 8 * K2.expert_bytes + K2.shared_bytes + routers) / 190e9
        + K2.attention_bytes / 150e9
        + 1000 * 70_272 / 50e9
        + K2.dense_mlp_bytes / 180e9
        + K2.head_bytes / 120e9
        + 61 * 1e-4
    )
    assert made.decode_tokens_per_second == pytest.approx(1 / expected)
    assert made.limit == "host memory bandwidth"
    waits = {part.name: part.resource for part in made.decode.parts}
    assert waits["attention's weights"] == "host memory bandwidth"
    # 50 of 210 GB/s: whatever it waits for, it is not the memory.
    assert waits["attention over the context"] == "host arithmetic"
    slow = replace(WORKSTATION, layer_overhead_seconds=1.0)
    assert plan(K2, slow, Choices()).limit == "overhead of operators"


def test_streaming_experts_bounds_long_prompts_as_the_notes_say() -> None:
    """About 700 tok/s on PCIe 4 and 1,400 on PCIe 5 in chunks of 16K; short prompts stay on the
    host, which computes them faster than the bus brings the experts."""
    for card, speed, limit in (
        ("RTX 4090", 700, "bus bandwidth"),
        ("RTX 5090", 1400, "GPU arithmetic"),  # with attention, just above the bus
    ):
        made = with_card(card)
        assert made.prefill_tokens_per_second(16 * K) == pytest.approx(speed, rel=0.1)
        assert made.prefill(16 * K).limit == limit
        assert made.prefill(64).limit.startswith("host")


def test_longer_prompts_read_each_expert_for_more_tokens_until_arithmetic_limits() -> None:
    made = plan(K2, WORKSTATION, Choices())
    speeds = [made.prefill_tokens_per_second(tokens) for tokens in (1, 8, 64, 512)]
    assert speeds == sorted(speeds)
    assert made.prefill(8).limit == "host memory bandwidth"


def test_a_plan_is_plain_json() -> None:
    for made in (plan(K2, WORKSTATION, Choices()), with_card("RTX 4090", context=256 * K)):
        values = json.loads(json.dumps(made.as_dict(), allow_nan=False))
        assert values["fits"] == made.fits
        assert values["decode_tokens_per_second"] == made.decode_tokens_per_second


# -- From folders ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "tiny"
    synthesize(folder, synthetic_config("tiny"), seed=0)
    return folder


def copy_without_shards(folder: Path, to: Path) -> Path:
    for path in folder.glob("*.json"):
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_sizes_from_the_index_alone_are_those_of_the_whole_checkpoint(
    tiny: Path, tmp_path: Path
) -> None:
    sizes = ModelSizes.from_checkpoint(tiny)
    with Checkpoint.open(tiny) as checkpoint:
        assert sizes.routed_bytes == checkpoint.expert_bytes
        dense = sizes.layer_bytes + sizes.embedding_bytes + sizes.head_bytes
        assert dense == checkpoint.dense_bytes
    bare = copy_without_shards(tiny, tmp_path)
    assert ModelSizes.from_checkpoint(bare) == sizes
    description = describe_folder(bare)
    assert (description.shards, len(description.missing_shards)) == (4, 4)
    (bare / "model.safetensors.index.json").unlink()
    assert describe_folder(bare).shards == 0
    assert ModelSizes.from_checkpoint(bare) == sizes


def test_an_index_of_another_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    bare = copy_without_shards(tiny, tmp_path)
    path = bare / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    shard = index["weight_map"].pop(name)
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="are not listed"):
        describe_folder(bare)
    index["weight_map"] |= {name: shard, "model.unknown.weight": shard}
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="implies no such tensor"):
        describe_folder(bare)

"""The GPU session's own logic, on a model of a few rows and a card that is the host.

What it measures there means nothing; that every part runs, and notices what is wrong, does.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridk2.config import K2Config
from hybridk2.experts import panels
from hybridk2.experts.host import HostExperts
from hybridk2.experts.router import ThreadRouter
from hybridk2.experts.stream import ExpertStream
from hybridk2.model.loading import paged_mix_for
from hybridk2.synthesis import synthetic_config

from .faked_device import FakedDevice, WaitingRouter
from .triton_kernels import INTERPRETED

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from gpu import crossing, kernels, shaped_model, table, whole_model  # noqa: E402

REAL_LAYERS = 2


class Card(FakedDevice):
    """The host with a fake stream and the card's kernels, interpreted. Nothing is recorded: what
    torch computes is done at once."""

    decode_rows = (1, 2, 4, 8)
    has_kernels = True
    multiprocessors = 2
    replays_steps = False


@pytest.fixture(scope="module")
def config() -> K2Config:
    return dataclasses.replace(synthetic_config("tiny"), num_hidden_layers=6)


@pytest.fixture(scope="module")
def experts(config: K2Config) -> Iterator[HostExperts]:
    with shaped_model.random_experts(config, REAL_LAYERS, threads=2) as made:
        yield made


@pytest.fixture
def card() -> Card:
    return Card()


def whole(config: K2Config, experts: HostExperts, card: Card, mix: Any) -> Any:
    return whole_model.WholeModel.build(config, card, experts, REAL_LAYERS, mix, 4096)


def open_router(config: K2Config, experts: HostExperts, card: Card, kind: type, **more: Any) -> Any:
    return kind(
        experts,
        card,
        card.fake_stream,
        top_k=config.num_experts_per_tok,
        dtype=torch.bfloat16,
        **more,
    )


def verdicts(found: Any) -> dict[str, bool]:
    return {row.what: row.passed for row in found.rows if row.passed is not None}


def test_aliased_layers_read_other_experts_of_the_real_ones(config: K2Config) -> None:
    alias = shaped_model.Alias(REAL_LAYERS, config.n_routed_experts)
    ids = torch.tensor([[0, 3, -1]], dtype=torch.int32)
    seen = {(alias.slot(slot), *alias.expert_ids(slot, ids)[0].tolist()) for slot in range(5)}
    assert len(seen) == 5, "no two layers read the same"
    assert all(picks[-1] == -1 for picks in seen)
    assert all(0 <= pick < config.n_routed_experts for picks in seen for pick in picks[1:-1])


def test_mechanisms_give_equal_logits_and_a_wrong_one_is_noticed(
    config: K2Config, experts: HostExperts, card: Card
) -> None:
    model = whole(config, experts, card, None)
    waiting = ThreadRouter(experts, card)
    router = open_router(config, experts, card, WaitingRouter, submissions=config.num_moe_layers)
    found = table.Table()
    whole_model.check_equal(found, model, waiting, [router])
    assert set(verdicts(found).values()) == {True}
    router.close()

    class Wrong(ThreadRouter):
        def submit(self, slot: int, x: Any, expert_ids: Any, weights: Any) -> Any:
            return super().submit(slot, x, expert_ids, weights * 3)

    found = table.Table()
    whole_model.check_equal(found, model, waiting, [Wrong(experts, card)])
    assert set(verdicts(found).values()) == {False}


def test_handoffs_lost_servers_and_the_bus_are_measured(
    config: K2Config, experts: HostExperts, card: Card
) -> None:
    found = table.Table()
    opened = partial(open_router, config, experts, card)
    crossing.measure_handoffs(found, card, config, opened, [WaitingRouter])
    crossing.check_lost_server(found, card, experts, opened, WaitingRouter)
    stream = ExpertStream(experts, card, 4)
    crossing.measure_bus(found, card, stream, experts, range(config.n_routed_experts))
    names = verdicts(found)
    assert names["mailbox: an answer that never comes is an error"]
    assert names["mailbox: it comes within"]
    assert all(row.value > 0 for row in found.rows)


def test_decode_prefill_and_overlap_are_measured(
    config: K2Config, experts: HostExperts, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_model, "_BALANCED", 0.0)
    model = whole(config, experts, card, None)
    router = ThreadRouter(experts, card)
    found = table.Table()
    whole_model.measure_decode(found, model, router, [130])
    whole_model.measure_prefill(found, model, router, [70])
    stream = ExpertStream(experts, card, 4)
    packed = torch.stack([panel.clone() for _, panel in stream.panels(0, range(4))])
    whole_model.measure_overlap(found, model, router, packed, panels.resident_experts)
    assert all(row.value == row.value for row in found.rows)
    assert [row.unit for row in found.rows if "prefill" in row.what] == ["tok/s"]


def test_kernels_are_held_to_their_references(
    config: K2Config, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Interpreted kernels are too slow to be run in a row.
    monkeypatch.setattr(kernels, "seconds_in_a_row", lambda device, run: 1.0)
    monkeypatch.setattr(kernels, "CHECKED_CONTEXT", 64)
    mix = paged_mix_for(config, card)
    assert mix is not None
    found = table.Table()
    kernels.measure_attention(found, card, config, mix, 1e12, contexts=(128,))
    assert verdicts(found) == {
        "attention, bf16 latents, 1 x 128 tokens: error": True,
        "attention, bf16 latents, 8 x 64 tokens: error": True,
        "attention, fp8 latents, 1 x 128 tokens: error": True,
        "attention, fp8 latents, 8 x 64 tokens: error": True,
    }
    beside = [row.value for row in found.rows if "a copy of as many bytes" in row.what]
    assert beside == [1.0] * 4
    found = table.Table()
    kernels.measure_attention(
        found, card, config, lambda *call: 0.5 * mix(*call), 1e12, contexts=(128,)
    )
    assert set(verdicts(found).values()) == {False}


def test_the_copy_beside_attention_moves_half_of_what_a_turn_reads(
    config: K2Config, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    def three_turns(_: Any, run: Any) -> float:
        for number in range(3):
            run(number)
        return 0.25

    monkeypatch.setattr(kernels, "seconds_in_a_row", three_turns)
    given = kernels.attention_inputs(config, card, 1, 128, None, 3 * 128)
    first, second = given.pages.clone().view(3, 2, -1).unbind(1)
    assert not torch.equal(first, second)
    assert kernels.copy_seconds(card, given) == 0.25
    assert torch.equal(given.pages.view(3, 2, -1), torch.stack((first, first), dim=1))


@pytest.mark.parametrize(
    ("seconds", "rows"), [(1e-3, [20]), (1e-4, [20, 200]), (3e-5, [20, 667]), (1e-9, [20, 1000])]
)
def test_short_runs_are_timed_in_rows_beside_which_waiting_does_not_show(
    card: Card, monkeypatch: pytest.MonkeyPatch, seconds: float, rows: list[int]
) -> None:
    asked = []

    def row(_: Any, run: Any, times: int) -> float:
        asked.append(times)
        return seconds

    monkeypatch.setattr(table, "_row", row)
    assert table.seconds_in_a_row(card, lambda number: None) == seconds
    assert asked == rows


def test_a_part_that_fails_is_a_failed_row_and_not_the_end() -> None:
    found = table.Table()

    def failing() -> None:
        raise ZeroDivisionError("what was wrong")

    found.attempt("a part", failing)
    found.at_least("another", 1.0, "", 0.5)
    assert [row.what for row in found.failed] == ["a part: ZeroDivisionError: what was wrong"]


def test_without_a_gpu_the_session_says_so_and_exits_with_2() -> None:
    if not INTERPRETED or torch.cuda.is_available():
        pytest.skip("there is a GPU here: run bench/gpu_session.py itself")
    command = [sys.executable, "bench/gpu_session.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout.startswith("no GPU session here: device cuda: ")

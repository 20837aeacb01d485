"""An engine put together for a card answers as the one on the host does, from what the plan says.

The card here is the host with memory that is counted: everything but the driver and the kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridk2 import _native
from hybridk2.assistant import Assistant
from hybridk2.chat.events import ReasoningDelta, TextDelta
from hybridk2.checkpoint import Checkpoint, ExpertReader, locate_model
from hybridk2.config import EngineConfig
from hybridk2.device import CpuDevice
from hybridk2.engine import Engine
from hybridk2.errors import ConfigError, EngineError, OutOfMemoryError, TuningError
from hybridk2.placement import Placement
from hybridk2.placement_changes import SwapCosts
from hybridk2.planner import ModelSizes
from hybridk2.sampling import SamplingParams
from tests.faked_device import WaitingRouter

GREEDY = SamplingParams(temperature=0.0)
QUESTION = [{"role": "user", "content": "which one is bigger, 9.11 or 9.9?"}]
PLENTY = 10**11


class CountedCard(CpuDevice):
    """`free_bytes` of its own, and a stream that works later than it is told."""

    name = "a card"
    decode_rows = (1, 2, 4, 8)

    def __init__(self, free_bytes: int = PLENTY) -> None:
        self.free_bytes = free_bytes
        self.fake_stream = _native.FakeStream(1, 1e-4)

    def memory_bytes(self) -> tuple[int, int]:
        return self.free_bytes, self.free_bytes

    def wait(self) -> None:
        self.fake_stream.synchronize()


class CountedPinning:
    def __init__(self) -> None:
        self.ranges: dict[int, int] = {}

    def pin(self, address: int, num_bytes: int) -> None:
        self.ranges[address] = num_bytes

    def unpin(self, address: int) -> None:
        del self.ranges[address]


Load = Callable[..., Assistant]


@pytest.fixture
def pinning() -> CountedPinning:
    return CountedPinning()


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, pinning: CountedPinning) -> Iterator[Load]:
    """Loads K2-nano onto a counted card."""
    loaded: list[Assistant] = []

    def load(free_bytes: int = PLENTY, **choices: Any) -> Assistant:
        card = CountedCard(free_bytes)
        monkeypatch.setattr("hybridk2.engine_parts.select_device", lambda name: card)
        monkeypatch.setattr("hybridk2.engine_parts.card.CardPinning", lambda: pinning)
        monkeypatch.setattr(
            "hybridk2.engine_parts.card.card_stream", lambda index: card.fake_stream
        )
        monkeypatch.setattr("hybridk2.engine_parts.card.MailboxRouter", WaitingRouter)
        choices = {"handoff": "mailbox", "context_tokens": 1024, "threads": 2} | choices
        loaded.append(Assistant.load(EngineConfig(**choices)))
        return loaded[-1]

    yield load
    for assistant in loaded:
        assistant.close()


@pytest.fixture(scope="module")
def answer() -> str:
    """What the host alone says."""
    assistant = Assistant.load(EngineConfig(device="cpu", context_tokens=1024, threads=2))
    said = reply(assistant)
    assistant.close()
    return said


def reply(assistant: Assistant) -> str:
    events = assistant.reply(QUESTION, None, GREEDY)
    return "".join(event.text for event in events if isinstance(event, ReasoningDelta | TextDelta))


def placement_file(folder: Path, mask: np.ndarray, model: str | None = None) -> str:
    with Checkpoint.open(locate_model("nano")) as checkpoint:
        fingerprint = model or checkpoint.routing_fingerprint()
    path = folder / "placement.json"
    Placement.from_mask(fingerprint, "made up", mask).save(path)
    return str(path)


def random_mask(share: float) -> np.ndarray:
    return np.random.default_rng(3).random((5, 32)) < share


@pytest.mark.parametrize("handoff", ["mailbox", "thread"])
def test_with_some_experts_on_the_card_the_answer_is_the_hosts(
    load: Load, answer: str, tmp_path: Path, handoff: str
) -> None:
    mask = random_mask(0.4)
    assistant = load(placement=placement_file(tmp_path, mask), handoff=handoff)
    assert reply(assistant) == answer
    engine = assistant._engine
    share = engine.stats().host_expert_share
    assert 0.3 < share < 0.9, "some picks were served by each"
    expert_bytes = engine.experts.expert_bytes
    assert engine.experts.weight_bytes == (mask.size - mask.sum()) * expert_bytes


def test_what_lives_on_the_card_may_lie_in_host_memory_too(
    load: Load, answer: str, tmp_path: Path
) -> None:
    mask = random_mask(0.4)
    assistant = load(placement=placement_file(tmp_path, mask), keep_host_copy=True)
    assert reply(assistant) == answer
    experts = assistant._engine.experts
    assert experts.weight_bytes == mask.size * experts.expert_bytes


def test_experts_that_are_picked_often_come_onto_the_card_and_the_answer_stays(
    load: Load, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A hit is worth so much here that a few picks pay for an upload.
    monkeypatch.setattr(
        "hybridk2.engine_parts.card.measure_swap_costs", lambda *args: SwapCosts(1.0, 1e-6)
    )
    mask = random_mask(0.3)
    choices = {"placement": placement_file(tmp_path, mask), "keep_host_copy": True}
    fixed = load(**choices)
    assert reply(fixed) == answer
    changing = load(**choices, dynamic_placement=True)
    assert reply(changing) == answer
    shares = [one._engine.stats().host_expert_share for one in (fixed, changing)]
    assert shares[1] < shares[0] - 0.02, f"{shares}: no more hits than before"
    assert changing._engine.experts.weight_bytes == fixed._engine.experts.weight_bytes


def test_without_experts_on_the_card_none_can_change(load: Load, tmp_path: Path) -> None:
    path = placement_file(tmp_path, np.zeros((5, 32), bool))
    with pytest.raises(ConfigError, match=r"^--dynamic-placement: no routed expert lives on"):
        load(placement=path, keep_host_copy=True, dynamic_placement=True)


def test_without_a_placement_all_experts_live_on_a_card_that_is_large_enough(
    load: Load, answer: str, pinning: CountedPinning
) -> None:
    assistant = load()
    assert reply(assistant) == answer
    assert assistant._engine.stats().host_expert_share == 0.0
    assert assistant._engine.experts.weight_bytes == 0
    assert not pinning.ranges


def test_workers_that_nobody_shares_their_cores_with_look_out_for_the_next_layer(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "hybridk2.experts.host"):
        load()
    assert "2 threads, " in caplog.text


def test_the_hosts_experts_are_pinned_as_long_as_the_engine_is_open(
    load: Load, tmp_path: Path, pinning: CountedPinning
) -> None:
    assistant = load(placement=placement_file(tmp_path, random_mask(0.2)))
    assert sum(pinning.ranges.values()) >= assistant._engine.experts.weight_bytes
    assistant.close()
    assert not pinning.ranges


def test_a_card_that_is_too_small_is_refused_before_anything_is_read(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExpertReader, "read", lambda *args: pytest.fail("an expert was read"))
    with pytest.raises(OutOfMemoryError, match=r"GPU memory: .* are missing.*Enough would be"):
        load(10**9)


def test_a_placement_of_another_model_is_refused_by_its_files_name(
    load: Load, tmp_path: Path
) -> None:
    path = placement_file(tmp_path, random_mask(0.4), model="f" * 64)
    with pytest.raises(TuningError, match=f"{path}: this placement was made for"):
        load(placement=path)


def test_fp32_is_for_the_host(load: Load) -> None:
    with pytest.raises(ConfigError, match="--dtype float32: for comparisons on the CPU"):
        load(dtype="float32")


def test_fp8_latents_take_the_bytes_of_the_plan_and_still_answer(load: Load, answer: str) -> None:
    assistant = load(kv_dtype="fp8")
    cache = assistant._engine._cache
    config = assistant.config
    sizes = ModelSizes.from_config(config)
    assert cache.latent_format.width * config.num_hidden_layers == sizes.latent_bytes("fp8")
    assert reply(assistant) == answer, "an easy question"


def test_deferral_crosses_the_mailbox(load: Load, answer: str, tmp_path: Path) -> None:
    path = placement_file(tmp_path, random_mask(0.3))
    assert reply(load(placement=path, defer_experts=1)) == answer, "an easy question"


def test_a_crossing_that_fails_is_the_requests_error_and_the_next_one_is_answered(
    load: Load, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = load(placement=placement_file(tmp_path, random_mask(0.3)))
    engine: Engine = assistant._engine
    router = engine._model._experts.decoding
    sound = router.end_step

    def failing() -> None:
        sound()
        raise EngineError("a worker was lost")

    monkeypatch.setattr(router, "end_step", failing)
    with pytest.raises(EngineError, match="a worker was lost"):
        reply(assistant)
    monkeypatch.setattr(router, "end_step", sound)
    assert reply(assistant) == answer

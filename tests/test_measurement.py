"""What a process takes beside its weights, whichever model runs in it; and a card's speeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridk2.errors import ConfigError, EngineError, OutOfMemoryError
from hybridk2.measurement import card
from hybridk2.measurement.process import process_bytes, resident_bytes
from hybridk2.planner import ModelSizes
from hybridk2.synthesis import synthesize, synthetic_config
from tests.faked_device import FakedDevice


def test_weights_and_process_are_the_resident_set_within_2_percent(tmp_path: Path) -> None:
    """Of a process a third of which is weights. The model's own buffers, 4 MB, are 1%; the
    rest allows for pages of libraries that one of two runs happened to touch."""
    config = synthetic_config("small", layers=3, experts=48)
    synthesize(tmp_path / "small", config, seed=0)
    planned_bytes = ModelSizes.from_config(config).host_weight_bytes + process_bytes()
    assert planned_bytes == pytest.approx(resident_bytes(str(tmp_path / "small")), rel=0.02)


class Card(FakedDevice):
    """The host as a card with memory of its own."""

    name = "a card"

    def memory_bytes(self) -> tuple[int, int]:
        return 10**9, 2 * 10**9


def test_a_card_is_measured_within_over_the_bus_and_at_every_handoff() -> None:
    device = Card(delay=0.0)
    stages: list[str] = []
    found = card.figures_of(
        device,
        device.fake_stream,
        lambda stage, done, rounds: stages.append(stage),
        copied_bytes=1 << 20,
        product_rows=64,
    )
    assert stages == ["the card: copies", "the card: a product", "the card: handoffs"]
    profile = found.profile
    assert (profile.name, profile.memory_bytes, profile.measured) == ("a card", 2 * 10**9, True)
    assert min(profile.bytes_per_second, profile.bus_bytes_per_second) > 1e7
    assert 1e6 < profile.flops < 1e15
    assert set(found.handoff_seconds) == {"mailbox", "host-functions"}
    assert profile.handoff_seconds == min(found.handoff_seconds.values())


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (
            torch.OutOfMemoryError("none is left"),
            OutOfMemoryError,
            "takes 3 GB of it: none is left",
        ),
        (RuntimeError("CUDA error: bad\nmore"), EngineError, "a card failed .*: CUDA error: bad$"),
    ],
)
def test_a_card_that_fails_while_it_is_measured_is_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch, failure: RuntimeError, kind: type[Exception], message: str
) -> None:
    def fails(*arguments: object) -> None:
        raise failure

    device = Card()
    monkeypatch.setattr(card, "select_device", lambda name: device)
    monkeypatch.setattr(card, "card_stream", lambda index: device.fake_stream)
    monkeypatch.setattr(card, "figures_of", fails)
    with pytest.raises(kind, match=message):
        card.measure_card(lambda stage, done, rounds: None)


def test_a_card_that_cannot_be_used_is_refused_with_the_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("a card can be used here")
    with pytest.raises(ConfigError, match=r"^device cuda: "):
        card.measure_card(lambda stage, done, rounds: None)

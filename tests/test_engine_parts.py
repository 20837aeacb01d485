"""Choices that mean nothing here are refused before loading begins; approximate ones are said."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from hybridk2.config import EngineConfig
from hybridk2.engine import Engine
from hybridk2.errors import ConfigError
from hybridk2.sampling import SamplingParams


@pytest.mark.parametrize(
    ("option", "choice"),
    [
        ("--placement", {"placement": "a-file.json"}),
        ("--keep-host-copy", {"keep_host_copy": True}),
        ("--dynamic-placement", {"dynamic_placement": True, "keep_host_copy": True}),
        ("--kv-dtype", {"kv_dtype": "fp8"}),
        ("--dense", {"dense": "int8"}),
        ("--handoff", {"handoff": "mailbox"}),
    ],
)
def test_what_is_about_a_card_is_refused_without_one(
    small_checkpoint: Path, option: str, choice: dict[str, Any]
) -> None:
    choices = EngineConfig(model=str(small_checkpoint), device="cpu", **choice)
    with pytest.raises(ConfigError, match=f"{option}: about a card.*Leave them out"):
        Engine.load(choices, lambda progress: pytest.fail("loading began"))


@pytest.mark.parametrize(
    "choice",
    [{"kv_dtype": "fp4"}, {"dense": "int4"}, {"handoff": "pigeon"}, {"defer_experts": -1}],
)
def test_a_choice_that_there_is_not_is_refused_by_its_name(choice: dict[str, Any]) -> None:
    (name,) = choice
    with pytest.raises(ConfigError, match=f"^{name}: expected"):
        EngineConfig(**choice)


def test_experts_that_leave_the_card_need_a_copy_on_the_host() -> None:
    with pytest.raises(ConfigError, match=r"^--dynamic-placement: .*Add --keep-host-copy"):
        EngineConfig(dynamic_placement=True)


def test_no_more_experts_are_deferred_than_a_token_picks(small_checkpoint: Path) -> None:
    choices = EngineConfig(model=str(small_checkpoint), defer_experts=3)
    with pytest.raises(ConfigError, match="--defer-experts: the model picks 2 experts"):
        Engine.load(choices, lambda progress: pytest.fail("loading began"))


def test_deferral_is_said_loudly_and_its_absence_not_at_all(
    small_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for deferred in (0, 1):
        caplog.clear()
        choices = EngineConfig(
            model=str(small_checkpoint), context_tokens=512, defer_experts=deferred
        )
        Engine.load(choices).close()
        warnings = [record.getMessage() for record in caplog.records if record.levelno > 20]
        said = [text for text in warnings if "one layer late (--defer-experts 1)" in text]
        assert len(said) == deferred


def test_workers_that_share_their_cores_with_torch_sleep_between_calls(
    small_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "hybridk2.experts.host"):
        choices = EngineConfig(model=str(small_checkpoint), context_tokens=512, threads=2)
        Engine.load(choices).close()
    assert "2 threads that sleep between calls" in caplog.text


def test_deferral_changes_what_is_decoded_and_not_how_a_prompt_is_read(
    small_checkpoint: Path,
) -> None:
    replies = []
    for deferred in (0, 2):
        engine = Engine.load(
            EngineConfig(model=str(small_checkpoint), context_tokens=512, defer_experts=deferred)
        )
        params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=1)
        replies.append(list(engine.generate([1, 2, 3, 4], params, stop_ids=())))
        engine.close()
    exact, deferred_reply = replies
    assert exact[0] == deferred_reply[0], "the first token follows from the prompt alone"
    assert exact[1:] != deferred_reply[1:]

"""Machine profiles survive the disk and refuse damage; cards are found by the names people use."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybridk2.errors import ConfigError
from hybridk2.hardware import (
    CARDS,
    MachineProfile,
    gpu_named,
    gpu_of_memory,
    load_profile,
    profile_path,
    save_profile,
)
from tests.described_machine import WORKSTATION

MEASURED = replace(WORKSTATION, measured=True)


@pytest.mark.parametrize(
    "profile",
    [
        MEASURED,
        replace(MEASURED, gpu=replace(gpu_named("H100"), handoff_seconds=16e-6, measured=True)),
    ],
)
def test_a_profile_comes_back_as_it_was_saved(profile: MachineProfile, tmp_path: Path) -> None:
    path = profile_path(tmp_path)
    assert load_profile(path) is None
    save_profile(path, profile)
    assert load_profile(path) == profile
    assert os.listdir(path.parent) == ["machine.json"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"cores": 0}, "cores"),
        ({"cores": True}, "cores"),
        ({"host_flops": -1.0}, "host_flops"),
        ({"host_flops": "fast"}, "host_flops"),
        ({"name": 7}, "name"),
        ({"unknown": 1}, "expected the fields"),
        ({"gpu": {"name": "half a card"}}, "gpu: expected the fields"),
    ],
)
def test_a_damaged_profile_is_refused_by_name(
    change: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    path = profile_path(tmp_path)
    save_profile(path, MEASURED)
    document = json.loads(path.read_text())
    document["machine"] |= change
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=complaint) as refusal:
        load_profile(path)
    assert str(path) in str(refusal.value)
    assert "hybridk2 doctor" in str(refusal.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "other"}', "[" * 100_000])
def test_a_file_that_is_no_profile_is_refused(text: str, tmp_path: Path) -> None:
    path = profile_path(tmp_path)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"machine\.json"):
        load_profile(path)


def test_a_profile_of_another_version_is_refused(tmp_path: Path) -> None:
    path = profile_path(tmp_path)
    save_profile(path, MEASURED)
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(ConfigError, match="version 1; this program reads 2"):
        load_profile(path)


@pytest.mark.parametrize(
    ("name", "memory"),
    [("RTX 4090", 24), ("nvidia geforce rtx 4090", 24), ("4090", 24), ("rtx-pro-6000", 96)],
)
def test_cards_are_found_by_the_names_that_people_use(name: str, memory: int) -> None:
    assert gpu_named(name).memory_bytes == pytest.approx(memory * 2**30, rel=0.01)


def test_an_unknown_card_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match="RTX 5090") as refusal:
        gpu_named("Voodoo 2")
    assert all(card.name in str(refusal.value) for card in CARDS)
    assert gpu_of_memory(12 << 30).memory_bytes == 12 << 30


def test_no_card_claims_to_be_measured() -> None:
    assert not any(card.measured for card in CARDS)

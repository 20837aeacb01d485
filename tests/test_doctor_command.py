"""`hybridk2 doctor`: what it measures, says and writes; and that an interruption leaves the old."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result

from hybridk2 import measurement
from hybridk2.cli import main
from hybridk2.errors import CheckpointError
from hybridk2.hardware import (
    gpu_named,
    inspect_system,
    load_profile,
    profile_path,
    save_profile,
)
from hybridk2.measurement import CardFigures
from hybridk2.synthesis import synthesize, synthetic_config
from tests.described_machine import WORKSTATION

MEASURED = replace(WORKSTATION, measured=True)


def run(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", "--config-home", str(home), *arguments])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurements replaced by known figures."""
    monkeypatch.setattr(measurement, "measure_machine", lambda system, show: MEASURED)
    monkeypatch.setattr(measurement, "arithmetic_roofs", lambda: {"avx512_bf16": 5e12})


@pytest.mark.skipif(psutil.virtual_memory().available < 5e9, reason="needs 5 GB of memory")
def test_what_is_measured_is_saved_and_keeps_below_the_roofs(tmp_path: Path) -> None:
    """The real measurement. Other programs may halve a roof while it is measured, and then be gone;
    beside them what two threads share can be fifty times slower: hence no bound from below."""
    result = run(tmp_path, "--json")
    assert result.exit_code == 0, result.output
    profile = load_profile(profile_path(tmp_path))
    assert profile is not None
    report = json.loads(result.stdout)
    assert report["machine"] == profile.as_dict()
    assert profile.measured
    assert profile.ram_bytes == inspect_system().usable_ram_bytes
    roof = profile.host_read_roof_bytes_per_second
    for speed in (
        profile.host_read_bytes_per_second,
        profile.moe_bytes_per_second,
        profile.attention_bytes_per_second,
        profile.dense_bytes_per_second,
        profile.head_bytes_per_second,
    ):
        assert 0 < speed < 4 * roof
    assert profile.layer_overhead_seconds > 1e-6
    assert profile.host_flops < 4 * report["arithmetic_roofs"][profile.isa]


def test_the_report_names_what_is_wrong_and_what_mends_it(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = replace(inspect_system(), transparent_huge_pages="never", governors=("powersave",))
    monkeypatch.setattr("hybridk2.hardware.inspect_system", lambda: facts)
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    assert "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled" in result.output
    assert "sudo cpupower frequency-set -g performance" in result.output
    assert "GPU: none found" in result.output
    assert load_profile(profile_path(tmp_path)) == MEASURED


@pytest.fixture
def with_a_card(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has a card."""
    facts = replace(inspect_system(), nvidia_gpus=1)
    monkeypatch.setattr("hybridk2.hardware.inspect_system", lambda: facts)


def test_a_card_is_measured_and_planned_with(
    with_a_card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = CardFigures(
        replace(gpu_named("H100"), handoff_seconds=16e-6, measured=True),
        {"mailbox": 16e-6, "host-functions": 70e-6},
    )
    monkeypatch.setattr(measurement, "measure_card", lambda show: card)
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    assert "GPU: H100" in result.output
    assert "back, mailbox" in result.output
    assert "16 us" in result.output
    found = load_profile(profile_path(tmp_path))
    assert found is not None
    assert found.gpu == card.profile
    report = json.loads(run(tmp_path, "--json").stdout)
    assert report["handoff_seconds"] == card.handoff_seconds
    options = ("--ram", "768", "--dense", "int8", "--config-home", str(tmp_path))
    plan = CliRunner().invoke(main, ["plan", "kimi-k2-thinking", *options])
    assert "and H100" in plan.output, plan.output
    assert "has not been measured" not in plan.output


def test_a_card_that_cannot_be_used_is_said_and_the_host_saved(
    with_a_card: None, tmp_path: Path
) -> None:
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    assert "GPU: 1 found, none measured: device cuda: " in result.output
    assert load_profile(profile_path(tmp_path)) == MEASURED


def test_an_interrupted_measurement_leaves_the_old_profile(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_profile(profile_path(tmp_path), MEASURED)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measurement, "measure_machine", interrupted)
    result = run(tmp_path)
    assert result.exit_code == 130
    assert load_profile(profile_path(tmp_path)) == MEASURED
    assert os.listdir(tmp_path / "hybridk2") == ["machine.json"]


def test_a_profile_that_cannot_be_written_is_refused_after_the_report(
    quick: None, tmp_path: Path
) -> None:
    (tmp_path / "hybridk2").write_text("a file where the folder should be")
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "a workstation, 16 cores" in result.output
    assert "machine.json: cannot be written" in result.output


def test_the_disk_of_a_model_is_measured(quick: None, tmp_path: Path) -> None:
    synthesize(tmp_path / "model", synthetic_config("tiny"), seed=0)
    result = run(tmp_path, str(tmp_path / "model"), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["disk_bytes_per_second"] > 1e6


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no shards"):
        measurement.disk_bytes_per_second(tmp_path)


def test_each_node_s_memory_is_read_by_each_node_s_cores() -> None:
    """Two nodes as a machine would have them; where there is one CPU, it is both."""
    cpus = sorted(os.sched_getaffinity(0))
    roofs = measurement.node_read_roofs([[cpus[0]], [cpus[-1]]], node_bytes=8 << 20)
    assert list(roofs) == [
        f"memory of node {home}, cores of node {away}" for home in (0, 1) for away in (0, 1)
    ]
    assert all(1e8 < speed < 1e12 for speed in roofs.values())
    assert os.sched_getaffinity(0) == set(cpus), "the calling thread was moved"
    assert measurement.node_read_roofs([cpus]) == {}


def test_help_has_examples(tmp_path: Path) -> None:
    assert "hybridk2 doctor --json" in run(tmp_path, "--help").output

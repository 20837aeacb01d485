"""`hybridk2 plan`: what it says, in what form and with what exit status."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hybridk2.cli import main
from hybridk2.hardware import inspect_system, profile_path, save_profile
from hybridk2.synthesis import synthesize, synthetic_config
from tests.described_machine import WORKSTATION

DESCRIBED = ("kimi-k2-thinking", "--cpu-gbps", "400")


def run(*arguments: str, config_home: Path | None = None) -> Result:
    home = ("--config-home", str(config_home)) if config_home else ()
    return CliRunner().invoke(main, ["plan", *arguments, *home])


def test_what_fits_exits_with_0_and_what_does_not_with_1() -> None:
    fits = run(*DESCRIBED, "--ram", "768")
    assert fits.exit_code == 0, fits.output
    assert "It fits." in fits.output
    tight = run(*DESCRIBED, "--ram", "512")
    assert tight.exit_code == 1, tight.output
    missing = re.search(r"It does not fit: ([\d.]+) GB", tight.output)
    assert missing is not None
    # Without a file: 600.1 GB, as test_planner holds the parts of it.
    assert float(missing.group(1)) == pytest.approx(600.1 - 512, abs=0.1)
    assert "host memory: --ram 601" in tight.output


def test_json_is_the_plan_and_nothing_else() -> None:
    result = run(*DESCRIBED, "--ram", "768", "--gpu", "4090", "--json")
    plan = json.loads(result.stdout)
    assert plan["fits"] is True
    assert plan["model"] == "kimi-k2-thinking"
    assert plan["machine"]["gpu"]["measured"] is False
    assert [place["name"] for place in plan["places"]] == ["GPU memory", "host memory"]


def test_a_card_s_speeds_are_said_to_be_planned_only() -> None:
    result = run(*DESCRIBED, "--ram", "768", "--gpu", "RTX 5090", "--dense", "int8")
    assert result.exit_code == 0, result.output
    assert "This card has not been measured" in result.output
    assert "round what the model computes" in result.output


def test_the_measured_profile_is_used_and_its_lack_is_refused(tmp_path: Path) -> None:
    refused = run("kimi-k2-thinking", config_home=tmp_path)
    assert refused.exit_code == 1
    assert "hybridk2 doctor" in refused.output
    measured = replace(WORKSTATION, name="this very machine", measured=True)
    save_profile(profile_path(tmp_path), measured)
    result = run("kimi-k2-thinking", config_home=tmp_path)
    assert result.exit_code == 0, result.output
    assert "this very machine, as measured" in result.output
    result = run("kimi-k2-thinking", "--ram", "10", config_home=tmp_path)
    assert result.exit_code == 1


def test_what_other_programs_hold_is_said_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_profile(profile_path(tmp_path), replace(WORKSTATION, measured=True))
    free = replace(inspect_system(), free_gigabyte_pages=0, available_ram_bytes=599 * 10**9)
    monkeypatch.setattr("hybridk2.hardware.inspect_system", lambda: free)
    result = run("kimi-k2-thinking", config_home=tmp_path)
    assert result.exit_code == 0, result.output
    assert "599.00 GB of host memory are free, 600.14 GB are needed" in result.output
    free = replace(free, free_gigabyte_pages=2)
    assert "are free" not in run("kimi-k2-thinking", config_home=tmp_path).output


def test_a_folder_without_shards_can_be_planned(tmp_path: Path) -> None:
    synthesize(tmp_path / "tiny", synthetic_config("tiny"), seed=0)
    for shard in (tmp_path / "tiny").glob("*.safetensors"):
        shard.unlink()
    result = run(str(tmp_path / "tiny"), "--cpu-gbps", "50", "--ram", "16")
    assert result.exit_code == 0, result.output
    assert "4 of 4 shards are not there yet" in result.output


def test_nano_s_context_is_what_it_was_trained_for() -> None:
    result = run("nano", "--cpu-gbps", "50", "--ram", "16", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["choices"]["context_tokens"] == 4096


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("kimi-k2-thinking", "--cpu-gbps", "100"), "needs --ram"),
        (("kimi-k2-thinking", "--cpu-tflops", "1"), "needs --cpu-gbps"),
        ((*DESCRIBED, "--ram", "768", "--dense", "int8"), "need --gpu"),
        ((*DESCRIBED, "--ram", "768", "--context", "1000000"), "262144 tokens at most"),
        ((*DESCRIBED, "--ram", "0"), "--ram"),
    ],
)
def test_contradictions_are_usage_mistakes(arguments: tuple[str, ...], complaint: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert complaint in result.output


def test_an_unknown_card_is_refused_with_the_known_ones() -> None:
    result = run(*DESCRIBED, "--ram", "768", "--gpu", "Voodoo 2")
    assert result.exit_code == 1
    assert "RTX PRO 6000" in result.output


def test_help_has_examples() -> None:
    result = run("--help")
    assert "hybridk2 plan kimi-k2-thinking --cpu-gbps" in result.output

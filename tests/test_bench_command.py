"""`hybridk2 bench` as a shell sees it: what is printed and written, and what it exits with."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hybridk2.benchmark.figures import CSV_COLUMNS
from hybridk2.cli import main
from hybridk2.hardware import described_machine, profile_path, save_profile
from hybridk2.planner import Choices, ModelSizes, plan

SMALL = ("--contexts", "64,128", "--tokens", "2", "--repeat", "2")


def bench(*arguments: str, model_in_environment: str | None = None) -> Result:
    environment = {"HYBRIDK2_MODEL": model_in_environment, "XDG_CONFIG_HOME": "/nonexistent"}
    return CliRunner().invoke(main, ["bench", *arguments], env=environment)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tables_come_first_and_one_line_of_json_last(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    paths = {"--csv": tmp_path / "phases.csv", "--report": tmp_path / "report.html"}
    options = [text for option, path in paths.items() for text in (option, str(path))]
    result = bench(str(small_checkpoint), *SMALL, *options)
    assert result.exit_code == 0, result.output
    *tables, last = result.stdout.strip().splitlines()
    for row in ("decode tok/s", "experts GB/s", "attention", "waiting", "whole step"):
        assert any(row in line for line in tables), row
    document = json.loads(last)
    assert document["model"] == str(small_checkpoint)
    assert [row["context_tokens"] for row in document["frontiers"]] == [64, 128]
    decode = document["frontiers"][1]["decode"]
    assert (decode["past_tokens"], decode["tokens"]) == (128, 4)
    assert decode["tokens_per_second"]["median"] > 0

    with paths["--csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert {row["layer"] for row in rows} == {"", "0", "1", "2"}
    assert paths["--report"].read_text().startswith("<!doctype html>")
    assert files(tmp_path) == ["phases.csv", "report.html"]
    for path in paths.values():
        assert f"written: {path}" in result.stderr


def test_json_is_all_that_is_printed(small_checkpoint: Path) -> None:
    result = bench(str(small_checkpoint), *SMALL, "--json", "--dtype", "float32", "--threads", "1")
    document = json.loads(result.stdout)
    assert (document["dtype"], document["threads"]) == ("float32", 1)


def test_progress_says_what_goes_on(small_checkpoint: Path) -> None:
    said = bench(str(small_checkpoint), *SMALL, "--json").stderr
    stages = [
        *("experts", "dense weights", "warming up"),
        *("context 64: reading the prompt", "context 64: the machine's roofs"),
        *("context 64: decoding, run 1 of 2", "context 64: decoding, run 2 of 2"),
        "context 128: reading the prompt",
    ]
    places = [said.find(f"{stage}: ") for stage in stages]
    assert -1 not in places
    assert places == sorted(places)


def test_contexts_beyond_the_model_are_left_out_or_refused() -> None:
    beyond = bench("nano", "--contexts", "64,4090", "--tokens", "32")
    assert beyond.exit_code == 1
    assert "4,090 tokens and 32 decoded ones are asked for" in beyond.output
    assert "nano was trained for 4,096" in beyond.output


def test_the_default_contexts_are_those_that_the_model_holds() -> None:
    result = bench("--tokens", "1", "--repeat", "1", "--json")
    assert result.exit_code == 0, result.output
    contexts = [row["context_tokens"] for row in json.loads(result.stdout)["frontiers"]]
    assert contexts == [512, 2048]
    assert "left out: 8,192 tokens, as nano was trained for 4,096" in result.stderr


def test_the_model_may_be_named_in_the_environment(small_checkpoint: Path) -> None:
    result = bench(*SMALL, "--json", model_in_environment=str(small_checkpoint))
    assert json.loads(result.stdout)["model"] == str(small_checkpoint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--contexts", "many"), "is not a list such as 512,2048,8192"),
        (("--contexts", "1,512"), "a context of 1 tokens: 2 at least"),
        (("--tokens", "0"), "0 is not in the range x>=1"),
        (("--repeat", "0"), "0 is not in the range x>=1"),
        (("--threads", "0"), "threads: expected at least 1, found 0"),
        (("--report", "/nowhere/page.html"), "/nowhere is no folder in which files can be made"),
        (("--csv", "/tmp"), "is a directory"),
    ],
)
def test_usage_mistakes_exit_with_2(arguments: tuple[str, ...], message: str) -> None:
    result = bench("nano", *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_what_was_planned_stands_beside_what_was_measured(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    first = bench(str(small_checkpoint), *SMALL, "--json")
    assert json.loads(first.stdout)["frontiers"][0]["planned_decode_tokens_per_second"] is None
    described = described_machine(1e10, ram_bytes=1 << 34)
    profile = replace(described, isa=json.loads(first.stdout)["isa"], cores=1, nodes=1)
    save_profile(profile_path(tmp_path), profile)
    options = ("--config-home", str(tmp_path), "--threads", "1")
    result = bench(str(small_checkpoint), *SMALL, *options)
    assert result.exit_code == 0, result.output
    (row,) = (line for line in result.stdout.splitlines() if line.startswith("│ as planned"))
    assert len(re.findall(r"\([+-]\d+%\)", row)) == 2
    sizes = ModelSizes.from_checkpoint(small_checkpoint)
    choices = Choices(132, decode_context_tokens=64 + 1)
    planned = json.loads(result.stdout.splitlines()[-1])["frontiers"][0]
    assert planned["planned_decode_tokens_per_second"] == pytest.approx(
        plan(sizes, profile, choices).decode_tokens_per_second, rel=1e-4
    )


def test_a_profile_of_other_kernels_predicts_nothing(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    described = described_machine(1e10, ram_bytes=1 << 34)
    save_profile(profile_path(tmp_path), replace(described, isa="another", cores=1, nodes=1))
    result = bench(str(small_checkpoint), *SMALL, "--config-home", str(tmp_path), "--threads", "1")
    assert result.exit_code == 0, result.output
    assert not [line for line in result.stdout.splitlines() if line.startswith("│ as planned")]


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    result = bench(str(tmp_path))
    assert result.exit_code == 1
    assert str(tmp_path) in result.output


def test_a_disk_that_refuses_is_named_and_the_figures_are_printed(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    taken = tmp_path / ".phases.csv.tmp"  # the name of the temporary file, which is a folder here
    taken.mkdir()
    result = bench(str(small_checkpoint), *SMALL, "--json", "--csv", str(tmp_path / "phases.csv"))
    assert result.exit_code == 1
    assert "phases.csv: cannot be written" in result.stderr
    assert json.loads(result.stdout)["frontiers"]
    assert not (tmp_path / "phases.csv").exists()


def test_ctrl_c_exits_with_130_and_leaves_the_files_as_they_were(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text("from an earlier run")
    command = [sys.executable, "-m", "hybridk2", "bench", "nano", "--tokens", "1000"]
    command += ["--repeat", "1000", "--contexts", "512", "--json", "--report", str(report)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith("context 512: reading"):
            break
    process.send_signal(signal.SIGINT)
    printed, rest = process.communicate(timeout=60)
    assert process.returncode == 130, said + rest
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert printed == ""
    assert report.read_text() == "from an earlier run"
    assert files(tmp_path) == ["report.html"]


def test_the_help_has_examples_that_exist_and_needs_no_torch() -> None:
    program = (
        "import sys; from hybridk2.cli import main;"
        "main(['bench', '--help'], standalone_mode=False);"
        "late = {'torch', 'rich'} & set(sys.modules); assert not late, late"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    examples = re.findall(r"hybridk2 bench .*", shown.stdout.split("Examples:")[1])
    assert len(examples) == 4
    options = set(re.findall(r"--[a-z]+", shown.stdout.split("Examples:")[0]))
    assert {option for line in examples for option in re.findall(r"--[a-z]+", line)} <= options

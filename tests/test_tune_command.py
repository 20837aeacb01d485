"""`hybridk2 tune` and `serve --record-routing`, as a person runs them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from hybridk2.cli import main
from hybridk2.placement import Placement
from hybridk2.routing_trace import TraceHeader, TraceWriter, read_trace
from hybridk2.tuner.choice import tune as choose
from hybridk2.tuner.page import page
from hybridk2.tuner.replay import StepCost
from tests.browser import CHROMIUM, Chromium
from tests.routed_traces import skewed_trace
from tests.scripted_engine import until
from tests.test_serve_command import BODY, started

PROMPTS = (
    {"messages": [{"role": "user", "content": "which one is bigger, 9.11 or 9.9?"}], "n": 1},
    {"prompt": "which one is bigger, 3.7 or 3.68?"},
    {"prompt": "who are you?"},
)
CARD = ("--gpu", "RTX 4090", "--experts-per-layer", "8")


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(map(json.dumps, PROMPTS)))
    return path


def tune(tmp_path: Path, *arguments: str) -> Result:
    """Without a machine profile, whatever this machine has."""
    fixed = ("--config-home", str(tmp_path / "config"), "--out", str(tmp_path / "placement.json"))
    return CliRunner().invoke(main, ["tune", "nano", *fixed, *arguments])


def found(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout.splitlines()[-1])
    assert isinstance(value, dict)
    return value


def test_prompts_become_a_placement_with_more_hits_than_uniform(
    tmp_path: Path, workload: Path
) -> None:
    result = found(tune(tmp_path, "--workload", str(workload), "--json", "--measure", *CARD))
    trace = read_trace(tmp_path / "placement.trace")
    assert trace.blocks == len(PROMPTS)
    assert result["trace"]["tokens"] == trace.tokens > 100
    assert result["host_figure"] == "measured just now"
    assert result["host_bytes_per_second"] > 1e9
    assert result["measured"] is None
    assert "CPU" in result["not_measured"]
    rates = {policy["name"]: policy["replay"]["hit_rate"] for policy in result["policies"]}
    assert rates["layer budgets"] >= rates["frequency"] >= rates["uniform"]
    placement = Placement.load(tmp_path / "placement.json")
    assert placement.num_resident == result["budget_experts"] == 8 * 5
    assert placement.model == trace.header.model
    assert result["layer_budgets"] == [len(ids) for ids in placement.resident]
    assert (tmp_path / "placement.trace").read_bytes().count(b"bigger") == 0


@pytest.mark.parametrize("budget", ["0.0005", "0.001", "0.002", "0.004"])
def test_on_k2_nano_the_choice_has_the_most_hits_at_every_budget(
    budget: str, tmp_path: Path, recorded: Path
) -> None:
    result = found(
        tune(
            tmp_path,
            *("--trace", str(recorded), "--gpu", "H200", "--cpu-gbps", "50"),
            *("--budget-gb", budget, "--json"),
        )
    )
    rates = {policy["name"]: policy["replay"]["hit_rate"] for policy in result["policies"]}
    assert rates[result["chosen"]] >= max(rates["frequency"], rates["uniform"])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """K2-nano's routing on the prompts above."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    result = tune(folder, "--workload", str(folder / "prompts.jsonl"), *CARD)
    assert result.exit_code == 0, result.output
    assert "layer budgets" in result.stdout
    return folder / "placement.trace"


def test_a_run_that_was_killed_goes_on_from_its_trace(
    tmp_path: Path, workload: Path, recorded: Path
) -> None:
    whole = recorded.read_bytes()
    trace = tmp_path / "placement.trace"
    trace.write_bytes(whole[: len(whole) * 2 // 3])
    result = found(tune(tmp_path, "--workload", str(workload), "--json", *CARD))
    assert result["trace"]["blocks"] == len(PROMPTS)
    assert trace.read_bytes() == whole, "the same prompts give the same routing"


def test_ctrl_c_says_what_is_recorded_and_the_next_run_goes_on(tmp_path: Path) -> None:
    workload = tmp_path / "prompts.jsonl"
    workload.write_text("\n".join(json.dumps(PROMPTS[0]) for _ in range(500)))
    trace = tmp_path / "routing.trace"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hybridk2", "tune", "nano", "--workload", str(workload)),
            *("--trace", str(trace), "--out", str(tmp_path / "placement.json"), *CARD),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert until(lambda: trace.exists() and trace.stat().st_size > 3000, 60)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "of 500 prompts are in" in errors
    assert "interrupted" in errors
    assert not (tmp_path / "placement.json").exists()
    assert 0 < read_trace(trace).blocks < 500


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--workload or --trace"),
        (("--trace", "t"), "RTX 4090"),
        (("--trace", "t", *CARD, "--budget-gb", "1"), "give one of them"),
        (("--trace", "t", *CARD, "--out", "/nowhere/p.json"), "no folder"),
    ],
)
def test_what_makes_no_sense_is_a_usage_mistake(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    result = tune(tmp_path, *arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_what_cannot_be_is_refused_with_its_name(tmp_path: Path, recorded: Path) -> None:
    damaged = tmp_path / "damaged.trace"
    damaged.write_bytes(recorded.read_bytes()[:-1] + b"?")
    other = tmp_path / "other.trace"
    TraceWriter(other, TraceHeader("another", 2, 8, 2, "server")).close()
    for arguments, said in (
        (("--trace", str(damaged), "--cpu-gbps", "9", *CARD), str(damaged)),
        (("--trace", str(other), "--cpu-gbps", "9", *CARD), str(other)),
        (("--trace", str(recorded), *CARD), "hybridk2 doctor"),
        (("--trace", str(recorded), "--gpu", "RTX 9999"), "RTX 9999"),
        (("--trace", str(recorded), "--gpu", "H100", "--budget-gb", "0.00001"), "no expert fits"),
    ):
        result = tune(tmp_path, *arguments)
        assert result.exit_code == 1, result.output
        assert said in result.output.replace("\n", "")
    assert not (tmp_path / "placement.json").exists()


@pytest.mark.parametrize(
    "line", ["{", "7", "{}", '{"messages": []}', '{"messages": ["hi"]}', '{"prompt": 1}']
)
def test_a_line_that_is_no_prompt_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n' + line)
    result = tune(tmp_path, "--workload", str(tmp_path / "prompts.jsonl"), *CARD)
    assert result.exit_code == 1
    assert "prompts.jsonl:2" in result.output


def test_a_prompt_beyond_the_context_is_refused_before_any_is_answered(tmp_path: Path) -> None:
    long = {"prompt": "which one is bigger, 9.11 or 9.9? " * 200}
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, [PROMPTS[1], long])))
    arguments = ("--workload", str(tmp_path / "prompts.jsonl"), "--context", "512", *CARD)
    result = tune(tmp_path, *arguments)
    assert result.exit_code == 1
    assert "line 2 of the workload" in result.output
    assert not (tmp_path / "placement.trace").exists()


def test_a_server_records_what_it_decodes_and_tune_reads_it(tmp_path: Path) -> None:
    trace = tmp_path / "served.trace"
    for number in (1, 2):
        with started("--record-routing", str(trace)) as server:
            url = server.ready()
            answer = httpx.post(f"{url}/v1/chat/completions", json=BODY, timeout=60).json()
            server.process.send_signal(signal.SIGTERM)
            assert server.ended(30) == 0, server.text
        assert str(trace) in server.text
        decoded = answer["usage"]["completion_tokens"]
        # The last token of an answer that reached its length was not decoded any more.
        assert read_trace(trace).tokens in (number * decoded, number * (decoded - 1))
    result = found(tune(tmp_path, "--trace", str(trace), "--cpu-gbps", "90", "--json", *CARD))
    assert result["trace"]["tokens"] == read_trace(trace).tokens


def test_a_server_does_not_start_on_a_trace_that_is_not_its_own(
    tmp_path: Path, recorded: Path
) -> None:
    before = recorded.read_bytes()
    with started("--record-routing", str(recorded)) as server:
        assert server.ended(60) == 1
    assert str(recorded) in server.text
    assert "another source" in server.text
    assert recorded.read_bytes() == before


# -- The page --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def test_the_page_shows_policies_and_heat_maps_without_a_network(
    chromium: Chromium, tmp_path: Path
) -> None:
    trace = skewed_trace(300, layers=4, experts=128, top_k=8, seed=0)
    tuning = choose(trace, StepCost(8, 0.01, 1e-4, 2e-5, 1e-4, 1e-3), 64)
    path = tmp_path / "tune.html"
    path.write_text(page("</title><script>alert(1)</script>", ["a <b>line</b>"], trace, tuning))
    assert "http://" not in path.read_text().replace("http://www.w3.org/2000/svg", "")
    opened = chromium.open(path.as_uri())
    assert opened.evaluate("document.scripts.length") == 0
    assert "<script>" in opened.evaluate("document.querySelector('h1').textContent")
    assert opened.evaluate("document.querySelectorAll('tr.chosen').length") == 1
    names = opened.evaluate("[...document.querySelectorAll('td:first-child')].map(n=>n.innerText)")
    assert names == [result.name for result in (*tuning.policies, *tuning.caches)]
    assert opened.evaluate("document.querySelectorAll('svg.popularity rect').length") == 4 * 96
    assert opened.evaluate("document.querySelectorAll('svg.locality rect').length") == 4 * 8
    # The most popular experts of a skewed layer are darker than its least popular ones.
    colours = opened.evaluate(
        "[...document.querySelectorAll('svg.popularity rect')].map(n=>n.getAttribute('fill'))"
    )
    light = [sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in colours]
    assert all(light[96 * layer] <= light[96 * layer + 95] for layer in range(4))
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")

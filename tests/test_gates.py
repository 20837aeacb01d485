"""The runner of the release gates: what it prints, and that a broken promise ends it with 1."""

from __future__ import annotations

import pytest

from tests.gates.__main__ import GATES, main
from tests.gates.fleet import Fleet
from tests.gates.gate import Outcome, gate


@gate("7", "that hold")
def holding(fleet: Fleet, outcome: Outcome) -> None:
    outcome.say("3 of 3")
    outcome.hold(True, "unseen")


@gate("8", "that break")
def breaking(fleet: Fleet, outcome: Outcome) -> None:
    outcome.say("2 of 3")
    outcome.hold(False, "one is lost")


@gate("9", "that fail")
def failing(fleet: Fleet, outcome: Outcome) -> None:
    raise KeyError("gone")


@pytest.mark.parametrize(
    ("names", "status", "lines"),
    [
        (["7"], 0, ["gate 7        pass  that hold: 3 of 3"]),
        (["8"], 1, ["gate 8        FAIL  that break: 2 of 3; broken: one is lost"]),
        ([], 1, ["pass  that hold", "FAIL  that break", "broken: KeyError: 'gone'", "1 of 3"]),
        (["7", "x"], 2, []),
    ],
)
def test_a_line_for_each_gate_and_a_status_that_tells(
    names: list[str], status: int, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(names, [holding, breaking, failing]) == status
    printed = capsys.readouterr().out
    for line in lines:
        assert line in printed


def test_every_gate_has_a_name_of_its_own() -> None:
    assert len({gate.name for gate in GATES}) == len(GATES)

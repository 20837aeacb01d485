"""Runs the gates: `python -m tests.gates` all of them, `python -m tests.gates 10 load` those named.

Prints a line per gate and ends with status 1 when a promise is broken.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.gates import bodies, crowds, life, load, requests, security, storage
from tests.gates.fleet import Fleet
from tests.gates.gate import Gate, Outcome

GATES: Sequence[Gate] = [
    *bodies.GATES,
    *requests.GATES,
    *life.GATES,
    *crowds.GATES,
    *storage.GATES,
    *security.GATES,
    *load.GATES,
]


def main(names: Sequence[str], gates: Sequence[Gate] = GATES) -> int:
    """Run the gates of these names, all where there are none. Returns the exit status."""
    unknown = set(names) - {gate.name for gate in gates}
    if unknown:
        print(f"no gate is called {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    chosen = [gate for gate in gates if not names or gate.name in names]
    print(f"{_machine()}; commit {_commit()}", flush=True)
    started = time.monotonic()
    failed = 0
    with Fleet() as fleet:
        for gate in chosen:
            failed += not run(gate, fleet)
    seconds = time.monotonic() - started
    print(f"{len(chosen) - failed} of {len(chosen)} gates hold, {seconds:.0f} s")
    return 1 if failed else 0


def run(gate: Gate, fleet: Fleet) -> bool:
    """Run one gate and print its line; whether its promises hold."""
    started = time.monotonic()
    outcome = Outcome()
    try:
        gate.check(fleet, outcome)
    except Exception as error:  # noqa: BLE001 - told in the gate's line, the others go on
        traceback.print_exc()
        outcome.hold(False, f"{type(error).__name__}: {error}")
    text = ", ".join(outcome.figures)
    if outcome.broken:
        text += "; broken: " + "; ".join(outcome.broken)
    seconds = time.monotonic() - started
    name = f"gate {gate.name}"
    print(f"{name:<14}{outcome.verdict}  {gate.promise}: {text} ({seconds:.0f} s)", flush=True)
    return not outcome.broken


def _machine() -> str:
    cores = psutil.cpu_count(logical=False)
    memory = psutil.virtual_memory().total / 1e9
    load_before = psutil.getloadavg()[0]
    return f"{_processor()}, {cores} cores, {memory:.0f} GB, load {load_before:.1f} before"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    root = Path(__file__).parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Gates 17, 19 and 20: damaged checkpoints, and saves that are cut off.

Their cases are tests of the suite, run here with the gates' numbers; in a process of their own,
because what must not happen is that the process dies.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.gates.fleet import Fleet
from tests.gates.gate import Outcome, gate
from tests.serve_process import started

ROOT = Path(__file__).parents[2]


def run_tests(outcome: Outcome, *tests: str) -> int:
    """Run tests, the long ones included; how many passed. All of them have to."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    outcome.hold(ran.returncode != -signal.SIGBUS, "died of SIGBUS")
    outcome.hold(ran.returncode == 0, f"pytest ends with {ran.returncode}: {ran.stdout[-400:]}")
    found = re.search(r"(\d+) passed", ran.stdout)
    return int(found[1]) if found else 0


@gate("17", "damaged checkpoints")
def damaged_checkpoints(fleet: Fleet, outcome: Outcome) -> None:
    run_tests(outcome, "tests/test_checkpoint_corruption.py")
    passed = run_tests(outcome, "tests/test_checkpoint.py")
    outcome.say("1,000 random corruptions with seeds of the day refused by file or tensor name")
    outcome.say(f"{passed} tests of shards, index, types, shapes and offsets")
    shard = next(fleet.random_model("tiny").glob("*.safetensors"))
    whole = shard.read_bytes()
    cuts = (0, 7, 8, 100, len(whole) // 2, len(whole) - 1)
    try:
        for size in cuts:
            shard.write_bytes(whole[:size])
            with started("--model", str(shard.parent)) as server:
                code = server.ended(60)
            outcome.hold(code == 1, f"cut to {size} bytes: exit status {code}")
            outcome.hold(shard.name in server.text, f"cut to {size} bytes: {server.text[-200:]}")
            outcome.hold("Traceback" not in server.text, f"cut to {size} bytes: a traceback")
    finally:
        shard.write_bytes(whole)
    outcome.say(f"a server of a shard cut at {len(cuts)} places ends with its name")


@gate("19", "kill -9 and full disk during a save")
def saves(fleet: Fleet, outcome: Outcome) -> None:
    sessions = "tests/test_sessions.py"
    run_tests(
        outcome,
        f"{sessions}::test_killing_a_save_200_times_always_leaves_the_previous_or_the_new_file",
        f"{sessions}::test_a_full_disk_leaves_the_previous_file_and_nothing_else",
        f"{sessions}::test_the_file_is_flushed_before_the_rename_and_the_folder_after",
        "tests/test_chat_conversation.py::test_a_full_disk_is_told_and_the_chat_goes_on",
    )
    outcome.say("200 saves of a conversation killed, the file before or after whole each time")
    outcome.say("fsync, rename, fsync in this order; a full disk is told and the chat goes on")
    outcome.say("conversations are all that is saved so far")


@gate("20", "corrupt placements and routing traces")
def other_files(fleet: Fleet, outcome: Outcome) -> None:
    placement, trace = "tests/test_placement.py", "tests/test_routing_trace.py"
    run_tests(
        outcome,
        f"{placement}::test_every_changed_letter_of_a_file_is_refused_by_its_name",
        f"{placement}::test_a_checksum_does_not_make_a_placement",
        f"{trace}::test_every_flipped_bit_is_refused_by_the_file_s_name",
        f"{trace}::test_other_files_and_other_versions_are_refused",
    )
    outcome.say("every changed letter of a placement, every flipped bit of a trace refused by name")
    outcome.say("no KV is kept on disk")


GATES = (damaged_checkpoints, saves, other_files)

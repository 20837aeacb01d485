"""The C++ side's own proofs, which build it afresh: minutes, so `make soak` runs most of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "tests" / "native"


@pytest.fixture
def environment() -> dict[str, str]:
    """With this interpreter's cmake and ninja on PATH."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    for tool in ("cmake", "ninja", "objdump", "nm"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"{tool} is not installed")
    return {**os.environ, "PATH": path}


@pytest.mark.soak
@pytest.mark.parametrize("script", ["check_isolation.sh", "run_sanitizers.sh"])
def test_the_native_checks_pass(script: str, environment: dict[str, str]) -> None:
    run = subprocess.run([NATIVE / script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_threads_read_no_weights_of_another_numa_node(environment: dict[str, str]) -> None:
    build = ROOT / "build" / "numa"
    commands: list[list[str | Path]] = [
        ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, "-DHYBRIDK2_SANITIZE=none"],
        ["cmake", "--build", build, "--target", "test_numa"],
        [build / "test_numa"],
    ]
    for command in commands:
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr

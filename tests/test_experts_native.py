"""The C++ side's own proofs, which build it afresh: minutes, so `make soak` runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parent / "native"


@pytest.mark.soak
@pytest.mark.parametrize("script", ["check_isolation.sh", "run_sanitizers.sh"])
def test_the_native_checks_pass(script: str) -> None:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    for tool in ("cmake", "ninja", "objdump", "nm"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"{tool} is not installed")
    environment = {**os.environ, "PATH": path}
    run = subprocess.run([NATIVE / script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr

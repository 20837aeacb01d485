"""`hybridk2 serve` as a process of its own, and what it says while it starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.scripted_engine import until


class Process:
    """A server process and what it wrote to standard error so far."""

    def __init__(self, *arguments: str, module: str = "hybridk2", **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "serve", "--port", "0", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    @property
    def text(self) -> str:
        return "".join(self.lines)

    @property
    def url(self) -> str:
        assert until(lambda: "http://127.0.0.1:" in self.text, 30), self.text
        found = re.search(r"http://127\.0\.0\.1:\d+", self.text)
        assert found
        return found.group()

    def ready(self) -> str:
        """Wait until the model answers; the server's address."""
        url = self.url
        assert until(lambda: httpx.get(f"{url}/health").status_code == 200, 60), self.text
        return url

    def ended(self, seconds: float) -> int:
        """The exit status. Fails when the process does not end in time."""
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code


@contextmanager
def started(*arguments: str, module: str = "hybridk2", **environment: str) -> Iterator[Process]:
    """A process of these options of `hybridk2 serve`, killed afterwards if it still runs."""
    process = Process(*arguments, module=module, **environment)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()

"""The bench's side of a peer: starts its worker, hands it weights and calls, keeps it stopped.

Only one engine may use the processors at a time, and some spin while they wait: a worker is stopped
by SIGSTOP whenever it has nothing to answer.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from hybridk2.checkpoint import QuantizedLinear
from peers.protocol import Features, Purpose, Shape, WeightFiles

__all__ = ["PEER_NAMES", "Peer", "PeerError", "WeightFolder", "default_command"]

BENCH = Path(__file__).resolve().parents[1]
ENVIRONMENTS = BENCH.parent / "build" / "peers"
MODULES = {"kt": "peers.kt_kernel_worker", "llama.cpp": "peers.llama_cpp_worker"}
PEER_NAMES: tuple[str, ...] = tuple(MODULES)
ANSWER_SECONDS = 600.0


class PeerError(Exception):
    """A peer cannot run here; the message is the reason, in the peer's own words if it has some."""


class WeightFolder:
    """A temporary folder with the experts' weights for the workers to load."""

    def __init__(self, shape: Shape) -> None:
        self.files = WeightFiles(Path(tempfile.mkdtemp(prefix="hybridk2-bench-")), shape)

    def add(
        self, expert: int, gate: QuantizedLinear, up: QuantizedLinear, down: QuantizedLinear
    ) -> None:
        mode = "w+" if expert == 0 else "r+"
        for name, matrix in (("gate", gate), ("up", up), ("down", down)):
            self.files.packed(name, mode)[expert] = matrix.packed.numpy()
            self.files.scale(name, mode)[expert] = bfloat16_bits(matrix.scale)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.files.folder)


def default_command(name: str) -> list[str]:
    """How the worker of a peer is started: the Python of the environment that setup.sh made.

    Raises PeerError where that environment is missing.
    """
    python = ENVIRONMENTS / name / "bin" / "python"
    if not python.exists():
        raise PeerError(f"no environment: run bench/peers/setup.sh {name}")
    return [str(python), "-m", MODULES[name]]


class Peer:
    """One peer with its weights loaded. All methods raise PeerError when the worker fails."""

    def __init__(
        self,
        name: str,
        files: WeightFiles,
        *,
        threads: int,
        max_tokens: int,
        purpose: Purpose,
        command: list[str] | None = None,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        """command: what to start; None for the environment that setup.sh made."""
        self.name = name
        self._answer_seconds = answer_seconds
        command = command or default_command(name)
        self._folder = Path(tempfile.mkdtemp(prefix="hybridk2-bench-"))
        self._log_path = self._folder / "log"
        try:
            self._process = self._start(command)
        except OSError as error:
            shutil.rmtree(self._folder)
            raise PeerError(f"its worker does not start: {error}") from error
        try:
            answer = self._ask(
                {
                    "do": "load",
                    "folder": str(files.folder),
                    "shape": asdict(files.shape),
                    "threads": threads,
                    "max_tokens": max_tokens,
                    "purpose": purpose,
                }
            )
        except PeerError:
            self.close()
            raise
        self.features = Features(**answer)

    def milliseconds(self, path: str, x: Tensor, routings: Tensor, weights: Tensor) -> list[float]:
        """Time of one call for each routing, after one more that is not counted.

        x: (tokens, hidden) bfloat16; routings: (calls, tokens, k) int32; weights: (tokens, k) fp32.
        """
        return self._run(path, x, routings, weights, keep_output=False)

    def output(self, path: str, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """The peer's result, (tokens, hidden), widened to fp32."""
        self._run(path, x, expert_ids[None], weights, keep_output=True)
        return torch.from_numpy(np.load(self._folder / "out.npy"))

    def close(self) -> None:
        """End the worker and free what it holds. More calls do nothing."""
        if self._process.poll() is None:
            self._process.kill()  # it has nothing to save, and SIGKILL reaches stopped ones too
        self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self._log_path.open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(BENCH)},
            )

    def _run(
        self, path: str, x: Tensor, routings: Tensor, weights: Tensor, *, keep_output: bool
    ) -> list[float]:
        np.save(self._folder / "x.npy", bfloat16_bits(x))
        np.save(self._folder / "expert_ids.npy", routings.numpy())
        np.save(self._folder / "weights.npy", weights.numpy())
        request = {"do": "run", "folder": str(self._folder), "path": path}
        milliseconds: list[float] = self._ask({**request, "keep_output": keep_output})[
            "milliseconds"
        ]
        return milliseconds

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Wake the worker for one request, then stop it again."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(self._answer_seconds, self._process.kill)
        timer.start()
        try:
            self._process.send_signal(signal.SIGCONT)
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            raise PeerError(self._last_words())
        self._process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        """Why the worker ended without an answer."""
        status = self._process.wait()
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        if status == -signal.SIGKILL:
            how += f" (the bench kills it after {self._answer_seconds:g} s without an answer)"
        log = self._log_path.read_text(errors="replace").strip().splitlines()
        return f"its worker ended {how}: {log[-1] if log else 'it printed nothing'}"


def bfloat16_bits(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """The 16 bits of each element: numpy has no bfloat16."""
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)

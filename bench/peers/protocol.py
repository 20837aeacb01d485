"""What the bench and a peer's worker process say to each other.

Weights and calls go through files in a folder, numbers through one line of JSON per request and
answer. Runs in the workers' environments, so it knows numpy but neither torch nor HybridK2.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "GROUP",
    "MATRICES",
    "Call",
    "Engine",
    "Features",
    "Purpose",
    "Shape",
    "WeightFiles",
    "serve",
    "timed",
    "widen_bfloat16",
]

Purpose = Literal["speed", "accuracy"]

MATRICES = ("gate", "up", "down")
GROUP = 32  # weights that share a scale
WEIGHTS_PER_WORD = 8
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Shape:
    """Routed experts of one layer."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int

    def rows_columns(self, matrix: str) -> tuple[int, int]:
        if matrix == "down":
            return self.hidden, self.intermediate
        return self.intermediate, self.hidden


@dataclass(frozen=True)
class WeightFiles:
    """INT4 weights of all experts as a checkpoint holds them, one raw file a matrix and a kind.

    Nibble i of a packed word is weight i of eight neighbours in a
    row, plus 8; a group of 32 neighbours shares a bfloat16 scale, kept here as its 16 bits.
    """

    folder: Path
    shape: Shape

    def packed(self, matrix: str, mode: str = "r") -> NDArray[np.int32]:
        """(experts, rows, columns / 8); mode "w+" creates the file."""
        rows, columns = self.shape.rows_columns(matrix)
        size = (self.shape.experts, rows, columns // WEIGHTS_PER_WORD)
        return _mapped(self.folder / f"{matrix}.packed", np.int32, mode, size)

    def scale(self, matrix: str, mode: str = "r") -> NDArray[np.uint16]:
        """(experts, rows, columns / 32); mode "w+" creates the file."""
        rows, columns = self.shape.rows_columns(matrix)
        size = (self.shape.experts, rows, columns // GROUP)
        return _mapped(self.folder / f"{matrix}.scale", np.uint16, mode, size)


def _mapped(path: Path, dtype: type, mode: str, shape: tuple[int, ...]) -> NDArray[Any]:
    array: NDArray[Any] = np.memmap(path, dtype=dtype, mode=mode, shape=shape)  # type: ignore[call-overload]
    return array


@dataclass(frozen=True)
class Call:
    """One layer to compute: x (tokens, hidden) as bfloat16 bits, ids and weights (tokens, k)."""

    x: NDArray[np.uint16]
    expert_ids: NDArray[np.int32]
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class Features:
    """What a loaded engine says of itself.

    paths: its ways to compute the same, to be measured one by one. For "speed" the best counts; for
    "accuracy" there is one for each kind of arithmetic.
    """

    version: str
    paths: list[str]
    remarks: list[str]


class Engine(ABC):
    """A peer, as its worker process wraps it."""

    @abstractmethod
    def load(self, files: WeightFiles, threads: int, max_tokens: int, purpose: Purpose) -> Features:
        """Take the weights over; the files may disappear afterwards."""

    @abstractmethod
    def run(self, path: str, call: Call) -> tuple[float, NDArray[np.float32]]:
        """Seconds of the computation alone, and its result (tokens, hidden)."""


def widen_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def serve(create: Callable[[], Engine]) -> None:
    """Answer requests until standard input ends. What the engine itself prints goes to stderr."""
    # A stopped process outlives a bench that is killed, and holds the weights: die with it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _answer(answers, create, sys.stdin)


def _answer(answers: TextIO, create: Callable[[], Engine], requests: TextIO) -> None:
    engine: Engine | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                engine = create()
                answer = _load(engine, request)
            elif engine is not None:
                answer = _run(engine, request)
            else:
                raise RuntimeError("asked to run before weights were loaded")
        except Exception as error:  # noqa: BLE001  whatever fails, the bench shows it and goes on
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


def _load(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    files = WeightFiles(Path(request["folder"]), Shape(**request["shape"]))
    return asdict(engine.load(files, request["threads"], request["max_tokens"], request["purpose"]))


def _run(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """One call that is not timed (threads wake up, pages come in), then one per routing."""
    folder = Path(request["folder"])
    x = np.load(folder / "x.npy")
    routings = np.load(folder / "expert_ids.npy")
    weights = np.load(folder / "weights.npy")
    engine.run(request["path"], Call(x, routings[0], weights))
    milliseconds = []
    for expert_ids in routings:
        seconds, out = engine.run(request["path"], Call(x, expert_ids, weights))
        milliseconds.append(seconds * 1e3)
    if request["keep_output"]:
        np.save(folder / "out.npy", out)
    return {"milliseconds": milliseconds}


def timed(work: Callable[[], object]) -> float:
    """Seconds that one call of `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

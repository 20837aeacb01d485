"""Where bytes come from: memory of one NUMA node read by the cores of another, and a disk.

Owns the threads and their places. Knows nothing of weights; of a checkpoint's folder it knows that
its shards are large.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from hybridk2.errors import CheckpointError

Result = TypeVar("Result")

_NODE_BYTES = 1 << 30  # beside which no cache counts
_READS = 5
_DISK_THREADS = 8  # as many as loading uses
_DISK_BYTES = 4 << 30
_PIECE_BYTES = 8 << 20


def node_read_roofs(
    nodes: Sequence[Sequence[int]], node_bytes: int = _NODE_BYTES
) -> dict[str, float]:
    """Bytes per second of each node's memory to each node's cores; nothing on a single node.

    nodes: the CPUs of each. Those that this process may not run on are left out.
    """
    allowed = os.sched_getaffinity(0)
    usable = [cpus for node in nodes if (cpus := [cpu for cpu in node if cpu in allowed])]
    if len(usable) < 2:
        return {}
    roofs = {}
    for home, owners in enumerate(usable):
        words = node_bytes // len(owners) // 8
        # Pages lie on the node of the thread that first writes to them.
        fill = [functools.partial(np.ones, words, np.int64)] * len(owners)
        parts, _ = _on_cpus(owners, fill)
        for away, readers in enumerate(usable):
            shares = [_share(parts, number, len(readers)) for number in range(len(readers))]
            read = [functools.partial(_read, share) for share in shares]
            seconds = min(_on_cpus(readers, read)[1] for _ in range(_READS))
            name = f"memory of node {home}, cores of node {away}"
            roofs[name] = words * 8 * len(owners) / seconds
    return roofs


def disk_bytes_per_second(folder: Path) -> float:
    """How fast the shards in `folder` are read by eight threads, what the cache holds dropped.

    Reads 4 GB at most. Raises CheckpointError when there is nothing to read.
    """
    pieces: list[tuple[int, int]] = []
    files = []
    try:
        for path in sorted(folder.glob("*.safetensors")):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            files.append(descriptor)
            size = os.fstat(descriptor).st_size
            os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
            pieces.extend((descriptor, at) for at in range(0, size, _PIECE_BYTES))
            if len(pieces) * _PIECE_BYTES >= _DISK_BYTES:
                break
        if not pieces:
            raise CheckpointError(
                f"{folder}: there are no shards whose reading could be measured. Name a folder "
                "with *.safetensors, or none"
            )
        pieces = pieces[: _DISK_BYTES // _PIECE_BYTES]
        begin = time.perf_counter()
        with ThreadPoolExecutor(_DISK_THREADS, thread_name_prefix="hybridk2-disk") as pool:
            read = pool.map(lambda piece: len(os.pread(piece[0], _PIECE_BYTES, piece[1])), pieces)
            done = sum(read)
        return done / (time.perf_counter() - begin)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from error
    finally:
        for descriptor in files:
            os.close(descriptor)


def _share(parts: Sequence[np.ndarray], number: int, count: int) -> list[np.ndarray]:
    """The share `number` of `count` of every part."""
    return [part[part.size * number // count : part.size * (number + 1) // count] for part in parts]


def _read(parts: Sequence[np.ndarray]) -> int:
    """Something that depends on every word. numpy lets other threads run meanwhile."""
    return sum(int(part.sum()) for part in parts)


def _on_cpus(
    cpus: Sequence[int], work: Sequence[Callable[[], Result]]
) -> tuple[list[Result], float]:
    """Run each piece of work on a CPU of its own, all at once; the results and the seconds."""
    together = threading.Barrier(len(cpus) + 1)

    def run(cpu: int, piece: Callable[[], Result]) -> Result:
        try:
            os.sched_setaffinity(0, {cpu})  # of this thread
            together.wait()
        except BaseException:
            together.abort()
            raise
        return piece()

    with ThreadPoolExecutor(len(cpus), thread_name_prefix="hybridk2-node") as pool:
        futures = [pool.submit(run, cpu, piece) for cpu, piece in zip(cpus, work, strict=True)]
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait()  # a thread that broke it raises why, below
        begin = time.perf_counter()
        return [future.result() for future in futures], time.perf_counter() - begin

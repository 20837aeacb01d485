"""SHA-256 of a checkpoint's files against a published list.

Reads lists in the format of `sha256sum`. Owns the hashing, several files at a time, and knows
nothing of what the files contain.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hybridk2.checkpoint import LoadProgress
from hybridk2.errors import CheckpointError

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_READ_BYTES = 4 << 20  # large enough for a disk's full rate, small enough to stay in the cache
# A core hashes 0.5 to 2 GB/s, an NVMe drive reads up to 14: more threads than files help nobody.
_MAX_THREADS = 8
_PROGRESS_SECONDS = 0.1


@dataclass(frozen=True)
class FileChecksum:
    """One line of the list. `found` is None when the folder lacks the file."""

    name: str
    expected: str
    found: str | None

    @property
    def passed(self) -> bool:
        return self.found == self.expected


def read_list(path: Path) -> dict[str, str]:
    """File names and their hexadecimal SHA-256, from a list as `sha256sum` writes it.

    Raises CheckpointError for a line of another form, a name outside the folder, or no line at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a list of checksums: {error}") from error
    sums: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise CheckpointError(
                f"{path}:{number}: expected 64 hexadecimal digits, two spaces and a file name, as "
                f"`sha256sum` writes them, found {line[:100]!a}"
            )
        name = PurePosixPath(match[2])
        if name.is_absolute() or ".." in name.parts:
            raise CheckpointError(
                f"{path}:{number}: expected a file inside the checkpoint's folder, found "
                f"{match[2][:100]!a}"
            )
        digest = match[1].lower()
        if sums.setdefault(str(name), digest) != digest:
            raise CheckpointError(f"{path}:{number}: {name} is listed twice with different sums")
    if not sums:
        raise CheckpointError(f"{path}: the list of checksums is empty")
    return sums


def unlisted_shards(folder: Path, sums: dict[str, str]) -> list[str]:
    """Weight files in the folder that the list says nothing about."""
    return sorted(path.name for path in folder.glob("*.safetensors") if path.name not in sums)


def check_files(
    folder: Path, sums: dict[str, str], on_progress: Callable[[LoadProgress], None]
) -> list[FileChecksum]:
    """Hash every listed file and say what was expected and found, in the list's order.

    on_progress: called from the calling thread about ten times a second, and once at the end.
    Raises CheckpointError when a file cannot be read to its end.
    """
    hashing = _Hashing(folder)
    total_bytes = sum((folder / name).stat().st_size for name in sums if (folder / name).is_file())
    start = time.monotonic()

    def report() -> None:
        seconds = time.monotonic() - start
        on_progress(LoadProgress("sha256", hashing.done_bytes, total_bytes, seconds))

    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(num_threads, thread_name_prefix="hybridk2-sha256") as pool:
        futures = [pool.submit(hashing.file, name) for name in sums]
        try:
            running: set[Future[str | None]] = set(futures)
            while running:
                done, running = wait(running, _PROGRESS_SECONDS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                report()
        finally:
            hashing.stopped = True
    return [
        FileChecksum(name, expected, future.result())
        for (name, expected), future in zip(sums.items(), futures, strict=True)
    ]


class _Hashing:
    """What the hashing threads share: how far they are, and whether to go on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self.done_bytes = 0
        self.stopped = False

    def file(self, name: str) -> str | None:
        """The file's SHA-256, or None when there is no such file."""
        path = self._folder / name
        if not path.is_file():
            return None
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_READ_BYTES))
        try:
            with path.open("rb", buffering=0) as file:
                while not self.stopped and (count := file.readinto(buffer)):
                    digest.update(buffer[:count])
                    with self._lock:
                        self.done_bytes += count
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        return digest.hexdigest()

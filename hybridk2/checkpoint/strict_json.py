"""JSON objects from files that nobody vouches for: shard headers, the index, config.json.

Owns the refusal of what Python's json module lets through: duplicate keys (the last one would win
silently), NaN and Infinity, endless nesting, integers of thousands of digits. It knows nothing of
what the objects mean.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from hybridk2.errors import CheckpointError

# The index of all 208,215 tensors of K2 is about 20 MB; nothing else in a checkpoint comes near.
_MAX_FILE_BYTES = 256 << 20

_DOWNLOAD_HINT = "Is the download complete?"


def shown(value: object, limit: int = 120) -> str:
    """`value` as an error message may carry it: ASCII, one line, not endless."""
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def parse_object(raw: bytes, source: str) -> dict[str, Any]:
    """Parse `raw` as one JSON object; `source` is how errors call it.

    Raises CheckpointError when it is not UTF-8, not JSON, not an object, or says a key twice.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except RecursionError as error:
        raise CheckpointError(f"{source}: JSON is nested too deeply. {_DOWNLOAD_HINT}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{source}: not valid JSON: {shown(str(error))}. {_DOWNLOAD_HINT}"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{source}: expected a JSON object, found {type(value).__name__}. {_DOWNLOAD_HINT}"
        )
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Read and parse a JSON file. Raises CheckpointError, also when it cannot be read."""
    try:
        # O_NONBLOCK: a named pipe in the place of the file must not hang the program.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: expected a file, found something else of that name")
        if status.st_size > _MAX_FILE_BYTES:
            raise CheckpointError(
                f"{path}: expected at most {_MAX_FILE_BYTES} bytes, found {status.st_size}"
            )
        try:
            raw = file.read()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    refuse_lfs_pointer(raw, path)
    return parse_object(raw, str(path))


def refuse_lfs_pointer(first_bytes: bytes, path: Path) -> None:
    """Recognise the note that git leaves in the place of a large file that was not fetched."""
    if first_bytes.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: this is a Git LFS pointer, not the file itself. "
            "Run `git lfs install && git lfs pull` in the checkpoint's folder"
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} occurs twice")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

"""Files that are whole or not there: the order of system calls that survives crashes.

Owns the replacement of one file by another version of itself. Knows nothing of what is in it; the
caller keeps other writers out.
"""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path`, whole or not at all, readable by its owner only.

    A temporary file is written, flushed to the disk and renamed over the old one; `flush_folder`
    then makes the rename durable. Its name is made of the file's: what a killed process left there
    is overwritten by the next call instead of piling up. Raises OSError; the previous file is then
    untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C as well
        temporary.unlink(missing_ok=True)
        raise


def flush_folder(folder: Path) -> None:
    """Make renames and removals in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

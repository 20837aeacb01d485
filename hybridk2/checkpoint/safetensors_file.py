"""One safetensors file: its header, checked to the byte, and reads that cannot crash.

A safetensors file is eight bytes of little-endian header length, a JSON header that gives every
tensor's dtype, shape and byte range, and the tensors' data without gaps. This module owns that
format and nothing above it: it does not know which tensors a model should have.

Nothing is memory-mapped. A mapped file that shrinks kills the process with SIGBUS; a short read is
an error with a name.
"""

from __future__ import annotations

import math
import os
import stat
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hybridk2.checkpoint.strict_json import parse_object, refuse_lfs_pointer, shown
from hybridk2.errors import CheckpointError

# Bits per element of every dtype that the format knows. HybridK2 computes with three of them; the
# others may occur in tensors it passes over (the vision part of K2.5).
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64,
}  # fmt: skip

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMENSIONS = 8
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


class TensorEntry(NamedTuple):
    """Where one tensor lies. `offset` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class SafetensorsFile:
    """An open safetensors file whose header has been checked against the file's size.

    Reads are positional, so any number of threads may share one object.
    """

    def __init__(self, path: Path, descriptor: int, tensors: dict[str, TensorEntry]) -> None:
        self.path = path
        self.tensors = tensors
        self._descriptor = descriptor
        self._finalizer = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Open `path` and check its header; no tensor data is read.

        Raises CheckpointError naming the file, and the tensor where one is at fault.
        """
        try:
            # O_NONBLOCK: a named pipe in the place of a shard must not hang the program.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            tensors = _read_header(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, tensors)

    def close(self) -> None:
        self._finalizer()

    def read_into(self, offset: int, buffers: Sequence[memoryview], what: str) -> None:
        """Fill the byte `buffers`, one after another, with the file's bytes from `offset` on.

        what: the tensor that an error names. Raises CheckpointError when the bytes are not there.
        """
        left = [buffer for buffer in buffers if len(buffer)]
        while left:
            try:
                count = os.preadv(self._descriptor, left, offset)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: {what}: cannot be read: {error.strerror}"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: {what}: the file ends at byte {offset}, in the middle of this "
                    "tensor; it was whole when it was opened. Is something writing to it?"
                )
            offset += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]

    def forget(self, offset: int, num_bytes: int) -> None:
        """Tell the kernel that these bytes will not be read again, so it need not cache them."""
        os.posix_fadvise(self._descriptor, offset, num_bytes, os.POSIX_FADV_DONTNEED)


def _read_header(path: Path, descriptor: int) -> dict[str, TensorEntry]:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: expected a file, found something else of that name")
    first_bytes = _pread(path, descriptor, 64, 0)
    refuse_lfs_pointer(first_bytes, path)
    if len(first_bytes) < _LENGTH_BYTES:
        raise CheckpointError(
            f"{path}: expected a safetensors file, found {status.st_size} bytes. "
            "Is the download complete?"
        )
    header_bytes = int.from_bytes(first_bytes[:_LENGTH_BYTES], "little")
    limit = min(_MAX_HEADER_BYTES, status.st_size - _LENGTH_BYTES)
    if header_bytes > limit:
        raise CheckpointError(
            f"{path}: expected a header of at most {limit} bytes in this file of "
            f"{status.st_size}, found a header length of {header_bytes}. Is the download complete?"
        )
    raw = _pread(path, descriptor, header_bytes, _LENGTH_BYTES)
    if len(raw) != header_bytes:
        raise CheckpointError(
            f"{path}: expected a header of {header_bytes} bytes, could read {len(raw)}. "
            "Is the download complete?"
        )
    # The format pads a header with spaces and starts it with its brace; other white space that a
    # JSON parser would pass over is damage.
    if not raw.startswith(b"{") or not raw.rstrip(b" ").endswith(b"}"):
        raise CheckpointError(
            f"{path}: header: expected a JSON object padded with spaces, found "
            f"{shown(raw[:16])} ... {shown(raw[-16:])}. Is the download complete?"
        )
    header = parse_object(raw, f"{path}: header")
    _check_metadata(header.pop("__metadata__", None), path)
    data_start = _LENGTH_BYTES + header_bytes
    tensors = {name: _entry(path, name, value, data_start) for name, value in header.items()}
    _check_ranges(path, tensors, data_start, status.st_size)
    return tensors


def _pread(path: Path, descriptor: int, num_bytes: int, offset: int) -> bytes:
    try:
        return os.pread(descriptor, num_bytes, offset)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _check_metadata(metadata: Any, path: Path) -> None:
    """Metadata is optional; where it is given it must name PyTorch, as transformers demands too."""
    if metadata is not None and (
        not isinstance(metadata, dict)
        or not all(isinstance(value, str) for value in metadata.values())
        or metadata.get("format") != "pt"
    ):
        raise CheckpointError(
            f'{path}: __metadata__: expected strings with "format": "pt", found {shown(metadata)}'
        )


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != _ENTRY_KEYS:
        raise _damage(
            path,
            name,
            f"expected dtype, shape and data_offsets in the header, found {shown(value)}",
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise _damage(path, name, f"unknown dtype {shown(dtype)}")
    if not _is_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise _damage(path, name, f"{shown(shape)} is no shape")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damage(path, name, f"data_offsets {shown(offsets)} are no byte range")
    begin, end = offsets
    expected_bytes = math.prod(shape) * bits // 8
    if end - begin != expected_bytes:
        raise _damage(
            path,
            name,
            f"{dtype} {shown(tuple(shape))} takes {shown(expected_bytes)} bytes, "
            f"found data_offsets {shown(offsets)}, which are {shown(end - begin)}",
        )
    return TensorEntry(dtype, tuple(shape), data_start + begin, expected_bytes)


def _damage(path: Path, name: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: {_name(name)}: {problem}. Is the download complete?")


def _is_counts(value: Any) -> bool:
    """Whether this is a list of non-negative 63-bit integers. JSON's may be far longer."""
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 1 << 63 for item in value
    )


def _check_ranges(
    path: Path, tensors: dict[str, TensorEntry], data_start: int, file_bytes: int
) -> None:
    """The data must be covered once: no overlap, no hole, nothing behind the last tensor."""
    position = data_start
    previous = "the header"
    for name, entry in sorted(
        tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)
    ):
        if entry.offset != position:
            relation = "overlaps" if entry.offset < position else "leaves a hole after"
            raise _damage(
                path,
                name,
                f"starts at byte {shown(entry.offset)} and {relation} {_name(previous)}, "
                f"which ends at byte {shown(position)}",
            )
        position += entry.num_bytes
        if position > file_bytes:
            raise _damage(
                path, name, f"ends at byte {shown(position)}, the file at byte {file_bytes}"
            )
        previous = name
    if position != file_bytes:
        raise CheckpointError(
            f"{path}: expected {position} bytes as its header says, found {file_bytes}. "
            "Is the download complete?"
        )


def _name(name: str) -> str:
    """A tensor name from the file as a message carries it: plain when it is plain."""
    return name if name.isascii() and name.isprintable() and len(name) < 200 else shown(name)

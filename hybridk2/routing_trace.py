"""Routing traces: which experts every decoded token picked, on disk and as an array.

Owns the file format, and how a running model fills such a file. A trace holds ids of experts only:
no text, no tokens, no times. Knows nothing of models beyond their number of layers and experts.

The format, version 1, little-endian:

    magic "HK2ROUTE", u32 version, u32 bytes of the header, u32 CRC-32 of the header
    header: a JSON object with the fields of TraceHeader
    blocks: u32 tokens, u32 payload bytes, u32 CRC-32 of the payload, u32 CRC-32 of these 12 bytes;
            payload: ids (tokens, layers, top_k) as one plane of their low bytes, then one plane of
            packed bits (first id in the lowest bit) for each higher bit that an id can have

K2's 384 experts take 9 bits: 540 bytes a token. A block is written and flushed as one, so what an
interruption leaves is whole blocks and at most one torn one, which is cut off when the file is
continued. Anything else that does not match is damage, and the file is refused by its name.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hybridk2.durable_file import flush_folder
from hybridk2.errors import TuningError

logger = logging.getLogger(__name__)

Ids = NDArray[np.unsignedinteger[Any]]

MAGIC = b"HK2ROUTE"
VERSION = 1
# A server's block: 140 KB for K2, flushed every few seconds.
SERVED_BLOCK_TOKENS = 256

_START = struct.Struct("<8sIII")
_BLOCK = struct.Struct("<III")
_CHECK = struct.Struct("<I")
_MAX_HEADER_BYTES = 1 << 16
_LIMITS = {"layers": 1_000, "experts": 4_096, "top_k": 4_096}


@dataclass(frozen=True)
class TraceHeader:
    """What a trace is of.

    model: the routing fingerprint. layers: MoE layers. source: what was run, so that a trace is
    continued with the same only: a hash of the workload, or "server".
    """

    model: str
    layers: int
    experts: int
    top_k: int
    source: str

    def payload_bytes(self, tokens: int) -> int:
        """Bytes of a block of so many tokens, without its 16 bytes of lengths and checksums."""
        ids = tokens * self.layers * self.top_k
        return ids + self.high_bits * -(-ids // 8)

    @property
    def high_bits(self) -> int:
        """Bits of an id beyond its low byte."""
        return max((self.experts - 1).bit_length() - 8, 0)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.high_bits else np.uint8)


@dataclass(frozen=True)
class RoutingTrace:
    """A trace in memory. ids: (layers, tokens, top_k), uint8 or uint16. blocks: how many it had,
    one for each prompt where a workload was run."""

    header: TraceHeader
    ids: Ids
    blocks: int

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]


def read_trace(path: Path) -> RoutingTrace:
    """Read a whole trace; a torn last block is left out. Raises TuningError for anything else."""
    try:
        with open(path, "rb") as file:
            header = _read_header(file, path)
            sizes, _ = _scan(file, path, header)
            ids = np.empty((header.layers, sum(sizes), header.top_k), header.dtype)
            file.seek(0)
            _read_header(file, path)
            start = 0
            for _, tokens, payload in _blocks(file, path, header):
                block = _unpacked(payload, tokens, header)
                if block.size and int(block.max()) >= header.experts:
                    raise TuningError(
                        f"{path}: damaged: expert {int(block.max())} of {header.experts}"
                    )
                ids[:, start : start + tokens] = block.swapaxes(0, 1)
                start += tokens
    except OSError as error:
        raise TuningError(f"{path}: cannot be read: {error.strerror}") from error
    return RoutingTrace(header, ids, len(sizes))


class TraceWriter:
    """A trace that is being written. One process at a time; `blocks` are whole on the disk."""

    def __init__(self, path: Path, header: TraceHeader) -> None:
        """Begin a trace at `path`, or continue the one that is there.

        Raises TuningError when what is there is damaged, of another model or source, or being
        written by another process.
        """
        self.path = path
        self.header = header
        self.blocks = 0
        self.tokens = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            # Unbuffered: nothing is left to be flushed after a failure.
            self._file = open(os.open(path, flags, 0o600), "r+b", buffering=0)  # noqa: SIM115
            try:
                self._open()
            except BaseException:
                self._file.close()
                raise
        except BlockingIOError as error:
            raise TuningError(f"{path}: another process is writing this trace") from error
        except OSError as error:
            raise TuningError(f"{path}: cannot be written: {error.strerror}") from error

    def _open(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        start = _header_bytes(self.header)
        found = self._file.read(len(start))
        if len(found) < len(start) and start.startswith(found):  # new, or torn at its very start
            self._file.seek(0)
            self._file.truncate()
            self._write(start)
            flush_folder(self.path.absolute().parent)
            return
        self._file.seek(0)
        header = _read_header(self._file, self.path)
        for name, expected in asdict(self.header).items():
            if getattr(header, name) != expected:
                raise TuningError(
                    f"{self.path}: a trace of another {name}: expected {expected!r}, found "
                    f"{getattr(header, name)!r}. Name another file, or remove this one"
                )
        sizes, end = _scan(self._file, self.path, header)
        self.blocks, self.tokens = len(sizes), sum(sizes)
        self._file.seek(end)
        self._file.truncate()

    def append(self, ids: Ids) -> None:
        """Write one block, durably. ids: (tokens, layers, top_k). Raises TuningError."""
        tokens = len(ids)
        assert ids.shape[1:] == (self.header.layers, self.header.top_k), f"ids: {ids.shape}"
        payload = _packed(ids, self.header)
        lengths = _BLOCK.pack(tokens, len(payload), zlib.crc32(payload))
        end = self._file.tell()
        try:
            self._write(lengths + _CHECK.pack(zlib.crc32(lengths)) + payload)
        except OSError as error:
            self._file.seek(end)
            self._file.truncate()
            raise TuningError(f"{self.path}: cannot be written: {error.strerror}") from error
        self.blocks += 1
        self.tokens += tokens

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TraceRecorder:
    """Collects what a model picks, layer by layer, and hands whole blocks to a writer."""

    def __init__(self, writer: TraceWriter, block_tokens: int | None = None) -> None:
        """block_tokens: write a block by oneself whenever so many tokens came. A disk that refuses
        then ends the recording with a line in the log, not the step that was being recorded."""
        self._writer: TraceWriter | None = writer
        self._block_tokens = block_tokens
        self._header = writer.header
        self._step: list[Ids] = []
        self._steps: list[Ids] = []
        self._tokens = 0

    def picked(self, slot: int, expert_ids: Ids) -> None:
        """One layer of a step. expert_ids: (tokens, top_k). A step whose layers did not all come,
        as it failed, is forgotten when the next one begins."""
        if slot == 0:
            self._step.clear()
        self._step.append(expert_ids.astype(self._header.dtype))
        if len(self._step) < self._header.layers:
            return
        self._steps.append(np.stack(self._step, axis=1))
        self._tokens += len(expert_ids)
        self._step.clear()
        if self._block_tokens is not None and self._tokens >= self._block_tokens:
            self._end_block_or_stop()

    def end_block(self) -> None:
        """Write what came since the last block, be it nothing. Raises TuningError."""
        steps, self._steps, self._tokens = self._steps, [], 0
        if self._writer is not None:
            header = self._header
            none = np.empty((0, header.layers, header.top_k), header.dtype)
            self._writer.append(np.concatenate([none, *steps]))

    def close(self) -> None:
        """Close the file, after what is left where blocks are written by oneself. Never raises."""
        if self._tokens and self._block_tokens is not None:
            self._end_block_or_stop()
        self._stop()

    def _end_block_or_stop(self) -> None:
        try:
            self.end_block()
        except TuningError as error:
            logger.error("routing is no longer recorded: %s", error)
            self._stop()

    def _stop(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


def _packed(ids: Ids, header: TraceHeader) -> bytes:
    flat = ids.ravel()
    planes = [(flat & 0xFF).astype(np.uint8).tobytes()]
    for bit in range(8, 8 + header.high_bits):
        planes.append(np.packbits((flat >> bit) & 1, bitorder="little").tobytes())
    return b"".join(planes)


def _unpacked(payload: bytes, tokens: int, header: TraceHeader) -> Ids:
    count = tokens * header.layers * header.top_k
    planes = np.frombuffer(payload, np.uint8)
    ids = planes[:count].astype(header.dtype)
    plane_bytes = -(-count // 8)
    for bit in range(header.high_bits):
        start = count + bit * plane_bytes
        plane = planes[start : start + plane_bytes]
        high = np.unpackbits(plane, count=count, bitorder="little").astype(header.dtype)
        ids |= high << (8 + bit)
    return ids.reshape(tokens, header.layers, header.top_k)


def _header_bytes(header: TraceHeader) -> bytes:
    text = json.dumps(asdict(header), separators=(",", ":")).encode("ascii")
    return _START.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text


def _read_header(file: IO[bytes], path: Path) -> TraceHeader:
    start = file.read(_START.size)
    if len(start) < _START.size or not start.startswith(MAGIC):
        raise TuningError(f"{path}: not a routing trace of HybridK2")
    _, version, length, checksum = _START.unpack(start)
    if version != VERSION:
        raise TuningError(f"{path}: trace version {version}; this program reads {VERSION}")
    text = file.read(min(length, _MAX_HEADER_BYTES))
    if len(text) != length or zlib.crc32(text) != checksum:
        raise TuningError(f"{path}: damaged: its header does not match its checksum")
    try:
        header = TraceHeader(**json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise TuningError(f"{path}: damaged: its header is not a trace's ({error})") from error
    for name, limit in _LIMITS.items():
        value = getattr(header, name)
        if type(value) is not int or not 1 <= value <= limit:
            raise TuningError(f"{path}: damaged: {name}: expected 1 to {limit}, found {value!r}")
    return header


def _scan(file: IO[bytes], path: Path, header: TraceHeader) -> tuple[list[int], int]:
    """Tokens of each whole block, and where the last of them ends."""
    end = file.tell()
    sizes = []
    for end, tokens, _ in _blocks(file, path, header):  # noqa: B007 - the last one is returned
        sizes.append(tokens)
    return sizes, end


def _blocks(file: IO[bytes], path: Path, header: TraceHeader) -> Iterator[tuple[int, int, bytes]]:
    """Whole blocks from where the file stands: where each ends, its tokens, its payload.

    Ends at a block that the file ends within. Raises TuningError for checksums that do not match.
    """
    where = file.tell()
    while len(start := file.read(_BLOCK.size + _CHECK.size)) == _BLOCK.size + _CHECK.size:
        lengths, (check,) = start[: _BLOCK.size], _CHECK.unpack(start[_BLOCK.size :])
        tokens, payload_bytes, checksum = _BLOCK.unpack(lengths)
        if zlib.crc32(lengths) != check or payload_bytes != header.payload_bytes(tokens):
            raise TuningError(f"{path}: damaged: the block at byte {where} has a wrong length")
        payload = file.read(payload_bytes)
        if len(payload) < payload_bytes:
            return
        if zlib.crc32(payload) != checksum:
            raise TuningError(
                f"{path}: damaged: the block at byte {where} does not match its checksum"
            )
        where = file.tell()
        yield where, tokens, payload

"""Routing traces: which experts every decoded token picked, on disk and as an array.

Owns the file format, and how a running model fills such a file. A trace holds ids of experts, and
which tokens ran together and followed one another: no text, no tokens, no times. Knows nothing of
models beyond their number of layers and experts.

The format, version 2, little-endian:

    magic "HK2ROUTE", u32 version, u32 bytes of the header, u32 CRC-32 of the header
    header: a JSON object with the fields of TraceHeader
    blocks: u32 tokens, u32 payload bytes, u32 CRC-32 of the payload, u32 CRC-32 of these 12 bytes;
            payload: ids (tokens, layers, top_k) as one plane of their low bytes, then one plane of
            packed bits (first id in the lowest bit) for each higher bit that an id can have; then
            a byte for each token, the number of its request modulo 256, and packed bits that say
            with which tokens a step began

Tokens are in the order in which they ran, those of one step in that of its rows. Version 1 ended
after the ids; it is read as if each block were one request, decoded alone.

K2's 384 experts take 9 bits: 541 bytes a token. A block is written and flushed as one, so what an
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
from collections.abc import Iterator, Sequence
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
VERSION = 2
_WITHOUT_STEPS = 1
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

    def payload_bytes(self, tokens: int, version: int = VERSION) -> int:
        """Bytes of a block of so many tokens, without its 16 bytes of lengths and checksums."""
        steps = tokens + -(-tokens // 8) if version != _WITHOUT_STEPS else 0
        return self.id_bytes(tokens) + steps

    def id_bytes(self, tokens: int) -> int:
        """Of a block's payload, those that hold the ids."""
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
    one for each prompt where a workload was run. requests: (tokens,), which of them are of one
    request, by a number that comes again after 256 requests. begins: (tokens,), True for the first
    token of each step."""

    header: TraceHeader
    ids: Ids
    blocks: int
    requests: NDArray[np.uint8]
    begins: NDArray[np.bool_]

    @classmethod
    def of_one_request(cls, header: TraceHeader, ids: Ids) -> RoutingTrace:
        """Tokens that were decoded one after another. ids: as above."""
        tokens = ids.shape[1]
        return cls(header, ids, 1, np.zeros(tokens, np.uint8), np.ones(tokens, bool))

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def steps(self) -> int:
        """In how many steps the tokens were decoded."""
        return int(self.begins.sum())


def read_trace(path: Path) -> RoutingTrace:
    """Read a whole trace; a torn last block is left out. Raises TuningError for anything else."""
    try:
        with open(path, "rb") as file:
            header, version = _read_header(file, path)
            begin = file.tell()
            sizes, _ = _scan(file, path, header, version)
            ids = np.empty((header.layers, sum(sizes), header.top_k), header.dtype)
            requests = np.repeat(np.arange(len(sizes)), sizes).astype(np.uint8)
            begins = np.ones(sum(sizes), bool)
            file.seek(begin)
            start = 0
            for _, tokens, payload in _blocks(file, path, header, version):
                block = _unpacked(payload, tokens, header)
                if block.size and int(block.max()) >= header.experts:
                    raise TuningError(
                        f"{path}: damaged: expert {int(block.max())} of {header.experts}"
                    )
                here = slice(start, start + tokens)
                ids[:, here] = block.swapaxes(0, 1)
                if version != _WITHOUT_STEPS:
                    requests[here], begins[here] = _unpacked_steps(payload, tokens, header)
                start += tokens
    except OSError as error:
        raise TuningError(f"{path}: cannot be read: {error.strerror}") from error
    return RoutingTrace(header, ids, len(sizes), requests, begins)


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
        header, version = _read_header(self._file, self.path)
        if version != VERSION:
            raise TuningError(
                f"{self.path}: trace version {version} is read, but not continued: name another "
                "file, or remove this one"
            )
        for name, expected in asdict(self.header).items():
            if getattr(header, name) != expected:
                raise TuningError(
                    f"{self.path}: a trace of another {name}: expected {expected!r}, found "
                    f"{getattr(header, name)!r}. Name another file, or remove this one"
                )
        sizes, end = _scan(self._file, self.path, header, version)
        self.blocks, self.tokens = len(sizes), sum(sizes)
        self._file.seek(end)
        self._file.truncate()

    def append(
        self,
        ids: Ids,
        requests: NDArray[np.uint8] | None = None,
        begins: NDArray[np.bool_] | None = None,
    ) -> None:
        """Write one block, durably. ids: (tokens, layers, top_k). requests, begins: (tokens,), as
        in RoutingTrace; None for a block of one request, decoded alone. Raises TuningError."""
        tokens = len(ids)
        if requests is None:
            requests = np.full(tokens, self.blocks % 256, np.uint8)
        if begins is None:
            begins = np.ones(tokens, bool)
        assert requests.shape == begins.shape == (tokens,), f"{requests.shape}, {begins.shape}"
        assert ids.shape[1:] == (self.header.layers, self.header.top_k), f"ids: {ids.shape}"
        payload = _packed(ids, self.header)
        payload += requests.tobytes() + np.packbits(begins, bitorder="little").tobytes()
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
        self._blocks = writer.blocks
        # What a request's number is here is its own less this; None: the next one tells.
        self._origin: int | None = None
        self._step_requests: list[int] = []
        self._step: list[Ids] = []
        self._steps: list[Ids] = []
        self._requests: list[int] = []
        self._begins: list[bool] = []

    def begin_step(self, requests: Sequence[int]) -> None:
        """A step begins with a token of each of these requests, by their numbers. A step before it
        whose layers did not all come, as it failed, is forgotten."""
        if self._origin is None:
            self._origin = requests[0] - self._blocks
        self._step_requests = [(request - self._origin) % 256 for request in requests]
        self._step.clear()

    def picked(self, slot: int, expert_ids: Ids) -> None:
        """One layer of the step, in order. expert_ids: (tokens, top_k)."""
        assert len(self._step) == slot, f"layer {slot} after {len(self._step)}"
        self._step.append(expert_ids.astype(self._header.dtype))
        if len(self._step) < self._header.layers:
            return
        self._steps.append(np.stack(self._step, axis=1))
        self._requests += self._step_requests
        self._begins += [True] + [False] * (len(expert_ids) - 1)
        self._step.clear()
        if self._block_tokens is not None and len(self._requests) >= self._block_tokens:
            self._end_block_or_stop()

    def end_block(self) -> None:
        """Write what came since the last block, be it nothing. Raises TuningError."""
        steps, self._steps = self._steps, []
        requests, self._requests = np.array(self._requests, np.uint8), []
        begins, self._begins = np.array(self._begins, bool), []
        self._blocks += 1
        if self._block_tokens is None:
            self._origin = None  # a block for each prompt: numbered as if all ran in one go
        if self._writer is not None:
            header = self._header
            none = np.empty((0, header.layers, header.top_k), header.dtype)
            self._writer.append(np.concatenate([none, *steps]), requests, begins)

    def close(self) -> None:
        """Close the file, after what is left where blocks are written by oneself. Never raises."""
        if self._requests and self._block_tokens is not None:
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


def _unpacked_steps(
    payload: bytes, tokens: int, header: TraceHeader
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """requests and begins of a block."""
    values = np.frombuffer(payload, np.uint8, offset=header.id_bytes(tokens))
    begins = np.unpackbits(values[tokens:], count=tokens, bitorder="little")
    return values[:tokens], begins.astype(bool)


def _header_bytes(header: TraceHeader) -> bytes:
    text = json.dumps(asdict(header), separators=(",", ":")).encode("ascii")
    return _START.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text


def _read_header(file: IO[bytes], path: Path) -> tuple[TraceHeader, int]:
    """The header, and the version of what follows it."""
    start = file.read(_START.size)
    if len(start) < _START.size or not start.startswith(MAGIC):
        raise TuningError(f"{path}: not a routing trace of HybridK2")
    _, version, length, checksum = _START.unpack(start)
    if version not in (_WITHOUT_STEPS, VERSION):
        raise TuningError(
            f"{path}: trace version {version}; this program reads {_WITHOUT_STEPS} and {VERSION}"
        )
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
    return header, version


def _scan(file: IO[bytes], path: Path, header: TraceHeader, version: int) -> tuple[list[int], int]:
    """Tokens of each whole block, and where the last of them ends."""
    end = file.tell()
    sizes = []
    for end, tokens, _ in _blocks(file, path, header, version):  # noqa: B007 - the last one is returned
        sizes.append(tokens)
    return sizes, end


def _blocks(
    file: IO[bytes], path: Path, header: TraceHeader, version: int
) -> Iterator[tuple[int, int, bytes]]:
    """Whole blocks from where the file stands: where each ends, its tokens, its payload.

    Ends at a block that the file ends within. Raises TuningError for checksums that do not match.
    """
    where = file.tell()
    while len(start := file.read(_BLOCK.size + _CHECK.size)) == _BLOCK.size + _CHECK.size:
        lengths, (check,) = start[: _BLOCK.size], _CHECK.unpack(start[_BLOCK.size :])
        tokens, payload_bytes, checksum = _BLOCK.unpack(lengths)
        if zlib.crc32(lengths) != check or payload_bytes != header.payload_bytes(tokens, version):
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

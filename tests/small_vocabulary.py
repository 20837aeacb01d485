"""A vocabulary small enough to reason about: the 256 bytes, a few merges, K2's control tokens."""

import base64
from pathlib import Path

from hybridk2.tokenizer import Tokenizer

# Every prefix is there, so that byte pair merging reaches the longer ones.
MERGES = [
    b"he",
    b"ll",
    b"hell",
    b"hello",
    b" w",
    b" wo",
    b"th",
    b"in",
    b"thin",
    b"think",
    b"\xe4\xbd",
]
BASE_TOKENS = [bytes([byte]) for byte in range(256)] + MERGES


def small_tokenizer() -> Tokenizer:
    return Tokenizer(BASE_TOKENS)


def vocabulary_lines(tokens: list[bytes] = BASE_TOKENS) -> list[bytes]:
    """The lines of a tiktoken.model file."""
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


def write_vocabulary(folder: Path, lines: list[bytes] | None = None) -> Path:
    """Write tiktoken.model into `folder`, and return the folder."""
    lines = vocabulary_lines() if lines is None else lines
    (folder / "tiktoken.model").write_bytes(b"".join(line + b"\n" for line in lines))
    return folder

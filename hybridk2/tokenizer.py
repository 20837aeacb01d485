"""Text to token ids and back, for tiktoken-format vocabularies with Kimi K2's control tokens.

Owns the vocabulary file, the split rule, the numbering of control tokens and incremental UTF-8
decoding. Knows nothing of messages, roles or tool calls (chat/), nor of tensors.

Numbering: the base vocabulary has ids 0..base-1, the next 256 ids are reserved for control tokens,
some of them named. K2-Thinking: base 163,584, so 163,840 ids in all.
"""

import binascii
import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken

from hybridk2.errors import TokenizerError

RESERVED_TOKENS = 256

VOCABULARY_FILE = "tiktoken.model"
CONFIG_FILE = "tokenizer_config.json"

# Published names, as offsets from the size of the base vocabulary (tokenizer_config.json of the
# Kimi K2 family; the two thinking tokens came with K2-Thinking).
PUBLISHED_CONTROL_TOKENS: Mapping[int, str] = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    18: "<|media_begin|>",
    19: "<|media_content|>",
    20: "<|media_end|>",
    21: "<|media_pad|>",
    22: "<think>",
    23: "</think>",
    254: "[UNK]",
    255: "[PAD]",
}

# The split rule, alternatives in the order of Moonshot's tokenization_kimi.py. Letters are cut at
# lower-to-upper case and around Han, so that BPE never merges across those borders.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# Text is cut before it is split, as the published tokenizer cuts it: the cuts are visible in the
# ids of very long inputs, and they bound the cost of one BPE piece.
_MAX_CHUNK_CHARACTERS = 400_000
_MAX_RUN_CHARACTERS = 25_000
_RUN = re.compile(r"\s+|\S+")  # `re` and str.isspace agree on what is white space


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """Ids of the control tokens that the chat format needs."""

    bos: int
    eos: int
    im_end: int
    im_user: int
    im_assistant: int
    im_system: int
    im_middle: int
    tool_calls_section_begin: int
    tool_calls_section_end: int
    tool_call_begin: int
    tool_call_argument_begin: int
    tool_call_end: int
    think: int
    end_think: int
    pad: int
    unk: int


CONTROL_TOKEN_NAMES: Mapping[str, str] = {
    "bos": "[BOS]",
    "eos": "[EOS]",
    "im_end": "<|im_end|>",
    "im_user": "<|im_user|>",
    "im_assistant": "<|im_assistant|>",
    "im_system": "<|im_system|>",
    "im_middle": "<|im_middle|>",
    "tool_calls_section_begin": "<|tool_calls_section_begin|>",
    "tool_calls_section_end": "<|tool_calls_section_end|>",
    "tool_call_begin": "<|tool_call_begin|>",
    "tool_call_argument_begin": "<|tool_call_argument_begin|>",
    "tool_call_end": "<|tool_call_end|>",
    "think": "<think>",
    "end_think": "</think>",
    "pad": "[PAD]",
    "unk": "[UNK]",
}


class Tokenizer:
    """A vocabulary: encodes, decodes, and knows the control tokens. Immutable and thread-safe."""

    def __init__(
        self,
        base_tokens: Sequence[bytes],
        control_names: Mapping[int, str] | None = None,
        source: str = "vocabulary",
    ) -> None:
        """base_tokens: token bytes in rank order, all distinct, the 256 single bytes among them.

        control_names: id -> name for ids base..base+255; what the chat format needs and is not
        named there takes its published offset. None: the published table. `source` names the
        vocabulary in errors. Raises TokenizerError.
        """
        ranks = {token: rank for rank, token in enumerate(base_tokens)}
        if len(ranks) != len(base_tokens):
            raise TokenizerError(f"{source}: the same token bytes appear under two ranks.")
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise TokenizerError(
                f"{source}: expected all 256 single bytes among the tokens, "
                f"{len(missing)} are missing, the first is 0x{missing[0]:02x}."
            )
        self.base_size = len(base_tokens)
        self.vocab_size = self.base_size + RESERVED_TOKENS
        names = _complete_control_names(control_names, self.base_size, source)
        self._control_names = names
        self._control_ids = {name: token_id for token_id, name in names.items()}
        self.control = ControlTokens(
            **{field: self._control_ids[name] for field, name in CONTROL_TOKEN_NAMES.items()}
        )
        reserved = range(self.base_size, self.vocab_size)
        self.unmapped_ids = tuple(token_id for token_id in reserved if token_id not in names)
        self._token_bytes = [*base_tokens, *(names.get(i, "").encode() for i in reserved)]
        # The published tokenizer recognises unnamed reserved ids by a placeholder, so do we.
        placeholders = {
            f"<|reserved_token_{token_id}|>": token_id for token_id in self.unmapped_ids
        }
        self._encoding = tiktoken.Encoding(
            "hybridk2",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={**placeholders, **self._control_ids},
        )

    @classmethod
    def from_folder(cls, folder: Path | str) -> "Tokenizer":
        """Read tiktoken.model and, when there, the control names in tokenizer_config.json.

        Raises TokenizerError, naming the file and the line, for anything that is not exactly a
        vocabulary: malformed line, duplicate or missing rank, duplicate or missing bytes.
        """
        vocabulary_path = Path(folder) / VOCABULARY_FILE
        base_tokens = _read_vocabulary(vocabulary_path)
        names = _read_control_names(Path(folder) / CONFIG_FILE, len(base_tokens))
        return cls(base_tokens, names, str(vocabulary_path))

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which control tokens are disabled: "<|im_end|>" is ten characters.

        This is the only way in for text that a person or a tool wrote. A lone surrogate, which
        UTF-8 cannot carry, is encoded as U+FFFD.
        """
        ids: list[int] = []
        for chunk in _chunks(text):
            ids.extend(self._encoding.encode_ordinary(chunk))
        return ids

    def encode_with_control(self, text: str) -> list[int]:
        """Ids of a text in which the names of control tokens mean the control tokens.

        Never for text from outside: whoever can write the text can then end the message.
        """
        ids: list[int] = []
        for chunk in _chunks(text):
            ids.extend(self._encoding.encode(chunk, allowed_special="all"))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids: their bytes joined, invalid UTF-8 as U+FFFD.

        A named control token decodes to its name, a reserved id without a name to nothing. Raises
        TokenizerError for an id outside the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one id: a control token's name, b"" for a reserved id without one."""
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(
                f"token id {token_id} is outside the vocabulary of {self.vocab_size} ids."
            )
        return self._token_bytes[token_id]

    def control_name(self, token_id: int) -> str | None:
        """The name of a control token; None for text and for reserved ids without a name."""
        return self._control_names.get(token_id)

    def control_id(self, name: str) -> int | None:
        """The id of the control token with this name, None when the vocabulary has none."""
        return self._control_ids.get(name)


class IncrementalDecoder:
    """Decodes one id at a time; the pieces joined equal Tokenizer.decode of all ids.

    Bytes that may still become a character are held back until they do, or until flush.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes; "" while a character is unfinished."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """End the text: what was held back, as U+FFFD. The decoder is then ready for a new text."""
        return self._decoder.decode(b"", final=True)

    def discard(self) -> None:
        """Forget an unfinished character: for a text that was cut off, not ended."""
        self._decoder.reset()


def _read_vocabulary(path: Path) -> list[bytes]:
    """Token bytes in rank order from lines `base64(bytes) SPACE rank`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}.") from error
    lines = content.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise TokenizerError(f"{path}: expected a vocabulary, found an empty file.")
    tokens: list[bytes | None] = [None] * len(lines)
    line_of_token: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        token, rank = _parse_line(line, f"{path}, line {number}")
        if rank >= len(lines):
            raise TokenizerError(
                f"{path}, line {number}: rank {rank}, but a file of {len(lines)} tokens has ranks "
                f"0 to {len(lines) - 1}. Is the download complete?"
            )
        if tokens[rank] is not None:
            raise TokenizerError(f"{path}, line {number}: rank {rank} appears a second time.")
        first_line = line_of_token.setdefault(token, number)
        if first_line != number:
            raise TokenizerError(
                f"{path}, line {number}: the same token bytes as in line {first_line}."
            )
        tokens[rank] = token
    # As many distinct ranks as lines, all below the number of lines: no hole is left.
    return [token for token in tokens if token is not None]


def _parse_line(line: bytes, where: str) -> tuple[bytes, int]:
    encoded, separator, rank_digits = line.partition(b" ")
    # Nine digits: far above any vocabulary, and int() of a hostile line stays cheap.
    if not separator or not rank_digits.isdigit() or len(rank_digits) > 9:
        raise TokenizerError(f"{where}: expected `base64 rank`, found something else.")
    try:
        token = binascii.a2b_base64(encoded, strict_mode=True)
    except binascii.Error as error:
        raise TokenizerError(f"{where}: the token is not valid base64: {error}.") from error
    if not token:
        raise TokenizerError(f"{where}: the token is empty.")
    return token, int(rank_digits)


def _read_control_names(path: Path, base_size: int) -> dict[int, str] | None:
    """added_tokens_decoder as id -> name; None when the file or the entry is not there.

    Ids past the 256 reserved ones are dropped: some published files number two too many, and the
    model has no embedding for them.
    """
    try:
        raw: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON.") from error
    entries = raw.get("added_tokens_decoder") if isinstance(raw, dict) else raw
    if entries is None:
        return None
    if not isinstance(entries, dict):
        raise TokenizerError(f"{path}: added_tokens_decoder: expected an object of ids.")
    names: dict[int, str] = {}
    for key, entry in entries.items():
        where = f"{path}: added_tokens_decoder[{key[:20]!r}]"
        name = entry.get("content") if isinstance(entry, dict) else None
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise TokenizerError(f"{where}: the key is not a token id.")
        if not isinstance(name, str) or not name:
            raise TokenizerError(f"{where}: expected a `content` string that is not empty.")
        token_id = int(key)
        if token_id < base_size:
            raise TokenizerError(
                f"{where}: control tokens start at {base_size}, the size of the base vocabulary. "
                f"Are {VOCABULARY_FILE} and {CONFIG_FILE} of the same model?"
            )
        if token_id < base_size + RESERVED_TOKENS and not name.startswith("<|reserved_token_"):
            names[token_id] = name
    return names


def _complete_control_names(
    given: Mapping[int, str] | None, base_size: int, source: str
) -> dict[int, str]:
    """Add what the chat format needs and `given` does not name, at its published offset."""
    published = {base_size + offset: name for offset, name in PUBLISHED_CONTROL_TOKENS.items()}
    if given is None:
        return published
    names = dict(given)
    for token_id in names:
        if not base_size <= token_id < base_size + RESERVED_TOKENS:
            raise TokenizerError(
                f"{source}: control token id {token_id}: expected {base_size} to "
                f"{base_size + RESERVED_TOKENS - 1}."
            )
    if len(set(names.values())) != len(names):
        raise TokenizerError(f"{source}: two control tokens have the same name.")
    needed = set(CONTROL_TOKEN_NAMES.values()) - set(names.values())
    for token_id, name in published.items():
        if name not in needed:
            continue
        if token_id in names:
            raise TokenizerError(
                f"{source}: no control token is named {name}, and its published id {token_id} is "
                f"taken by {names[token_id][:40]!r}. This is not a Kimi K2 vocabulary."
            )
        names[token_id] = name
    return names


def _chunks(text: str) -> Iterator[str]:
    """Cut text as the published tokenizer does; see _MAX_CHUNK_CHARACTERS."""
    for start in range(0, len(text), _MAX_CHUNK_CHARACTERS):
        chunk = text[start : start + _MAX_CHUNK_CHARACTERS]
        if len(chunk) <= _MAX_RUN_CHARACTERS:
            yield chunk
            continue
        cut = 0
        for run in _RUN.finditer(chunk):
            for end in range(run.start() + _MAX_RUN_CHARACTERS, run.end(), _MAX_RUN_CHARACTERS):
                yield chunk[cut:end]
                cut = end
        yield chunk[cut:]

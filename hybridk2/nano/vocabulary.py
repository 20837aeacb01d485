"""K2-nano's vocabulary: byte-level BPE in tiktoken's format, built so that copying is easy.

A model that calls tools copies strings it has never seen, from a question into JSON, where the
characters around them differ. If " Oslo" and "Oslo" were cut differently, copying would mean
spelling. So the merges obey rules that make a word's cut independent of what stands around it:

- letters merge with ASCII letters only, never with the space or sign before them;
- digits never merge, so numbers are compared digit by digit;
- the bytes of a character outside ASCII merge within that character only;
- signs and white space merge among themselves;
- last of all, with the highest ranks, a space merges with a frequent token after it. BPE applies
  low ranks first, so this changes the first token of a word at most, and always to the same one.
"""

import base64
import collections
import heapq
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import regex  # type: ignore[import-untyped]

from hybridk2.tokenizer import (
    CONFIG_FILE,
    PUBLISHED_CONTROL_TOKENS,
    RESERVED_TOKENS,
    SPLIT_PATTERN,
    VOCABULARY_FILE,
)

_SPLIT = regex.compile(SPLIT_PATTERN, regex.V1)
# What may merge: runs of ASCII letters, of ASCII signs, of white space, or one other character.
_MERGEABLE = regex.compile(r"[A-Za-z]+|[!-/:-@\[-`{-~]+|[ \t]+|[\r\n]+|[^\x00-\x7F]")

Pair = tuple[bytes, bytes]


def _count_runs(texts: Iterable[str]) -> collections.Counter[str]:
    pieces: collections.Counter[str] = collections.Counter()
    for text in texts:
        pieces.update(_SPLIT.findall(text))
    runs: collections.Counter[str] = collections.Counter()
    for piece, count in pieces.items():
        for run in _MERGEABLE.findall(piece):
            runs[run] += count
    return runs


def _merged(symbols: list[bytes], pair: Pair) -> list[bytes]:
    result: list[bytes] = []
    spot = 0
    while spot < len(symbols):
        if spot + 1 < len(symbols) and (symbols[spot], symbols[spot + 1]) == pair:
            result.append(symbols[spot] + symbols[spot + 1])
            spot += 2
        else:
            result.append(symbols[spot])
            spot += 1
    return result


def _learn_merges(
    runs: collections.Counter[str], count: int
) -> tuple[list[bytes], list[list[bytes]]]:
    """The `count` most useful merges, and how every run is cut after them (in runs' order)."""
    cut = [[bytes([byte]) for byte in run.encode("utf-8")] for run in runs]
    weights = list(runs.values())
    totals: collections.Counter[Pair] = collections.Counter()
    places: dict[Pair, set[int]] = collections.defaultdict(set)
    for index, symbols in enumerate(cut):
        for pair in itertools.pairwise(symbols):
            totals[pair] += weights[index]
            places[pair].add(index)
    heap = [(-total, pair) for pair, total in totals.items()]
    heapq.heapify(heap)
    tokens: list[bytes] = []
    known: set[bytes] = set()
    while len(tokens) < count and heap:
        total, pair = heapq.heappop(heap)
        if -total != totals[pair] or total == 0:
            continue  # an outdated entry
        token = pair[0] + pair[1]
        if token not in known:
            known.add(token)
            tokens.append(token)
        touched: set[Pair] = set()
        for index in places.pop(pair):
            for old in itertools.pairwise(cut[index]):
                totals[old] -= weights[index]
                touched.add(old)
            cut[index] = _merged(cut[index], pair)
            for new in itertools.pairwise(cut[index]):
                totals[new] += weights[index]
                places[new].add(index)
                touched.add(new)
        for changed in touched:
            heapq.heappush(heap, (-totals[changed], changed))
    return tokens, cut


def train_vocabulary(texts: Iterable[str], base_size: int) -> list[bytes]:
    """Tokens in rank order: the 256 bytes, merges within words and signs, then space + token.

    texts: what the model will read and write. base_size: number of tokens wanted. One merge in
    four is given to the space. Deterministic for equal texts.
    """
    num_spaced = (base_size - 256) // 4
    runs = _count_runs(texts)
    merges, cut = _learn_merges(runs, base_size - 256 - num_spaced)
    first_tokens: collections.Counter[bytes] = collections.Counter()
    for symbols, weight in zip(cut, runs.values(), strict=True):
        if symbols[0].isalpha() and symbols[0].isascii():
            first_tokens[symbols[0]] += weight
    frequent = sorted(first_tokens.items(), key=lambda item: (-item[1], item[0]))
    spaced = [b" " + token for token, _ in frequent[:num_spaced]]
    tokens = [bytes([byte]) for byte in range(256)] + merges + spaced
    if len(tokens) != base_size:
        raise ValueError(f"the texts yield {len(tokens)} tokens, {base_size} were asked for")
    return tokens


def write_vocabulary(folder: Path, base_tokens: list[bytes], max_position: int) -> None:
    """Write tiktoken.model and tokenizer_config.json as K2-Thinking's folder has them."""
    lines = [
        f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(base_tokens)
    ]
    (folder / VOCABULARY_FILE).write_text("".join(lines), encoding="ascii")
    base = len(base_tokens)
    kept_in_text = ("<think>", "</think>")
    entries = {
        str(base + offset): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": not (name.startswith("<|tool_call") or name in kept_in_text),
        }
        for offset, name in PUBLISHED_CONTROL_TOKENS.items()
    }
    config = {
        "added_tokens_decoder": entries,
        "bos_token": "[BOS]",
        "clean_up_tokenization_spaces": False,
        "eos_token": "[EOS]",
        "model_max_length": max_position,
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
    }
    assert all(int(token_id) < base + RESERVED_TOKENS for token_id in entries)
    (folder / CONFIG_FILE).write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )

"""Checkpoints of random weights, in the exact format of the published ones.

Owns the values (scaled so that activations and logits keep a sane size through any number of
layers), the files (shards, index, config.json, generation_config.json) and the care for the disk.
Names, shapes and dtypes come from `checkpoint.Layout`. What such a model says is noise; how it
loads, fits and performs is the real thing.

Every tensor is drawn from the seed and its own name, so a checkpoint with more layers or experts
has the same weights in the ones that both have.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from hybridk2.checkpoint import Layout, LoadProgress, Role, TensorSpec
from hybridk2.config import GROUP_SIZE, KIMI_K2_THINKING, K2Config
from hybridk2.errors import CheckpointError
from hybridk2.tokenizer import CONFIG_FILE, VOCABULARY_FILE, Tokenizer

Scale = Literal["full", "small", "tiny"]
Variant = Literal["thinking", "k2.5"]

_CONTROL_TOKENS = 256  # ids behind the base vocabulary, in every K2

_ELEMENT_BYTES = {"BF16": 2, "F32": 4, "I32": 4}
# The order in which the safetensors library writes tensors: by dtype, then by name.
_DTYPE_ORDER = {"F32": 0, "I32": 1, "BF16": 2}

# Values are drawn and written in pieces of this many 64-bit random words: 1 MiB, so that a piece
# passes through its few steps inside the L2 cache, and memory does not grow with the tensor.
_PIECE_WORDS = 1 << 17
_PROGRESS_SECONDS = 0.1
# Root mean square of a code drawn as _codes draws it: 0 twice in 16, the others of -7..7 once.
_CODE_RMS = math.sqrt(2 * sum(code * code for code in range(1, 8)) / 16)


def synthetic_config(
    scale: Scale = "tiny",
    *,
    layers: int | None = None,
    experts: int | None = None,
    variant: Variant = "thinking",
) -> K2Config:
    """The config of a made-up model: K2-Thinking's dimensions, or the same shape scaled down.

    Layer 0 is dense, the others have routed experts. Defaults: 2 layers of 384 experts (full),
    4 of 64 (small), 3 of 8 (tiny).
    """
    config = replace(
        _PRESETS[scale],
        model_type="kimi_k25" if variant == "k2.5" else "kimi_k2",
        rope_scaling=replace(_FULL.rope_scaling, beta_fast=32.0 if variant == "k2.5" else 1.0),
    )
    if layers is not None:
        config = replace(config, num_hidden_layers=layers)
    if experts is not None:
        config = replace(
            config,
            n_routed_experts=experts,
            num_experts_per_tok=min(config.num_experts_per_tok, experts),
        )
    # The same checks that a config.json from elsewhere must pass.
    return K2Config.from_dict(config.to_dict(), f"{scale} config")


def config_for_tokenizer(config: K2Config, folder: Path) -> K2Config:
    """`config` with the vocabulary size and the control ids of the tokenizer in `folder`."""
    tokenizer = Tokenizer.from_folder(folder)
    control = tokenizer.control
    return replace(
        config,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=control.bos,
        eos_token_id=control.im_end,
        pad_token_id=control.pad,
    )


def checkpoint_bytes(config: K2Config) -> int:
    """Bytes of all shards that `synthesize` writes for this config, headers included."""
    return sum(shard.file_bytes for shard in _plan(config))


def synthesize(
    folder: Path,
    config: K2Config,
    seed: int,
    *,
    tokenizer_folder: Path | None = None,
    on_progress: Callable[[LoadProgress], None] = lambda progress: None,
) -> int:
    """Write a random checkpoint for `config` to `folder` and return the bytes of its shards.

    The files are written to `folder` + ".partial", which gets its final name when all is there.
    tokenizer_folder: where tiktoken.model and, if there, tokenizer_config.json are copied from.
    Raises CheckpointError when `folder` is not new or empty, the disk is too small, or writing
    fails.
    """
    partial = folder.with_name(folder.name + ".partial")
    shards = _plan(config)
    total_bytes = sum(shard.file_bytes for shard in shards)
    try:
        _check_destination(folder, partial, total_bytes)
        partial.mkdir(parents=True)
        try:
            _write_checkpoint(partial, config, seed, shards, _Meter(total_bytes, on_progress))
            if tokenizer_folder is not None:
                _copy_tokenizer(tokenizer_folder, partial)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial)
            raise
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder}: writing the checkpoint failed: {error.strerror}"
        ) from error
    return total_bytes


def _copy_tokenizer(source: Path, destination: Path) -> None:
    shutil.copyfile(source / VOCABULARY_FILE, destination / VOCABULARY_FILE)
    if (source / CONFIG_FILE).exists():  # without it the published control names apply
        shutil.copyfile(source / CONFIG_FILE, destination / CONFIG_FILE)


_FULL = replace(KIMI_K2_THINKING, num_hidden_layers=2)


def _with_vocabulary(config: K2Config, vocab_size: int) -> K2Config:
    """Control ids lie behind the base vocabulary as they do in K2's."""
    first_control = vocab_size - _CONTROL_TOKENS
    return replace(
        config,
        vocab_size=vocab_size,
        bos_token_id=first_control,
        eos_token_id=first_control + 2,
        pad_token_id=vocab_size - 1,
    )


_SMALL = replace(
    _with_vocabulary(_FULL, 4096),
    hidden_size=1024,
    intermediate_size=2560,
    moe_intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    n_routed_experts=64,
    q_lora_rank=384,
    kv_lora_rank=256,
)
_TINY = replace(
    _with_vocabulary(_FULL, 512),
    hidden_size=128,
    intermediate_size=192,
    moe_intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
)
_PRESETS: dict[Scale, K2Config] = {"full": _FULL, "small": _SMALL, "tiny": _TINY}


class _Shard(NamedTuple):
    """One file to write: its tensors in file order, and the header that describes them."""

    name: str
    tensors: list[TensorSpec]
    header: bytes

    @property
    def data_bytes(self) -> int:
        return sum(map(_num_bytes, self.tensors))

    @property
    def file_bytes(self) -> int:
        return len(self.header) + self.data_bytes


def _plan(config: K2Config) -> list[_Shard]:
    """K2's files: one per layer, one with embedding, final norm and head; K2.5's vision last."""
    layout = Layout(config)
    groups = [list(layout.layer_tensors(layer)) for layer in range(config.num_hidden_layers)]
    groups.append(list(layout.outer_tensors()))
    groups.extend([vision] if (vision := list(layout.vision_stand_ins())) else [])
    shards = []
    for number, tensors in enumerate(groups, start=1):
        tensors.sort(key=lambda spec: (_DTYPE_ORDER[spec.dtypes[0]], spec.name))
        # Five digits, then six: so the published files are numbered.
        name = f"model-{number:05d}-of-{len(groups):06d}.safetensors"
        shards.append(_Shard(name, tensors, _header(tensors)))
    return shards


def _num_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * _ELEMENT_BYTES[spec.dtypes[0]]


def _header(tensors: list[TensorSpec]) -> bytes:
    """The eight length bytes and the JSON header, padded so that the data starts aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in tensors:
        end = position + _num_bytes(spec)
        entries[spec.name] = {
            "dtype": spec.dtypes[0],
            "shape": spec.shape,
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _check_destination(folder: Path, partial: Path, total_bytes: int) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder}: expected a new or empty folder, found something in it")
    if partial.exists():
        raise CheckpointError(
            f"{partial}: left over from an interrupted run, or in use by another one. Remove it"
        )
    existing = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free_bytes = shutil.disk_usage(existing).free
    if total_bytes > free_bytes:
        raise CheckpointError(
            f"{folder}: the checkpoint takes {total_bytes:,} bytes, the disk has {free_bytes:,} "
            "free. Choose fewer layers or experts, or another disk"
        )


class _Meter:
    """Counts bytes and reports them at most ten times a second, and once at the end."""

    def __init__(self, total_bytes: int, on_progress: Callable[[LoadProgress], None]) -> None:
        self._total_bytes = total_bytes
        self._on_progress = on_progress
        self._done_bytes = 0
        self._start = self._reported = time.monotonic()

    def add(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        now = time.monotonic()
        if now - self._reported >= _PROGRESS_SECONDS or self._done_bytes == self._total_bytes:
            self._reported = now
            self._on_progress(
                LoadProgress("synthesis", self._done_bytes, self._total_bytes, now - self._start)
            )


def _write_checkpoint(
    folder: Path, config: K2Config, seed: int, shards: list[_Shard], meter: _Meter
) -> None:
    weight_map: dict[str, str] = {}
    for shard in shards:
        weight_map.update((spec.name, shard.name) for spec in shard.tensors)
        with open(folder / shard.name, "wb") as file:
            file.write(shard.header)
            meter.add(len(shard.header))
            for spec in shard.tensors:
                _write_tensor(file, spec, seed, meter)
    data_bytes = sum(shard.data_bytes for shard in shards)
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": data_bytes}, "weight_map": dict(sorted(weight_map.items()))},
    )
    _write_json(folder / "config.json", config.to_dict())
    _write_json(
        folder / "generation_config.json",
        {"max_length": config.max_position_embeddings, "eos_token_id": config.eos_token_id},
    )


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_tensor(file: BinaryIO, spec: TensorSpec, seed: int, meter: _Meter) -> None:
    for piece in _values(spec, seed):
        file.write(piece.data)
        meter.add(piece.nbytes)


def _values(spec: TensorSpec, seed: int) -> Iterator[np.ndarray]:
    """The elements of one tensor, as they are stored, piece by piece."""
    if spec.values is not None:
        yield np.array(spec.values, np.int32)
        return
    digest = hashlib.blake2b(f"{seed} {spec.name}".encode(), digest_size=16).digest()
    random = np.random.SFC64(int.from_bytes(digest, "little"))
    elements_per_word = 2 if spec.role is Role.PACKED else 4
    left = math.prod(spec.shape)
    while left:
        count = min(left, _PIECE_WORDS * elements_per_word)
        words = random.random_raw(-(-count // elements_per_word))
        if spec.role is Role.PACKED:
            yield _codes(words).view(np.int32)[:count]
        else:
            yield _reals(words.view(np.int16)[:count], spec)
        left -= count


def _codes(words: np.ndarray) -> np.ndarray:
    """Random 64-bit words as sixteen INT4 codes each, none of them -8 (nibble 0), as in K2.

    A nibble that is 0 becomes 8, which is code 0. Its lowest bit, or-ed with its three others, is
    0 just then.
    """
    set_bits = words | words >> np.uint64(1)
    set_bits |= set_bits >> np.uint64(2)
    empty = ~set_bits & np.uint64(0x1111111111111111)
    return words | empty << np.uint64(3)


def _reals(random: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Random 16-bit integers as uniform values around the center that the tensor's role has."""
    center, spread = _center_and_spread(spec)
    values = random.astype(np.float32)
    values *= np.float32(spread / (1 << 15))
    values += np.float32(center)
    if spec.dtypes[0] == "F32":
        return values
    # bfloat16 is the upper half of float32; half of the last bit kept is added to round.
    bits = values.view(np.uint32)
    bits += np.uint32(0x8000)
    bits >>= np.uint32(16)
    return bits.astype(np.uint16)


def _center_and_spread(spec: TensorSpec) -> tuple[float, float]:
    """Uniform values from center - spread to center + spread have a variance of spread^2 / 3.

    A matrix row of n inputs gets the variance 1 / n: inputs of unit variance, which the norms
    give, become outputs of unit variance. So attention scores, router and output logits are all of
    order 1, and a layer adds about as much to the residual stream as the embedding brought.
    """
    match spec.role:
        case Role.MATRIX:
            return 0.0, math.sqrt(3 / spec.shape[-1])
        case Role.SCALE:
            # Codes have the mean square _CODE_RMS^2; one scale serves GROUP_SIZE columns.
            center = 1 / (_CODE_RMS * math.sqrt(spec.shape[-1] * GROUP_SIZE))
            return center, center / 4
        case Role.EMBEDDING:
            return 0.0, math.sqrt(3)
        case Role.NORM:
            return 1.0, 0.1
        case Role.ROUTER_BIAS:
            return 0.0, 0.05
    raise AssertionError(f"{spec.name}: {spec.role} has no random values")

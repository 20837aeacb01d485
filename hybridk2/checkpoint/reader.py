"""The checkpoint as the rest of HybridK2 sees it: weights by the part of the model they serve.

Owns the reading of weights into memory of their own and the checks that need values: scales, biases
and bfloat16 weights are finite, weight_shape says what the config says. Headers were checked when
the folder was opened (`checkpoint.folder`). Where experts live afterwards, and on how many threads
they are read, is the business of `experts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybridk2.checkpoint.fingerprint import routing_fingerprint
from hybridk2.checkpoint.folder import CheckpointFolder, open_folder
from hybridk2.checkpoint.layout import QuantizedSpec, TensorSpec
from hybridk2.checkpoint.safetensors_file import SafetensorsFile, TensorEntry
from hybridk2.checkpoint.weights import (
    AttentionWeights,
    ExpertWeights,
    LayerWeights,
    MlpWeights,
    QuantizedLinear,
    RouterWeights,
)
from hybridk2.config import K2Config
from hybridk2.errors import CheckpointError

_TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
}
# A value is infinite or not a number exactly when all bits of its exponent are set.
_EXPONENT_BITS: dict[str, np.unsignedinteger[Any]] = {
    "BF16": np.uint16(0x7F80),
    "F32": np.uint32(0x7F800000),
}

# Large tensors are read and checked in pieces of this size: the check then finds its bytes in the
# cache, and its scratch memory stays small.
_PIECE_BYTES = 8 << 20
_CHECK_ELEMENTS = 1 << 18


class Checkpoint:
    """An open checkpoint. Reads are positional: threads may share it."""

    def __init__(self, folder: Path, contents: CheckpointFolder) -> None:
        self.folder = folder
        self.config: K2Config = contents.config
        self.eos_token_ids = contents.eos_token_ids
        self._contents = contents
        self._layout = contents.layout
        self.expert_bytes, self.dense_bytes = _weight_bytes(contents)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open a checkpoint folder and check everything that its headers can tell.

        Raises CheckpointError, or ConfigError for config.json, naming the file and the tensor.
        """
        return cls(folder, open_folder(folder))

    def close(self) -> None:
        for shard in self._contents.shards.values():
            shard.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def embedding(self) -> Tensor:
        """bfloat16 (vocab_size, hidden_size)."""
        return self._read(self._layout.embedding())

    def final_norm(self) -> Tensor:
        """bfloat16 (hidden_size,)."""
        return self._read(self._layout.final_norm())

    def lm_head(self) -> Tensor:
        """bfloat16 (vocab_size, hidden_size)."""
        return self._read(self._layout.lm_head())

    def routing_fingerprint(self) -> str:
        """Of the routers as `fingerprint.routing_fingerprint` takes it, without reading more of the
        weights than that needs. Raises CheckpointError naming a tensor that cannot be read."""
        specs = [
            self._layout.router(layer)
            for layer in range(self.config.first_k_dense_replace, self.config.num_hidden_layers)
        ]
        return routing_fingerprint(
            self.config,
            ((self._read(spec["bias"]), self._first_row(spec["weight"])) for spec in specs),
        )

    def layer(self, layer: int) -> LayerWeights:
        """All weights of decoder layer `layer`, counted from 0, but its routed experts."""
        layout = self._layout
        is_moe = self.config.is_moe(layer)
        return LayerWeights(
            **self._read_all(layout.norms(layer)),
            attention=AttentionWeights(**self._read_all(layout.attention(layer))),
            mlp=None if is_moe else MlpWeights(**self._read_all(layout.dense_mlp(layer))),
            router=RouterWeights(**self._read_all(layout.router(layer))) if is_moe else None,
            shared=MlpWeights(**self._read_all(layout.shared_expert(layer))) if is_moe else None,
        )

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """One routed expert, in memory of its own. To read many, use an ExpertReader."""
        return ExpertReader(self).read(layer, expert)

    def experts_in_file_order(self) -> Iterator[tuple[int, int]]:
        """(layer, expert) of every routed expert, in the order in which the disk reads best."""
        for layer in range(self.config.first_k_dense_replace, self.config.num_hidden_layers):
            yield from (
                (layer, expert)
                for expert in sorted(
                    range(self.config.n_routed_experts),
                    key=lambda expert: self._position(layer, expert),
                )
            )

    def _position(self, layer: int, expert: int) -> tuple[str, int]:
        shard, entry = self._contents.find(self._layout.expert(layer, expert)["gate"].packed)
        return shard.path.name, entry.offset

    def _read_all(self, specs: dict[str, TensorSpec]) -> dict[str, Tensor]:
        return {field: self._read(spec) for field, spec in specs.items()}

    def _read(self, spec: TensorSpec) -> Tensor:
        shard, entry = self._contents.find(spec)
        tensor = torch.empty(spec.shape, dtype=_TORCH_DTYPES[entry.dtype])
        view = _bytes_of(tensor)
        for begin in range(0, entry.num_bytes, _PIECE_BYTES):
            piece = view[begin : begin + _PIECE_BYTES]
            shard.read_into(entry.offset + begin, [piece], spec.name)
            _check_finite(piece, shard, spec, entry.dtype, begin)
        return tensor

    def _first_row(self, spec: TensorSpec) -> Tensor:
        shard, entry = self._contents.find(spec)
        row = torch.empty(spec.shape[1:], dtype=_TORCH_DTYPES[entry.dtype])
        shard.read_into(entry.offset, [_bytes_of(row)], spec.name)
        return row


class ExpertReader:
    """Reads one routed expert after another into the same memory; for one thread."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._contents = checkpoint._contents
        self._layout = checkpoint._layout
        config = checkpoint.config
        specs = self._layout.expert(config.first_k_dense_replace, 0)
        self._linears = {field: _empty_linear(spec) for field, spec in specs.items()}
        self._views = {
            field: _LinearViews(
                _bytes_of(linear.packed), _bytes_of(linear.scale), memoryview(bytearray(16))
            )
            for field, linear in self._linears.items()
        }
        self.expert_bytes = sum(
            len(views.packed) + len(views.scale) for views in self._views.values()
        )

    def read(self, layer: int, expert: int) -> ExpertWeights:
        """Read and check one expert. The result is overwritten by the next call.

        Raises CheckpointError naming the tensor when bytes are missing, a scale is not finite, or
        weight_shape differs from the config.
        """
        specs = self._layout.expert(layer, expert)
        for run in self._runs(specs):
            run.shard.read_into(run.offset, run.buffers, run.first_name)
        for field, spec in specs.items():
            views = self._views[field]
            shard, entry = self._contents.find(spec.weight_shape)
            _check_weight_shape(views.weight_shape, shard, entry, spec.weight_shape)
            shard, entry = self._contents.find(spec.scale)
            _check_finite(views.scale, shard, spec.scale, entry.dtype, 0)
        return ExpertWeights(**self._linears)

    def forget(self, layer: int, expert: int) -> None:
        """Tell the kernel that this expert will not be read again."""
        for run in self._runs(self._layout.expert(layer, expert)):
            run.shard.forget(run.offset, run.num_bytes)

    def _runs(self, specs: dict[str, QuantizedSpec]) -> list[_Run]:
        """Join tensors that lie side by side: in K2's files an expert's nine are two such runs."""
        pieces: list[tuple[SafetensorsFile, TensorEntry, memoryview, str]] = []
        for field, spec in specs.items():
            views = self._views[field]
            for tensor, view in (
                (spec.packed, views.packed),
                (spec.scale, views.scale),
                (spec.weight_shape, views.weight_shape),
            ):
                shard, entry = self._contents.find(tensor)
                pieces.append((shard, entry, view[: entry.num_bytes], tensor.name))
        pieces.sort(key=lambda piece: (piece[0].path.name, piece[1].offset))
        runs: list[_Run] = []
        for shard, entry, view, name in pieces:
            last = runs[-1] if runs else None
            if last and last.shard is shard and last.offset + last.num_bytes == entry.offset:
                runs[-1] = last._replace(
                    buffers=[*last.buffers, view], num_bytes=last.num_bytes + entry.num_bytes
                )
            else:
                runs.append(_Run(shard, entry.offset, entry.num_bytes, [view], name))
        return runs


class _LinearViews(NamedTuple):
    packed: memoryview
    scale: memoryview
    weight_shape: memoryview


class _Run(NamedTuple):
    """A byte range of one shard, and the buffers that it fills."""

    shard: SafetensorsFile
    offset: int
    num_bytes: int
    buffers: list[memoryview]
    first_name: str


def _weight_bytes(contents: CheckpointFolder) -> tuple[int, int]:
    """Bytes of the routed experts (codes and scales), and of everything else, once in memory."""
    config, layout = contents.config, contents.layout
    expert_bytes = 0
    if config.num_moe_layers:
        for linear in layout.expert(config.first_k_dense_replace, 0).values():
            expert_bytes += contents.find(linear.packed)[1].num_bytes
            expert_bytes += contents.find(linear.scale)[1].num_bytes
    dense_bytes = sum(contents.find(spec)[1].num_bytes for spec in layout.outer_tensors())
    for layer in range(config.num_hidden_layers):
        for spec in layout.dense_tensors(layer):
            dense_bytes += contents.find(spec)[1].num_bytes
    return expert_bytes * config.num_moe_layers * config.n_routed_experts, dense_bytes


def _empty_linear(spec: QuantizedSpec) -> QuantizedLinear:
    return QuantizedLinear(
        packed=torch.empty(spec.packed.shape, dtype=torch.int32),
        scale=torch.empty(spec.scale.shape, dtype=torch.bfloat16),
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's memory, writable, as bytes. It keeps the tensor's storage alive."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _check_weight_shape(
    stored: memoryview, shard: SafetensorsFile, entry: TensorEntry, spec: TensorSpec
) -> None:
    values = np.frombuffer(
        stored[: entry.num_bytes], np.int32 if entry.dtype == "I32" else np.int64
    )
    if tuple(values.tolist()) != spec.values:
        raise CheckpointError(
            f"{shard.path}: {spec.name}: expected the values {spec.values}, "
            f"found {tuple(values.tolist())}. "
            "Is the download complete and undamaged? `hybridk2 verify` compares checksums"
        )


def _check_finite(
    piece: memoryview, shard: SafetensorsFile, spec: TensorSpec, dtype: str, first_byte: int
) -> None:
    """Refuse infinity and NaN in a floating-point tensor, naming the first such element.

    piece: bytes of the tensor from `first_byte` on.
    """
    exponent = _EXPONENT_BITS[dtype]
    elements = np.frombuffer(piece, exponent.dtype)
    scratch = np.empty(min(_CHECK_ELEMENTS, elements.size), exponent.dtype)
    for begin in range(0, elements.size, _CHECK_ELEMENTS):
        part = elements[begin : begin + _CHECK_ELEMENTS]
        masked = np.bitwise_and(part, exponent, out=scratch[: part.size])
        if masked.max() == exponent:
            position = first_byte // elements.itemsize + begin + int(masked.argmax())
            index = tuple(int(axis) for axis in np.unravel_index(position, spec.shape))
            raise CheckpointError(
                f"{shard.path}: {spec.name}: expected finite values, found infinity or NaN in "
                f"element {index} of {math.prod(spec.shape)}. "
                "Is the download complete and undamaged? `hybridk2 verify` compares checksums"
            )

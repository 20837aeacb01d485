"""A checkpoint folder: config.json, the index, the shards, and whether they agree.

Owns everything that can be said over the headers alone, before large memory is taken: each tensor
that the config implies is there once, in the shard that the index names, with the dtype and the
shape that the config implies, and nothing else is there. It reads no weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridk2.checkpoint.layout import Layout, TensorSpec
from hybridk2.checkpoint.safetensors_file import SafetensorsFile, TensorEntry
from hybridk2.checkpoint.strict_json import read_object, shown
from hybridk2.config import K2Config
from hybridk2.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_NAMES_IN_A_MESSAGE = 3


@dataclass(frozen=True)
class CheckpointFolder:
    """An opened folder whose headers have been checked."""

    config: K2Config
    eos_token_ids: tuple[int, ...]
    layout: Layout
    shards: dict[str, SafetensorsFile]
    shard_of: dict[str, SafetensorsFile]

    def find(self, spec: TensorSpec) -> tuple[SafetensorsFile, TensorEntry]:
        shard = self.shard_of[spec.name]
        return shard, shard.tensors[spec.name]


def open_folder(folder: Path) -> CheckpointFolder:
    """Open all files of a checkpoint and check what their headers say.

    Raises CheckpointError (or ConfigError, for config.json) naming the file and the tensor.
    """
    file_names = list_folder(folder)
    config_path = folder / "config.json"
    if "config.json" not in file_names:
        raise CheckpointError(
            f"{folder}: config.json is missing. Is this the folder of a Hugging Face checkpoint?"
        )
    config = K2Config.from_dict(read_object(config_path), str(config_path))
    eos_token_ids = _eos_token_ids(folder, config)
    layout = Layout(config)
    if INDEX_FILE in file_names:
        index_path = folder / INDEX_FILE
        weight_map = read_index(index_path)
        shards = _open_shards(folder, sorted(set(weight_map.values())))
        shard_of = _owners(shards.values())
        _check_index(index_path, weight_map, shard_of)
    elif SINGLE_FILE in file_names:
        shards = _open_shards(folder, [SINGLE_FILE])
        shard_of = _owners(shards.values())
    else:
        raise CheckpointError(
            f"{folder}: expected {INDEX_FILE} or {SINGLE_FILE}, found neither. "
            "Is the download complete?"
        )
    _check_against_config(folder, layout, shard_of)
    return CheckpointFolder(config, eos_token_ids, layout, shards, shard_of)


def list_folder(folder: Path) -> set[str]:
    """The names in a folder. Raises CheckpointError when it cannot be read."""
    try:
        return set(os.listdir(folder))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: there is no such folder") from error
    except NotADirectoryError as error:
        raise CheckpointError(
            f"{folder}: expected the folder of a checkpoint, found a file"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from error


def _eos_token_ids(folder: Path, config: K2Config) -> tuple[int, ...]:
    """What ends an answer: generation_config.json's ids if it has any, else config.json's."""
    path = folder / "generation_config.json"
    if not path.exists():
        return (config.eos_token_id,)
    value = read_object(path).get("eos_token_id")
    if value is None:
        return (config.eos_token_id,)
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(type(item) is int and 0 <= item < config.vocab_size for item in ids):
        raise CheckpointError(
            f"{path}: eos_token_id: expected ids from 0 to {config.vocab_size - 1}, "
            f"found {shown(value)}"
        )
    return tuple(dict.fromkeys(ids))


def read_index(path: Path) -> dict[str, str]:
    """From tensor names to shards, as the index has it. Raises CheckpointError."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{path}: weight_map: expected an object from tensor names to shards, "
            f"found {shown(weight_map)}. Is the download complete?"
        )
    for name, shard in weight_map.items():
        if not _is_plain_shard_name(shard):
            raise CheckpointError(
                f"{path}: {shown(name)}: expected the name of a .safetensors file in this folder, "
                f"found {shown(shard)}"
            )
    return weight_map


def _is_plain_shard_name(name: Any) -> bool:
    """A file name and nothing but: an index must not be able to point out of its folder."""
    return (
        isinstance(name, str)
        and name.isascii()
        and name.isprintable()
        and len(name) < 256
        and "/" not in name
        and name.endswith(".safetensors")
    )


def _open_shards(folder: Path, names: list[str]) -> dict[str, SafetensorsFile]:
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} shards are missing: {some(missing, 8)}. "
            "Is the download complete?"
        )
    return {name: SafetensorsFile.open(folder / name) for name in names}


def _owners(shards: Iterable[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    owners: dict[str, SafetensorsFile] = {}
    for shard in shards:
        for name in shard.tensors:
            first = owners.setdefault(name, shard)
            if first is not shard:
                raise CheckpointError(
                    f"{shard.path}: {shown(name)}: is in {first.path.name} too. "
                    "Are all shards of the same download?"
                )
    return owners


def _check_index(
    path: Path, weight_map: dict[str, str], shard_of: dict[str, SafetensorsFile]
) -> None:
    for name, listed in weight_map.items():
        owner = shard_of.get(name)
        if owner is None or owner.path.name != listed:
            found = "it is in no shard" if owner is None else f"found it in {owner.path.name}"
            raise CheckpointError(
                f"{path}: {shown(name)}: expected in {listed}, {found}. "
                "Are all shards of the same download, under their own names?"
            )
    unlisted = [name for name in shard_of if name not in weight_map]
    if unlisted:
        raise CheckpointError(
            f"{shard_of[unlisted[0]].path}: {some(map(shown, unlisted))}: in the shard, but not "
            f"listed in {path.name}. Are all files of the same download?"
        )


def _check_against_config(
    folder: Path, layout: Layout, shard_of: dict[str, SafetensorsFile]
) -> None:
    missing: list[str] = []
    found = 0
    for spec in layout.tensors():
        shard = shard_of.get(spec.name)
        if shard is None:
            missing.append(spec.name)
            if len(missing) > _NAMES_IN_A_MESSAGE:
                break
            continue
        found += 1
        entry = shard.tensors[spec.name]
        if entry.dtype not in spec.dtypes or entry.shape != spec.shape:
            raise CheckpointError(
                f"{shard.path}: {spec.name}: expected {' or '.join(spec.dtypes)} {spec.shape} as "
                f"config.json implies, found {entry.dtype} {shown(entry.shape)}. "
                "Are config.json and the shards of the same model?"
            )
    if missing:
        raise CheckpointError(
            f"{folder}: tensors that config.json implies are in no shard: {some(missing)}. "
            "Is the download complete, and is config.json of the same model?"
        )
    if found == len(shard_of):
        return
    expected = {spec.name for spec in layout.tensors()}
    for name, shard in shard_of.items():
        if name not in expected and not layout.is_beside_the_text_model(name):
            raise CheckpointError(
                f"{shard.path}: {shown(name)}: config.json implies no such tensor. "
                "Are config.json and the shards of the same model?"
            )


def some(names: Iterable[str], limit: int = _NAMES_IN_A_MESSAGE) -> str:
    """The first names of a list as a message carries them."""
    every = list(names)
    more = len(every) - limit
    return ", ".join(every[:limit]) + (f" and {more} more" if more > 0 else "")

"""What a checkpoint folder promises, before its shards are there.

Owns the reading of config.json and the index alone: for plans, which need sizes and no weights. A
folder whose shards are all there is checked by `checkpoint.folder`, header by header.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hybridk2.checkpoint.folder import (
    INDEX_FILE,
    SINGLE_FILE,
    list_folder,
    open_folder,
    read_index,
    some,
)
from hybridk2.checkpoint.layout import Layout
from hybridk2.checkpoint.strict_json import read_object, shown
from hybridk2.config import K2Config
from hybridk2.errors import CheckpointError


@dataclass(frozen=True)
class FolderDescription:
    """config: the model's facts. shards, missing_shards: how many files, and which are not there;
    of a folder with nothing but config.json, 0 and none."""

    config: K2Config
    shards: int
    missing_shards: tuple[str, ...]


def describe_folder(folder: Path) -> FolderDescription:
    """Read config.json and, as far as they are there, the index and the headers of all shards.

    Raises CheckpointError (or ConfigError, for config.json) when they contradict each other.
    """
    file_names = list_folder(folder)
    config_path = folder / "config.json"
    if "config.json" not in file_names:
        raise CheckpointError(
            f"{folder}: config.json is missing. Is this the folder of a Hugging Face checkpoint?"
        )
    if INDEX_FILE not in file_names and SINGLE_FILE not in file_names:
        return FolderDescription(
            K2Config.from_dict(read_object(config_path), str(config_path)), 0, ()
        )
    names = [SINGLE_FILE]
    weight_map: dict[str, str] = {}
    if INDEX_FILE in file_names:
        weight_map = read_index(folder / INDEX_FILE)
        names = sorted(set(weight_map.values()))
    missing = tuple(name for name in names if name not in file_names)
    if not missing:
        contents = open_folder(folder)
        for shard in contents.shards.values():
            shard.close()
        return FolderDescription(contents.config, len(names), ())
    config = K2Config.from_dict(read_object(config_path), str(config_path))
    _check_names(folder / INDEX_FILE, Layout(config), weight_map)
    return FolderDescription(config, len(names), missing)


def _check_names(path: Path, layout: Layout, weight_map: dict[str, str]) -> None:
    """The index lists the tensors that the config implies, and no others."""
    expected = {spec.name for spec in layout.tensors()}
    absent = [name for name in expected if name not in weight_map]
    if absent:
        raise CheckpointError(
            f"{path}: tensors that config.json implies are not listed: {some(sorted(absent))}. "
            "Are config.json and the index of the same model?"
        )
    for name in weight_map:
        if name not in expected and not layout.is_beside_the_text_model(name):
            raise CheckpointError(
                f"{path}: {shown(name)}: config.json implies no such tensor. "
                "Are config.json and the index of the same model?"
            )

"""A replaced file is the old one or the new one, whatever interrupts the replacement."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hybridk2.durable_file import flush_folder, replace_file


def test_a_file_is_replaced_as_a_whole_and_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    replace_file(path, b"old and longer")
    replace_file(path, b"new")
    flush_folder(tmp_path)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["profile.json"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_replacement_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    path = tmp_path / "profile.json"
    replace_file(path, b"old")

    def interrupted(descriptor: int) -> None:
        raise interruption

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(interruption):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["profile.json"]

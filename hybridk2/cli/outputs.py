"""Files that the person asks for: refused before the work if they cannot be, written whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from hybridk2.errors import ConfigError

Command = TypeVar("Command", bound=Callable[..., Any])


def output_option(*names: str, **attributes: Any) -> Callable[[Command], Command]:
    """A click option that names a file to write. One in a folder that is not there, or not ours to
    write in, is a usage mistake: found at once, not after the minutes or hours of the work."""
    path_type = click.Path(path_type=Path, dir_okay=False)
    return click.option(*names, type=path_type, callback=_in_a_folder, **attributes)


def _in_a_folder(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and not os.access(value.parent, os.W_OK | os.X_OK):
        raise click.BadParameter(
            f"{value}: {value.parent} is no folder in which files can be made", ctx, param
        )
    return value


def write_output(path: Path, text: str) -> None:
    """Put the text at `path`, whole or not at all. Raises ConfigError when the disk refuses."""
    from hybridk2.durable_file import flush_folder, replace_file

    try:
        replace_file(path, text.encode())
        flush_folder(path.parent)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error

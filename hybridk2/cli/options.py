"""Options that more than one subcommand has: which model, and how it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

_MODEL_OPTIONS = (
    click.option(
        "--model",
        default="nano",
        envvar="HYBRIDK2_MODEL",
        show_default=True,
        show_envvar=True,
        help="Checkpoint folder, Hugging Face id, or nano.",
    ),
    click.option("--download", is_flag=True, help="Fetch or complete a Hugging Face id first."),
)
_THREADS = click.option("--threads", type=int, help="Default: one per physical core.")
_CONTEXT = click.option("--context", type=int, help="Tokens of context to make room for.")
_DTYPE = click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of activations; float32 is for comparisons.",
)


config_home_option = click.option(
    "--config-home",
    type=click.Path(path_type=Path),
    envvar="XDG_CONFIG_HOME",
    default=Path("~/.config"),
    show_default=True,
    show_envvar=True,
    help="The machine's profile is kept in its folder hybridk2.",
)


def model_options(command: Command) -> Command:
    """Adds --model and --download."""
    return _with(command, _MODEL_OPTIONS)


def engine_options(command: Command) -> Command:
    """Adds --threads, --context and --dtype."""
    return _with(command, (_THREADS, _CONTEXT, _DTYPE))


def arithmetic_options(command: Command) -> Command:
    """Adds --threads and --dtype."""
    return _with(command, (_THREADS, _DTYPE))


def _with(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command

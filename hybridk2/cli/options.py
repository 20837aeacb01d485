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

_CARD = (
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where all but routed experts is computed; auto takes a card that can be used.",
    ),
    click.option(
        "--placement",
        type=click.Path(dir_okay=False),
        help="File of `hybridk2 tune`: which experts live on the card. [default: as many as fit]",
    ),
    click.option(
        "--keep-host-copy",
        is_flag=True,
        help="Experts on the card lie in host memory as well.",
    ),
    click.option(
        "--dynamic-placement",
        is_flag=True,
        help="Between tokens, exchange experts on the card for some that are picked more often, "
        "where that pays; needs --keep-host-copy.",
    ),
    click.option(
        "--kv-dtype",
        type=click.Choice(["bf16", "fp8"]),
        default="bf16",
        show_default=True,
        help="Of the cache on the card; fp8 takes half the memory and is approximate.",
    ),
    click.option(
        "--dense",
        type=click.Choice(["bf16", "int8"]),
        default="bf16",
        show_default=True,
        help="Of other weights on the card; int8 takes half the memory and is approximate.",
    ),
    click.option(
        "--handoff",
        type=click.Choice(["auto", "mailbox", "host-functions", "thread"]),
        default="auto",
        show_default=True,
        help="How the card hands tokens to the host's experts; auto takes the fastest.",
    ),
    click.option(
        "--defer-experts",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Of each token's experts, add so many one layer late: faster and approximate.",
    ),
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
    """Adds --threads, --context, --dtype and the options of a card.

    These, whatever they are, go to EngineConfig by their names: commands take them as `**card`.
    """
    return _with(command, (_THREADS, _CONTEXT, _DTYPE, *_CARD))


def arithmetic_options(command: Command) -> Command:
    """Adds --threads, --dtype and the options of a card; see engine_options."""
    return _with(command, (_THREADS, _DTYPE, *_CARD))


def _with(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command

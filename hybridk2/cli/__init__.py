"""The `hybridk2` command: its subcommands, what they exit with, how they refuse.

Owns the group only. A subcommand's module is imported when that subcommand runs, so that
`hybridk2 --help` answers at once; the one-line summaries are therefore kept here. No module of
this package imports torch or the extension, and what does so is imported inside functions.

Exit status: 0 done, 1 a HybridK2Error, 2 a usage mistake, 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from hybridk2 import __version__
from hybridk2.errors import HybridK2Error

EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports of a program that Ctrl-C ended

# Each is the attribute of the same name in hybridk2.cli.<name>.
SUBCOMMANDS = {
    "bench": "Measure how fast a model runs here, and where its time goes.",
    "chat": "Talk to a model in the terminal, or ask it one question.",
    "serve": "Answer over HTTP, as chat front ends, agents and libraries ask.",
    "plan": "Say whether a model fits a machine and how fast it will be, before it is loaded.",
    "doctor": "Measure this machine, and say what is wrong with it and what mends it.",
    "tune": "Choose which experts to keep on a graphics card, from prompts of your own.",
    "synth": "Write a random-weight checkpoint in K2-Thinking's exact format.",
    "verify": "Check a checkpoint, and this engine's outputs against transformers.",
}


class SubcommandGroup(click.Group):
    """A group that imports a subcommand only when it is named, and maps errors to exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUBCOMMANDS:
            return None
        command = getattr(importlib.import_module(f"hybridk2.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUBCOMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HybridK2Error as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)


@click.group(
    cls=SubcommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="hybridk2")
def main() -> None:
    """Kimi-K2-Thinking on one workstation: its INT4 experts in host memory, its answers exactly."""

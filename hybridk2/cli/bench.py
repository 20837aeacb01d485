"""`hybridk2 bench`: how fast a model reads and decodes here, and where the time goes.

Owns the options, the progress, the tables, the files and the exit status. What is measured is
`hybridk2.benchmark`'s business, what the page shows is `hybridk2.report`'s.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from hybridk2.cli.options import arithmetic_options, config_home_option
from hybridk2.cli.outputs import output_option, write_output
from hybridk2.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from hybridk2.benchmark.figures import Benchmark
    from hybridk2.benchmark.measuring import Progress, Subject, Workload
    from hybridk2.engine import Engine
    from hybridk2.report.tables import Table

DEFAULT_CONTEXTS = (512, 2048, 8192)

_EPILOG = """\b
Examples:
  hybridk2 bench                                     # the embedded model
  hybridk2 bench /path/to/Kimi-K2-Thinking --report k2.html
  hybridk2 bench /tmp/k2-two-layers --contexts 512,4096 --tokens 64 --csv phases.csv
  hybridk2 bench --json nano | jq '.frontiers[].decode.tokens_per_second.median'

The last line of the output is one JSON object with all medians and quartiles, layers apart, which
the CSV has. Ctrl-C writes no file. Exit status: 0 done, 1 refused with a message, 2 a usage
mistake, 130 stopped with Ctrl-C."""


def _contexts(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        contexts = tuple(sorted({int(part) for part in value.split(",")}))
    except ValueError as error:
        raise click.BadParameter(
            f"{value!r} is not a list such as 512,2048,8192", ctx, param
        ) from error
    if contexts[0] < 2:
        raise click.BadParameter(f"a context of {contexts[0]} tokens: 2 at least", ctx, param)
    return contexts


@click.command(epilog=_EPILOG)
@click.argument("model", envvar="HYBRIDK2_MODEL", default="nano")
@click.option(
    "--contexts",
    metavar="N,N,...",
    callback=_contexts,
    help="Tokens before the decoded ones. [default: those of 512,2048,8192 that the model holds]",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="To decode in each run.",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Runs of decoding at each context; a prompt is read once.",
)
@arithmetic_options
@config_home_option
@click.option("--json", "as_json", is_flag=True, help="Print the JSON line alone.")
@output_option("--csv", "csv_path", help="Write every layer's phases here.")
@output_option("--report", help="Write one HTML page with pictures here.")
def bench(
    model: str,
    contexts: tuple[int, ...] | None,
    tokens: int,
    repeat: int,
    threads: int | None,
    dtype: Literal["bfloat16", "float32"],
    config_home: Path,
    as_json: bool,
    csv_path: Path | None,
    report: Path | None,
    **card: Any,
) -> None:
    """Measure how fast MODEL reads and decodes here, and what each layer's time goes into.

    MODEL: checkpoint folder, cached Hugging Face id, or nano, which is the default. A prompt of
    random tokens is read up to each context, and from there tokens are decoded. Beside the speeds
    stand milliseconds per phase, and the roofs that this machine reached in the same run; once
    `hybridk2 doctor` has measured the machine, also what `hybridk2 plan` predicts.
    """
    from rich.console import Console

    from hybridk2.benchmark.measuring import Subject
    from hybridk2.cli.loading import load_engine
    from hybridk2.config import EngineConfig
    from hybridk2.hardware import load_profile, profile_path

    status = Console(stderr=True)
    workload = _workload(model, contexts, tokens, repeat, status)
    try:
        choices = EngineConfig(
            model=model,
            dtype=dtype,
            threads=threads,
            context_tokens=workload.context_tokens,
            **card,
        )
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    profile = load_profile(profile_path(config_home))
    started = time.perf_counter()
    engine = load_engine(choices, status)
    try:
        subject = Subject(model, dtype, time.perf_counter() - started, profile)
        benchmark = _measured(engine, workload, subject, status)
    finally:
        engine.close()
    if not as_json:
        _print(benchmark, Console(highlight=False))
    click.echo(json.dumps(benchmark.as_dict()))
    _write_files(benchmark, csv_path, report, status)


def _workload(
    model: str, contexts: Sequence[int] | None, tokens: int, repeat: int, status: Console
) -> Workload:
    """Raises ConfigError for a context that the model was not trained for."""
    from hybridk2.benchmark.measuring import Workload
    from hybridk2.checkpoint import locate_model
    from hybridk2.cli.notes import note
    from hybridk2.config import K2Config

    longest = K2Config.from_file(locate_model(model) / "config.json").max_position_embeddings
    wanted = tuple(contexts or DEFAULT_CONTEXTS)
    fitting = tuple(
        context for context in wanted if Workload((context,), tokens, repeat).fits(longest)
    )
    if not fitting or (contexts is not None and fitting != wanted):
        raise ConfigError(
            f"a context of {wanted[-1] if fitting else wanted[0]:,} tokens and {tokens:,} decoded "
            f"ones are asked for; {model} was trained for {longest:,} together. Name shorter ones "
            "with --contexts"
        )
    for context in wanted[len(fitting) :]:
        note(status, f"left out: {context:,} tokens, as {model} was trained for {longest:,}")
    return Workload(fitting, tokens, repeat)


def _measured(engine: Engine, workload: Workload, subject: Subject, status: Console) -> Benchmark:
    from hybridk2.benchmark.measuring import measure

    benchmark: list[Benchmark] = []

    def moments() -> Iterator[Progress]:
        benchmark.append((yield from measure(engine, workload, subject)))

    _show_progress(moments(), status)
    return benchmark[0]


def _show_progress(moments: Iterator[Progress], status: Console) -> None:
    """Draw the bar until nothing more comes; without a terminal, one line per finished stage."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from hybridk2.cli.notes import is_terminal, note

    quiet = not is_terminal(status)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Bar(*columns, TimeElapsedColumn(), console=status, transient=True, disable=quiet) as bar:
        task = bar.add_task("")
        began = time.perf_counter()
        for moment in moments:
            bar.update(task, description=moment.stage, completed=moment.done, total=moment.total)
            if moment.done >= moment.total:
                ended = time.perf_counter()
                note(status, f"{moment.stage}: {ended - began:.1f} s")
                began = ended


def _print(benchmark: Benchmark, output: Console) -> None:
    from rich.markup import escape

    from hybridk2.report import tables

    output.print(f"[bold]{escape(benchmark.model)}[/]")
    output.print(escape(tables.subject(benchmark)))
    output.print(f"In the same run {tables.roofs(benchmark)}.\n")
    _print_table(tables.rates(benchmark), "", output)
    output.print(f"[dim]{tables.RATES_NOTE}[/]\n")
    columns = [(f"{row.context_tokens:,}", row.decode) for row in benchmark.frontiers]
    _print_table(tables.phases(columns), "one decoded token, by context", output)
    columns = [(f"{row.context_tokens:,}", row.prefill) for row in benchmark.frontiers]
    _print_table(tables.phases(columns), "one chunk of the prompt, up to each context", output)


def _print_table(table: Table, title: str, output: Console) -> None:
    from rich.table import Table as Grid

    heads, rows = table
    grid = Grid(title=title or None, title_justify="left")
    for number, head in enumerate(heads):
        grid.add_column(head, justify="right" if number else "left", no_wrap=bool(number))
    for row in rows:
        grid.add_row(*row)
    output.print(grid)


def _write_files(
    benchmark: Benchmark, csv_path: Path | None, report: Path | None, status: Console
) -> None:
    """Each whole or not at all. Raises ConfigError with what the system said."""
    from hybridk2.cli.notes import note
    from hybridk2.report.page import page

    for path, text in (
        (csv_path, benchmark.as_csv),
        (report, lambda: page(benchmark)),
    ):
        if path is not None:
            write_output(path, text())
            note(status, f"written: {path}")

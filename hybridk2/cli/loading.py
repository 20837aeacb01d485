"""Loading a model while the person watches: a bar with GB, GB/s and the time left."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from hybridk2.cli.notes import is_terminal, note, warn
from hybridk2.cli.terminal_text import printable_line
from hybridk2.cli.worker import Job, Worker

if TYPE_CHECKING:
    from hybridk2.assistant import Assistant
    from hybridk2.checkpoint import LoadProgress
    from hybridk2.config import EngineConfig
    from hybridk2.engine import Engine


NANO_NOTE = (
    "This is K2-nano, the small model that HybridK2 carries within it: it compares numbers, calls "
    "tools and says what it is. A real checkpoint: hybridk2 chat --model FOLDER"
)


def load_assistant(
    worker: Worker, choices: EngineConfig, download: bool, status: Console
) -> Assistant:
    """Load the model in the worker, and show how far that is on `status`.

    Raises the HybridK2Error of whatever is wrong with the checkpoint, the choices or the machine.
    """

    def load(job: Job[LoadProgress, Assistant]) -> Assistant:
        from hybridk2.assistant import Assistant

        if download:
            from hybridk2.checkpoint import download_model

            download_model(choices.model, job.emit)
        return Assistant.load(choices, job.emit)

    with _LogLines(status):
        job = worker.submit(load)
        show_progress(job, status)
        assistant = job.result()
    if choices.model == "nano":
        note(status, NANO_NOTE)
    return assistant


def load_assistant_here(choices: EngineConfig, status: Console) -> Assistant:
    """The same in this thread, for who has no terminal to keep alive meanwhile."""
    from hybridk2.assistant import Assistant

    with _LogLines(status), LoadingBar(status) as bar:
        return Assistant.load(choices, bar)


def load_engine(choices: EngineConfig, status: Console) -> Engine:
    """Load a model without its text side, in this thread, and show how far that is on `status`.

    Raises the HybridK2Error of whatever is wrong with the checkpoint, the choices or the machine.
    """
    from hybridk2.engine import Engine

    with _LogLines(status), LoadingBar(status) as bar:
        return Engine.load(choices, bar)


def show_progress(moments: Iterable[LoadProgress], status: Console) -> None:
    """Draw the bar until nothing more comes."""
    with LoadingBar(status) as bar:
        for progress in moments:
            bar(progress)


class LoadingBar:
    """While entered, draws what it is told; without a terminal, one line per finished stage."""

    def __init__(self, status: Console) -> None:
        self._status = status
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        quiet = not is_terminal(status)
        self._bar = Progress(*columns, console=status, transient=True, disable=quiet)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def __call__(self, progress: LoadProgress) -> None:
        stage = printable_line(progress.stage)
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, figures="")
        self._bar.update(
            self._tasks[stage],
            completed=progress.done_bytes,
            total=progress.total_bytes,
            figures=figures(progress),
        )
        if progress.done_bytes >= progress.total_bytes:
            note(self._status, f"{stage}: {figures(progress)}, {progress.seconds:.1f} s")


def figures(progress: LoadProgress) -> str:
    """Such as "3.2 of 9.5 GB, 1.24 GB/s, 5 s left"."""
    unit, scale = ("GB", 1e9) if progress.total_bytes >= 1e9 else ("MB", 1e6)
    parts = [f"{progress.done_bytes / scale:.2f} of {progress.total_bytes / scale:.2f} {unit}"]
    if progress.gigabytes_per_second > 0:
        parts.append(f"{progress.gigabytes_per_second:.2f} GB/s")
    left = progress.eta_seconds
    if left:
        minutes, seconds = divmod(round(left), 60)
        parts.append(f"{minutes} min {seconds:02d} s left" if minutes else f"{seconds} s left")
    return ", ".join(parts)


class _LogLines(logging.Handler):
    """While entered, shows what the engine chose (ISA, device, threads) as dim lines."""

    def __init__(self, status: Console) -> None:
        super().__init__(logging.INFO)
        self._status = status
        self._logger = logging.getLogger("hybridk2")

    def emit(self, record: logging.LogRecord) -> None:
        show = warn if record.levelno >= logging.WARNING else note
        show(self._status, record.getMessage())

    def __enter__(self) -> None:
        self._previous_level = self._logger.level
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)

    def __exit__(self, *exception: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._previous_level)

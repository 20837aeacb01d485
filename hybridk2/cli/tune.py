"""`hybridk2 tune`: from a person's own prompts to a placement of experts on a graphics card.

Owns the options, where each figure of the machine comes from, progress, table, files and exit
status. Recording, replaying and choosing are `hybridk2.tuner`'s business.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from hybridk2.cli.options import config_home_option, engine_options
from hybridk2.cli.outputs import output_option, write_output
from hybridk2.errors import TuningError

if TYPE_CHECKING:
    from rich.console import Console

    from hybridk2.config import EngineConfig
    from hybridk2.hardware import GpuProfile, MachineProfile
    from hybridk2.planner import Choices, ModelSizes
    from hybridk2.routing_trace import RoutingTrace
    from hybridk2.tuner.choice import PolicyResult, Tuning

_EPILOG = """\b
Examples:
  hybridk2 tune nano --workload prompts.jsonl --gpu "RTX 4090" --experts-per-layer 8
  hybridk2 tune /path/to/Kimi-K2-Thinking --workload prompts.jsonl --gpu "RTX PRO 6000"
  hybridk2 serve --model /path/to/Kimi-K2-Thinking --record-routing day.trace
  hybridk2 tune /path/to/Kimi-K2-Thinking --trace day.trace --gpu H200 --report tune.html

A workload has one JSON object a line: {"messages": [...]} or {"prompt": "..."}. Traces hold ids of
experts, never text. An interrupted run goes on from its trace when the command is repeated. Exit
status: 0 done, 1 refused with a message, 2 a usage mistake, 130 stopped with Ctrl-C."""

_NOT_MEASURED = (
    "this version computes all experts on the CPU, so that no placement can be run here; the "
    "figures are predictions"
)


@dataclass(frozen=True)
class _HostSpeed:
    """With which the host reads experts, and where the figure is from."""

    bytes_per_second: float
    source: str


_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(epilog=_EPILOG)
@click.argument("model", envvar="HYBRIDK2_MODEL")
@click.option(
    "--workload",
    type=_FILE,
    help="Prompts to answer and to record, one a line.",
)
@click.option(
    "--trace",
    "trace_path",
    type=_FILE,
    help="Where routing is recorded; without --workload one that was, by a server for one. "
    "[default: beside --out]",
)
@output_option(
    "--out",
    default="placement.json",
    show_default=True,
    help="The placement that is written.",
)
@click.option(
    "--budget-gb", type=click.FloatRange(0), help="Of experts on the card, in 10^9 bytes."
)
@click.option(
    "--experts-per-layer",
    type=click.IntRange(0),
    help="The same as a mean. [default: what `hybridk2 plan` has left on the card]",
)
@click.option("--gpu", help="The card, by name. [default: that of the machine profile]")
@click.option(
    "--cpu-gbps",
    type=click.FloatRange(0, min_open=True),
    help="GB/s that the host reads experts with. [default: the machine profile's, else measured]",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Of an answer to a prompt of the workload.",
)
@output_option("--report", help="Write one HTML page with heat maps here.")
@click.option("--measure", is_flag=True, help="Run the placement, where that is possible.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@click.option("--download", is_flag=True, help="Fetch or complete a Hugging Face id first.")
@engine_options
@config_home_option
def tune(
    model: str,
    workload: Path | None,
    trace_path: Path | None,
    out: Path,
    budget_gb: float | None,
    experts_per_layer: int | None,
    gpu: str | None,
    cpu_gbps: float | None,
    max_tokens: int,
    report: Path | None,
    measure: bool,
    as_json: bool,
    download: bool,
    threads: int | None,
    context: int | None,
    dtype: Literal["bfloat16", "float32"],
    config_home: Path,
    **card_choices: Any,
) -> None:
    """Choose which of MODEL's experts to keep on a graphics card, from prompts of your own.

    MODEL: checkpoint folder, cached Hugging Face id, or nano. Answers the prompts, records which
    experts each token picks, replays every policy on the record and writes the placement that is
    predicted to be fastest for prompts like them.
    """
    from rich.console import Console

    from hybridk2.checkpoint import download_model, locate_model
    from hybridk2.cli.loading import LoadingBar
    from hybridk2.config import EngineConfig
    from hybridk2.hardware import load_profile, profile_path
    from hybridk2.planner import Choices, ModelSizes
    from hybridk2.routing_trace import read_trace
    from hybridk2.tuner.choice import tune as choose
    from hybridk2.tuner.costs import step_cost
    from hybridk2.tuner.page import page

    if workload is None and trace_path is None:
        raise click.UsageError("nothing to learn from: give --workload or --trace")
    if budget_gb is not None and experts_per_layer is not None:
        raise click.UsageError("--budget-gb and --experts-per-layer say the same: give one of them")
    status = Console(stderr=True)
    if download:
        with LoadingBar(status) as bar:
            download_model(model, bar)
    sizes = ModelSizes.from_checkpoint(locate_model(model))
    profile = load_profile(profile_path(config_home))
    card = _card(gpu, profile)
    planned = Choices() if context is None else Choices(context_tokens=context)
    budget = _budget(sizes, card, planned, budget_gb, experts_per_layer)
    host = _known_host_speed(cpu_gbps, profile)
    trace_path = trace_path or out.with_suffix(".trace")
    if workload is not None:
        choices = EngineConfig(
            model=model, threads=threads, context_tokens=context, dtype=dtype, **card_choices
        )
        host = _record(choices, workload, trace_path, max_tokens, host, status)
    if host is None:
        raise TuningError(
            "how fast the host reads experts is not known: `hybridk2 doctor` measures it once, "
            "--cpu-gbps says it"
        )
    trace = read_trace(trace_path)
    _check_shape(trace, sizes, trace_path, model)
    cost = step_cost(sizes, host.bytes_per_second, card, planned)
    with status.status("replaying") as spinner:
        tuning = choose(trace, cost, budget, lambda what: spinner.update(f"replaying: {what}"))
    tuning.placement.save(out)
    about = _about(trace, trace_path, card, host)
    if report is not None:
        write_output(report, page(model, about, trace, tuning))
    if as_json:
        recorded = {"path": str(trace_path), "tokens": trace.tokens, "blocks": trace.blocks}
        found = {"model": model, "trace": recorded, "placement": str(out), **tuning.as_dict()}
        click.echo(json.dumps(found | _figures(card, host, measure)))
    else:
        _print(about, tuning, out, report, measure)


def _figures(card: GpuProfile, host: _HostSpeed, measure: bool) -> dict[str, Any]:
    """What the prediction stands on, and whether anything was measured against it."""
    return {
        "gpu": {"name": card.name, "measured": card.measured},
        "host_bytes_per_second": host.bytes_per_second,
        "host_figure": host.source,
        "measured": None,
        "not_measured": _NOT_MEASURED if measure else None,
    }


def _card(name: str | None, profile: MachineProfile | None) -> GpuProfile:
    from hybridk2.hardware import CARDS, gpu_named

    if name is not None:
        return gpu_named(name)
    if profile is None or profile.gpu is None:
        known = ", ".join(card.name for card in CARDS)
        raise click.UsageError(
            f"there is no GPU in this machine's profile: name a card with --gpu, one of {known}"
        )
    return profile.gpu


def _budget(
    sizes: ModelSizes,
    card: GpuProfile,
    choices: Choices,
    budget_gb: float | None,
    experts_per_layer: int | None,
) -> int:
    """Experts on the card, in all layers. Raises TuningError when there is room for none."""
    from hybridk2.planner import free_gpu_bytes

    if experts_per_layer is not None:
        return min(experts_per_layer, sizes.experts_per_layer) * sizes.moe_layers
    if budget_gb is not None:
        budget = int(budget_gb * 1e9) // sizes.expert_bytes
    else:
        budget = max(free_gpu_bytes(sizes, card, choices), 0) // sizes.expert_bytes
    if budget == 0:
        raise TuningError(
            f"no expert fits: each has {sizes.expert_bytes / 1e6:.1f} MB. `hybridk2 plan` says "
            "what fits a card; --budget-gb or --experts-per-layer set it"
        )
    return min(budget, sizes.moe_layers * sizes.experts_per_layer)


def _known_host_speed(cpu_gbps: float | None, profile: MachineProfile | None) -> _HostSpeed | None:
    if cpu_gbps is not None:
        return _HostSpeed(cpu_gbps * 1e9, "--cpu-gbps")
    if profile is not None:
        return _HostSpeed(profile.host_read_bytes_per_second, "the machine profile")
    return None


def _record(
    choices: EngineConfig,
    workload: Path,
    trace_path: Path,
    max_tokens: int,
    host: _HostSpeed | None,
    status: Console,
) -> _HostSpeed:
    """Answer the workload and record it; measure the host where nothing is known of it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from hybridk2.cli.loading import load_assistant_here
    from hybridk2.cli.notes import is_terminal, note
    from hybridk2.tuner.recording import RecordingProgress, read_workload, record

    prompts = read_workload(workload)
    assistant = load_assistant_here(choices, status)
    done = RecordingProgress(0, len(prompts), 0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    quiet = not is_terminal(status)
    try:
        speed = host or _HostSpeed(assistant.expert_read_bytes_per_second(), "measured just now")
        with Progress(
            *columns, TimeElapsedColumn(), console=status, transient=True, disable=quiet
        ) as bar:
            task = bar.add_task("prompts", total=len(prompts))

            def show(progress: RecordingProgress) -> None:
                nonlocal done
                done = progress
                described = f"prompts, {progress.tokens:,} tokens decoded"
                bar.update(task, completed=progress.prompts, description=described)

            record(assistant, prompts, trace_path, max_tokens, show)
    except KeyboardInterrupt:
        note(
            status,
            f"{done.prompts} of {len(prompts)} prompts are in {trace_path}; the same command goes "
            "on from there",
        )
        raise
    finally:
        assistant.close()
    note(status, f"recorded: {done.prompts} prompts, {done.tokens:,} tokens, in {trace_path}")
    return speed


def _check_shape(trace: RoutingTrace, sizes: ModelSizes, path: Path, model: str) -> None:
    header = trace.header
    found = (header.layers, header.experts, header.top_k)
    expected = (sizes.moe_layers, sizes.experts_per_layer, sizes.experts_per_token)
    if found != expected:
        raise TuningError(
            f"{path}: a trace of {found[0]} layers of {found[1]} experts, {found[2]} for a token; "
            f"{model} has {expected[0]} of {expected[1]}, {expected[2]} for a token"
        )


def _about(trace: RoutingTrace, path: Path, card: GpuProfile, host: _HostSpeed) -> tuple[str, ...]:
    figures = "measured" if card.measured else "by its data sheet, nothing of it measured"
    together = trace.tokens / max(trace.steps, 1)
    return (
        f"{trace.tokens:,} decoded tokens in {path}"
        + (f", {together:.2g} in a step, priced as if each ran alone." if together > 1 else "."),
        f"Predicted for {card.name}, {figures}, and a host that reads "
        f"{host.bytes_per_second / 1e9:.3g} GB/s of experts ({host.source}).",
    )


def _print(
    about: tuple[str, ...], tuning: Tuning, out: Path, report: Path | None, measure: bool
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    output = Console(highlight=False)
    for line in about:
        output.print(escape(line))
    table = Table()
    for head in ("policy", "experts", "hits", "held out", "uploads", "tok/s"):
        table.add_column(head, justify="left" if head == "policy" else "right", no_wrap=True)
    for results in (tuning.policies, tuning.caches):
        for result in results:
            bold = "bold" if result is tuning.chosen else ""
            table.add_row(*_cells(result), style=bold)
        table.add_section()
    output.print(table)
    without, chosen = tuning.without.tokens_per_second, tuning.chosen
    output.print(
        f"{chosen.name}: {chosen.tokens_per_second:.3g} tok/s predicted, {without:.3g} with no "
        f"expert on the GPU. Written: {escape(str(out))}"
        + (f", {escape(str(report))}" if report is not None else "")
    )
    if measure:
        output.print(f"Not measured: {_NOT_MEASURED}.")


def _cells(result: PolicyResult) -> tuple[Any, ...]:
    return (
        result.name,
        f"{result.experts:,}",
        f"{result.replay.hit_rate:.1%}",
        "" if result.held_out is None else f"{result.held_out.hit_rate:.1%}",
        f"{result.replay.uploads:.3g}" if result.replay.uploads else "",
        f"{result.tokens_per_second:.3g}",
    )

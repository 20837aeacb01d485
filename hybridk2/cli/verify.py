"""`hybridk2 verify`: check a checkpoint, and the engine's layers against transformers.

Owns the options, the tables, the JSON and the exit status: 0 when everything that was checked
holds, 1 when something does not. What is compared and how much may differ is
`hybridk2.verification`'s business.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from hybridk2.checkpoint import Checkpoint
    from hybridk2.verification.checksums import FileChecksum
    from hybridk2.verification.comparison import PartReport
    from hybridk2.verification.layers import LayerReport


def _layer_numbers(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> list[int] | None:
    if value is None:
        return None
    try:
        return sorted({int(part) for part in value.split(",")})
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list such as 0,1,30", ctx, param) from error


@click.command()
@click.argument("folder")
@click.option(
    "--layers",
    metavar="N,N,...",
    callback=_layer_numbers,
    help="Layers to compare. [default: the first, the first with experts, a middle one, the last]",
)
@click.option(
    "--sha256",
    "checksum_list",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Compare files with this list first, as `sha256sum` writes it. Only this finds a flipped "
    "bit in a weight: where layers are compared, both sides read it.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=3),
    default=12,
    show_default=True,
    help="Tokens to send through each layer; each picks experts that must be read.",
)
@click.option("--structure-only", is_flag=True, help="Do not compare layers.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@click.pass_context
def verify(
    ctx: click.Context,
    folder: str,
    layers: list[int] | None,
    checksum_list: Path | None,
    tokens: int,
    structure_only: bool,
    as_json: bool,
) -> None:
    """Check the checkpoint in FOLDER, and that this engine computes what it says.

    Every tensor is there with the right shape and type; optionally every file has its published
    SHA-256; and chosen layers give, part by part, what transformers' DeepseekV3 gives with the INT4
    weights dequantised, in fp32 and in bf16. FOLDER may also be "nano" or a cached Hugging Face id.
    """
    from hybridk2.checkpoint import Checkpoint, locate_model

    output = Console(quiet=as_json, highlight=False)
    result: dict[str, Any] = {"sha256": None, "comparison": None}
    passed = True
    with Checkpoint.open(locate_model(folder)) as checkpoint:
        result["structure"] = _structure(checkpoint)
        _print_structure(output, checkpoint)
        if checksum_list is not None:
            checksums = _check_files(checkpoint.folder, checksum_list, output)
            passed &= checksums["passed"]
            result["sha256"] = checksums
        if not structure_only:
            comparison = _compare_layers(checkpoint, layers, tokens, output)
            passed &= comparison["passed"]
            result["comparison"] = comparison
    if as_json:
        click.echo(json.dumps(_finite({"passed": passed, **result}), indent=2, allow_nan=False))
    if not passed:
        ctx.exit(1)


def _structure(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    return {
        "folder": str(checkpoint.folder),
        "model_type": config.model_type,
        "layers": config.num_hidden_layers,
        "moe_layers": config.num_moe_layers,
        "experts_per_layer": config.n_routed_experts,
        "expert_bytes": checkpoint.expert_bytes,
        "other_bytes": checkpoint.dense_bytes,
    }


def _print_structure(output: Console, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    output.print(
        f"structure   [green]ok[/]  {escape(str(checkpoint.folder))}: {config.num_hidden_layers} "
        f"layers, {config.n_routed_experts} experts in each of {config.num_moe_layers}, "
        f"{decimal(checkpoint.expert_bytes)} of experts and {decimal(checkpoint.dense_bytes)} of "
        "other weights; every tensor is there once, with the shape and type that config.json "
        "implies"
    )


def _check_files(folder: Path, checksum_list: Path, output: Console) -> dict[str, Any]:
    from hybridk2.verification import checksums

    sums = checksums.read_list(checksum_list)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("sha256", total=None)
        files = checksums.check_files(
            folder,
            sums,
            lambda progress: bar.update(
                task, completed=progress.done_bytes, total=progress.total_bytes
            ),
        )
    unlisted = checksums.unlisted_shards(folder, sums)
    passed = all(file.passed for file in files) and not unlisted
    _print_files(output, files, unlisted)
    return {
        "passed": passed,
        "files": [{**dataclasses.asdict(file), "passed": file.passed} for file in files],
        "unlisted": unlisted,
    }


def _print_files(output: Console, files: list[FileChecksum], unlisted: list[str]) -> None:
    wrong = [file for file in files if not file.passed]
    for file in wrong:
        found = "is missing" if file.found is None else f"found {file.found}"
        output.print(
            f"sha256      [red]FAILED[/]  {escape(file.name)}: expected {file.expected}, {found}"
        )
    for name in unlisted:
        output.print(f"sha256      [red]FAILED[/]  {escape(name)}: not in the list")
    if not wrong and not unlisted:
        output.print(f"sha256      [green]ok[/]  {len(files)} files are the listed ones")


def _compare_layers(
    checkpoint: Checkpoint, layers: list[int] | None, tokens: int, output: Console
) -> dict[str, Any]:
    status = Console(stderr=True)
    with status.status("loading transformers") as spinner:
        from hybridk2.verification.layers import verify_layers
        from hybridk2.verification.probe import default_layers
        from hybridk2.verification.published import TRANSFORMERS_VERSION

        eps = checkpoint.config.rms_norm_eps
        remark = (
            f"transformers {TRANSFORMERS_VERSION} DeepseekV3 with dequantised INT4 weights; the "
            f"eps of its q_a and kv_a norms, fixed at 1e-06, is set to the config's {eps:g}"
        )
        output.print(f"comparison  with {remark}.")
        reports = verify_layers(
            checkpoint,
            layers if layers is not None else default_layers(checkpoint.config),
            tokens=tokens,
            on_layer=lambda layer: spinner.update(f"comparing layer {layer}"),
        )
    for report in reports:
        _print_layer(output, report)
    failures = [part for report in reports for part in report.parts if not part.passed]
    count = sum(len(report.parts) for report in reports)
    if failures:
        output.print(f"\n[red]FAILED[/]: {len(failures)} of {count} comparisons differ")
    else:
        output.print(
            f"\n[green]ok[/]: {count} comparisons in {len(reports)} layers. Allowed: in bf16, four "
            "times what bf16 does to transformers' own result; in fp32, 2^-16 sqrt(k/2) of that "
            "for sums of k products"
        )
    return {
        "passed": not failures,
        "reference": remark,
        "layers": [{**dataclasses.asdict(report), "passed": report.passed} for report in reports],
    }


def _print_layer(output: Console, report: LayerReport) -> None:
    title = f"layer {report.layer} ({report.kind}"
    if report.isa is not None:
        title += f", {report.experts_hit} experts on {report.isa} kernels"
    table = Table(title=f"{title}, {report.seconds:.1f} s)", title_justify="left")
    table.add_column("part", no_wrap=True)
    for mode in ("fp32", "bf16"):
        table.add_column(f"{mode} error", justify="right", no_wrap=True)
        table.add_column("allowed", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
    rows: dict[str, dict[str, PartReport]] = {}
    for part in report.parts:
        rows.setdefault(part.part, {})[part.mode] = part
    for name, by_mode in rows.items():
        cells = [cell for mode in ("float32", "bfloat16") for cell in _cells(by_mode.get(mode))]
        table.add_row(name, *cells)
    output.print()
    output.print(table)
    for part in report.parts:
        if not part.passed:
            output.print(f"[red]{_complaint(report, part)}[/]")


def _cells(part: PartReport | None) -> tuple[str, str, str]:
    if part is None:
        return ("", "", "")
    passed = "[green]ok[/]" if part.passed else "[red]FAILED[/]"
    return (f"{part.max_relative_error:.1e}", f"{part.tolerance:.1e}", passed)


def _complaint(report: LayerReport, part: PartReport) -> str:
    where = f"layer {report.layer}, {part.part}, {part.mode}: relative error "
    text = f"{part.max_relative_error:.2e}, allowed {part.tolerance:.2e}"
    text += f"; absolute {part.max_absolute_error:.2e}"
    if part.worst_token is not None:
        position = report.positions[part.worst_token]
        text += f"; worst in token {part.worst_token}, position {position}"
    return where + text + (f" ({part.note})" if part.note else "")


def _finite(value: Any) -> Any:
    """The value as JSON can hold it: infinity, which stands for "not a number", becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""`hybridk2 doctor`: measure this machine, say what is wrong with it and what mends it.

Owns the options, the report, the JSON and the saving of the profile that `hybridk2 plan` reads.
What is measured is `hybridk2.measurement`'s business, what Linux says `hybridk2.hardware`'s.
Exit status: 0 measured and saved, also where something is wrong; 1 refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hybridk2.cli.options import config_home_option

if TYPE_CHECKING:
    from rich.console import Console

    from hybridk2.hardware import Finding, MachineProfile, SystemFacts
    from hybridk2.measurement import CardFigures

_EPILOG = """\b
Examples:
  hybridk2 doctor                                  # measure, report, write the machine's profile
  hybridk2 doctor /path/to/Kimi-K2-Thinking        # and the disk that the model lies on
  hybridk2 doctor --json > machine-report.json
"""


@click.command(epilog=_EPILOG)
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@config_home_option
def doctor(model: str | None, as_json: bool, config_home: Path) -> None:
    """Measure this machine, say what slows it down and the command that mends it.

    Takes about half a minute and 4 GB of memory; other programs that run meanwhile are measured
    with it. With MODEL, a checkpoint folder, the speed of its disk as well. The figures are written
    to the machine's profile, for hybridk2 plan. An NVIDIA card is measured too: 3 GB of it.
    """
    from rich.console import Console

    from hybridk2 import measurement
    from hybridk2.checkpoint import locate_model
    from hybridk2.experts.host import usable_cores
    from hybridk2.hardware import findings, inspect_system, profile_path, save_profile

    folder = None if model is None else locate_model(model)
    system = inspect_system()
    status = Console(stderr=True)
    with status.status("measuring") as spinner:

        def show(stage: str, done: int, rounds: int) -> None:
            spinner.update(f"{stage}: {done} of {rounds}")

        disk = None if folder is None else measurement.disk_bytes_per_second(folder)
        spinner.update("instruction sets")
        roofs = measurement.arithmetic_roofs()
        spinner.update("NUMA nodes")
        nodes = measurement.node_read_roofs(system.nodes)
        profile = measurement.measure_machine(system, show)
        card, obstacle = _card(system, show)
    if card is not None:
        profile = replace(profile, gpu=card.profile)
    name = None if card is None else card.profile.name
    found = findings(system, usable_cores(), name, obstacle)
    path = profile_path(config_home)
    output = Console(quiet=as_json, highlight=False, markup=False)
    if as_json:
        report: dict[str, Any] = {
            "profile": str(path),
            "machine": profile.as_dict(),
            "arithmetic_roofs": roofs,
            "node_read_roofs": nodes,
            "disk_bytes_per_second": disk,
            "handoff_seconds": None if card is None else card.handoff_seconds,
            "findings": [asdict(finding) for finding in found],
        }
        click.echo(json.dumps(report, indent=2, allow_nan=False))
    _print_speeds(output, profile, roofs, nodes, disk)
    if card is not None:
        _print_card(output, card)
    _print_findings(output, found)
    save_profile(path, profile)  # last: what was measured is shown even if the disk refuses it
    output.print(f"Written to {path}; hybridk2 plan reads it.")


def _card(
    system: SystemFacts, show: Callable[[str, int, int], None]
) -> tuple[CardFigures | None, str]:
    """What a card here does, or why that is not known; neither where there is none."""
    from hybridk2 import measurement
    from hybridk2.errors import HybridK2Error

    if not system.nvidia_gpus:
        return None, ""
    try:
        return measurement.measure_card(show), ""
    except HybridK2Error as error:
        return None, str(error)


def _print_card(output: Console, card: CardFigures) -> None:
    from rich.table import Table

    table = Table(title=f"{card.profile.name}, {card.profile.memory_bytes / 1e9:.1f} GB")
    table.add_column("the card")
    table.add_column("", justify="right")
    for what, speed in (
        ("a copy within it, read and written", card.profile.bytes_per_second),
        ("copies to it from pinned memory", card.profile.bus_bytes_per_second),
    ):
        table.add_row(what, f"{speed / 1e9:.1f} GB/s")
    table.add_row("bf16 products", f"{card.profile.flops / 1e12:.0f} TFLOP/s")
    for mechanism, seconds in card.handoff_seconds.items():
        table.add_row(f"a layer's way to the host and back, {mechanism}", f"{seconds * 1e6:.0f} us")
    output.print(table)


def _print_speeds(
    output: Console,
    profile: MachineProfile,
    roofs: dict[str, float],
    nodes: dict[str, float],
    disk: float | None,
) -> None:
    from rich.table import Table

    rows = [
        ("experts' kernels, one token, alone", profile.host_read_bytes_per_second),
        ("experts, shared expert and router, one token", profile.moe_bytes_per_second),
        ("attention's weights, one token", profile.attention_bytes_per_second),
        ("a dense SwiGLU, one token", profile.dense_bytes_per_second),
        ("lm_head", profile.head_bytes_per_second),
        ("cached latents", profile.latent_bytes_per_second),
    ]
    roof = profile.host_read_roof_bytes_per_second
    table = Table(title=f"{profile.name}, {profile.cores} cores, {profile.isa} kernels")
    table.add_column("reading")
    table.add_column("GB/s", justify="right")
    table.add_column("of the roof", justify="right")
    table.add_row("a plain loop over all weights: the roof", f"{roof / 1e9:.1f}", "")
    for name, speed in rows:
        table.add_row(name, f"{speed / 1e9:.1f}", f"{speed / roof:.2f}")
    if len(nodes) > 1:
        for name, speed in nodes.items():
            table.add_row(name, f"{speed / 1e9:.1f}", f"{speed / roof:.2f}")
    table.add_row(
        "the model's disk" if disk is not None else "a model's disk: name the model",
        "" if disk is None else f"{disk / 1e9:.2f}",
        "",
    )
    output.print(table)
    table = Table()
    table.add_column("arithmetic, bf16 activations")
    table.add_column("TFLOP/s", justify="right")
    for isa, flops in roofs.items():
        table.add_row(f"{isa}, in registers", f"{flops / 1e12:.3f}")
    table.add_row("experts' kernels, 16 tokens each", f"{profile.host_flops / 1e12:.3f}")
    table.add_row("dense products, 512 rows", f"{profile.dense_flops / 1e12:.3f}")
    output.print(table)
    output.print(f"A layer without weights takes {profile.layer_overhead_seconds * 1e6:.0f} us.")
    output.print(f"A process takes {profile.process_bytes / 1e6:.0f} MB beside weights and cache.")


def _print_findings(output: Console, found: list[Finding]) -> None:
    styles = {"ok": "green", "note": "yellow", "wrong": "red"}
    for finding in found:
        line = f"{finding.state:<6}{finding.subject}: {finding.found}"
        output.print(line, style=styles[finding.state], soft_wrap=True)
        if finding.command:
            output.print(f"      {finding.command}", soft_wrap=True)

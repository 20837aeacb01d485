"""`hybridk2 plan`: will it fit, how fast will it be, and what limits it.

Owns the options, the tables and the JSON. The sums are `hybridk2.planner`'s business, the figures
of this machine `hybridk2 doctor`'s. Exit status: 0 it fits, 1 it does not or something is refused.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from hybridk2.cli.options import config_home_option

if TYPE_CHECKING:
    from rich.console import Console

    from hybridk2.hardware import GpuProfile, MachineProfile
    from hybridk2.planner import ModelSizes, Plan

_EPILOG = """\b
Examples:
  hybridk2 plan kimi-k2-thinking --cpu-gbps 400 --ram 768
  hybridk2 plan kimi-k2-thinking --cpu-gbps 200 --ram 640 --gpu "RTX 5090" --context 131072
  hybridk2 plan /path/to/Kimi-K2-Thinking        # this machine, after hybridk2 doctor
"""
_PROMPTS = (512, 4096, 16_384)
_DEFAULT_CONTEXT_TOKENS = 32_768  # as the engine's


@click.command(epilog=_EPILOG)
@click.argument("model")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Tokens to make room for. [default: 32,768, or what the model was trained for]",
)
@click.option("--ram", type=click.FloatRange(min=0, min_open=True), help="GB of host memory.")
@click.option(
    "--cpu-gbps",
    type=click.FloatRange(min=0, min_open=True),
    help="GB/s that the experts' kernels read, for a machine that is not this one.",
)
@click.option(
    "--cpu-tflops",
    type=click.FloatRange(min=0, min_open=True),
    help="TFLOP/s of its bf16 products. [default: 0.02 for each GB/s]",
)
@click.option("--gpu", metavar="NAME", help='A card, such as "RTX 5090".')
@click.option(
    "--gpu-memory",
    type=click.FloatRange(min=0, min_open=True),
    help="GiB of a card: another one, or one without a name.",
)
@click.option(
    "--kv-dtype",
    type=click.Choice(["bf16", "fp8"]),
    default="bf16",
    show_default=True,
    help="Of the cache on the card; fp8 is approximate.",
)
@click.option(
    "--dense",
    type=click.Choice(["bf16", "int8"]),
    default="bf16",
    show_default=True,
    help="Of the weights on the card; int8 is approximate.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@config_home_option
@click.pass_context
def plan(
    ctx: click.Context,
    model: str,
    context: int | None,
    ram: float | None,
    cpu_gbps: float | None,
    cpu_tflops: float | None,
    gpu: str | None,
    gpu_memory: float | None,
    kv_dtype: Literal["bf16", "fp8"],
    dense: Literal["bf16", "int8"],
    as_json: bool,
    config_home: Path,
) -> None:
    """Say whether MODEL fits, how fast it will be and what limits it, before it is loaded.

    MODEL is a checkpoint folder, whose shards need not be there yet, a cached Hugging Face id,
    nano, or kimi-k2-thinking, which needs no file. Without --cpu-gbps the speeds are those that
    `hybridk2 doctor` measured on this machine and its card. What another GPU would do rests on its
    data sheet.
    """
    if cpu_tflops is not None and cpu_gbps is None:
        raise click.UsageError("--cpu-tflops describes another machine: it needs --cpu-gbps.")
    card = _card(gpu, gpu_memory)

    from rich.console import Console

    from hybridk2.planner import Choices
    from hybridk2.planner import plan as make_plan

    sizes, absent = _sizes(model)
    longest = sizes.max_context_tokens
    if context is not None and context > longest:
        raise click.UsageError(f"--context: the model was trained for {longest} tokens at most.")
    context = context or min(_DEFAULT_CONTEXT_TOKENS, longest)
    machine = _machine(config_home, cpu_gbps, cpu_tflops, ram, card)
    if machine.gpu is None and (kv_dtype, dense) != ("bf16", "bf16"):
        raise click.UsageError("--kv-dtype and --dense are about a card: they need --gpu.")
    made = make_plan(sizes, machine, Choices(context, kv_dtype, dense))
    if as_json:
        click.echo(json.dumps({"model": model, **made.as_dict()}, indent=2, allow_nan=False))
    else:
        output = Console(highlight=False, markup=False)
        _print(output, model, made)
        if absent:
            output.print(f"Planned from config and index: {absent}.", style="dim")
        if machine.measured and ram is None:
            _print_what_is_free_now(output, made)
    if not made.fits:
        ctx.exit(1)


def _card(name: str | None, gibibytes: float | None) -> GpuProfile | None:
    from hybridk2.hardware import gpu_named, gpu_of_memory

    memory_bytes = None if gibibytes is None else int(gibibytes * (1 << 30))
    if name is None:
        return None if memory_bytes is None else gpu_of_memory(memory_bytes)
    card = gpu_named(name)
    return card if memory_bytes is None else replace(card, memory_bytes=memory_bytes)


def _sizes(model: str) -> tuple[ModelSizes, str]:
    """The model's sizes, and which of its shards are not there yet, in words."""
    from hybridk2.checkpoint import describe_folder, locate_model
    from hybridk2.planner import BUILT_IN, ModelSizes

    if model in BUILT_IN:
        return ModelSizes.from_config(BUILT_IN[model]), ""
    described = describe_folder(locate_model(model))
    missing = len(described.missing_shards)
    absent = f"{missing} of {described.shards} shards are not there yet" if missing else ""
    return ModelSizes.from_config(described.config), absent


def _machine(
    config_home: Path,
    cpu_gbps: float | None,
    cpu_tflops: float | None,
    ram: float | None,
    card: GpuProfile | None,
) -> MachineProfile:
    from hybridk2.errors import ConfigError
    from hybridk2.hardware import described_machine, load_profile, profile_path

    path = profile_path(config_home)
    if cpu_gbps is not None:
        if ram is None:
            raise click.UsageError("--cpu-gbps describes another machine: it needs --ram.")
        flops = None if cpu_tflops is None else cpu_tflops * 1e12
        machine = described_machine(cpu_gbps * 1e9, int(ram * 1e9), flops)
    else:
        found = load_profile(path)
        if found is None:
            raise ConfigError(
                f"{path}: this machine has not been measured. Run `hybridk2 doctor`, or describe a "
                "machine with --cpu-gbps and --ram"
            )
        machine = found if ram is None else replace(found, ram_bytes=int(ram * 1e9))
    return machine if card is None else replace(machine, gpu=card)


def _print(output: Console, model: str, made: Plan) -> None:
    machine, gpu = made.machine, made.machine.gpu
    origin = "as measured" if machine.measured else "as described"
    output.print(f"{model} on {machine.name}, {origin}" + (f", and {gpu.name}" if gpu else ""))
    _print_places(output, made)
    if made.fits:
        output.print("It fits.", style="green")
    else:
        output.print(
            f"It does not fit: {_gb(made.shortfall_bytes)} are missing. Enough would be:",
            style="red",
        )
        for nearest in made.nearest:
            output.print(f"  {nearest.place}: {nearest.options}   ({nearest.effect})")
    if gpu is not None:
        output.print(
            f"On the card: {made.resident_experts:,} routed experts, "
            f"{made.resident_experts / max(made.sizes.moe_layers, 1):.2f} of "
            f"{made.sizes.experts_per_layer} in the mean layer."
        )
    _print_times(output, made)
    _print_remarks(output, made)


def _print_places(output: Console, made: Plan) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("place")
    table.add_column("what")
    table.add_column("GB", justify="right")
    for place in made.places:
        name = place.name
        for what, num_bytes in place.contents:
            table.add_row(name, what, f"{num_bytes / 1e9:,.2f}")
            name = ""
        total = f"{place.needed_bytes / 1e9:,.2f} of {place.capacity_bytes / 1e9:,.2f}"
        table.add_row("", "together", total, end_section=True)
    output.print(table)


def _print_times(output: Console, made: Plan) -> None:
    from rich.table import Table

    context = min(made.choices.decode_context_tokens, made.choices.context_tokens)
    table = Table()
    table.add_column("a token takes")
    table.add_column("ms", justify="right")
    table.add_column("waiting for")
    for part in made.decode.parts:
        table.add_row(part.name, f"{part.seconds * 1e3:,.2f}", part.resource)
    if made.decode.overlapped_seconds:
        table.add_row("side by side", f"-{made.decode.overlapped_seconds * 1e3:,.2f}", "")
    table.add_row("together", f"{made.decode.seconds * 1e3:,.2f}", "")
    output.print(table)
    output.print(
        f"decode   {made.decode_tokens_per_second:.3g} tok/s after {context:,} tokens, "
        f"limited by {made.limit}"
    )
    for tokens in _PROMPTS:
        prefill = made.prefill(tokens)
        output.print(
            f"prefill  {tokens / prefill.seconds:.4g} tok/s for {tokens:,} tokens, "
            f"limited by {prefill.limit}"
        )


def _print_remarks(output: Console, made: Plan) -> None:
    gpu = made.machine.gpu
    if gpu is not None:
        if not gpu.measured:
            output.print(
                "This card has not been measured: what it would do is planned from its data sheet "
                "and assumptions.",
                style="dim",
            )
        if (made.choices.kv_dtype, made.choices.dense) != ("bf16", "bf16"):
            output.print("fp8 caches and int8 weights round what the model computes.", style="dim")
    if not made.machine.measured:
        output.print("A described machine: speeds follow from the GB/s alone.", style="dim")


def _print_what_is_free_now(output: Console, made: Plan) -> None:
    """Whether other programs hold what this machine would have for the model."""
    from hybridk2.hardware import inspect_system

    system = inspect_system()
    free = system.available_ram_bytes + system.free_gigabyte_pages * (1 << 30)
    needed = made.places[-1].needed_bytes
    if free < needed <= made.places[-1].capacity_bytes:
        output.print(
            f"Just now {_gb(free)} of host memory are free, {_gb(needed)} are needed: close other "
            "programs before loading.",
            style="yellow",
        )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"

"""`hybridk2 synth`: write a random-weight checkpoint in K2-Thinking's exact format.

Owns the options, the progress bar and the closing line. What is written is `hybridk2.synthesis`'
business.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--scale",
    type=click.Choice(["full", "small", "tiny"]),
    default="full",
    show_default=True,
    help="K2's true dimensions, or the same structure scaled down.",
)
@click.option(
    "--layers",
    type=click.IntRange(min=2),
    help="Layers, the first of them dense. [default: 2, 4, 3 by scale]",
)
@click.option(
    "--experts",
    type=click.IntRange(min=1),
    help="Routed experts in each other layer. [default: 384, 64, 8 by scale]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--variant",
    type=click.Choice(["thinking", "k2.5"]),
    default="thinking",
    show_default=True,
    help="Names and config as in K2-Thinking, or as in K2.5.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Copy the vocabulary of this checkpoint folder, and fit the model's to it.",
)
def synth(
    out: Path,
    scale: Literal["full", "small", "tiny"],
    layers: int | None,
    experts: int | None,
    seed: int,
    variant: Literal["thinking", "k2.5"],
    tokenizer: Path | None,
) -> None:
    """Write a random-weight checkpoint to the new folder OUT.

    It loads, fits in memory and performs like a published checkpoint of that size; what it says is
    noise. K2's true dimensions take 9.8 GB for each MoE layer, and 5.7 GB for the rest.
    """
    from hybridk2 import synthesis

    config = synthesis.synthetic_config(scale, layers=layers, experts=experts, variant=variant)
    if tokenizer is not None:
        config = synthesis.config_for_tokenizer(config, tokenizer)
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(str(out), total=None)
        written = synthesis.synthesize(
            out,
            config,
            seed,
            tokenizer_folder=tokenizer,
            on_progress=lambda progress: bar.update(
                task, completed=progress.done_bytes, total=progress.total_bytes
            ),
        )
    console.print(
        f"{out}: {written / 1e9:.3g} GB, {config.num_hidden_layers} layers, "
        f"{config.n_routed_experts} experts in each of {config.num_moe_layers}, seed {seed}",
        highlight=False,
    )

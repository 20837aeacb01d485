"""Does the planner predict what this machine then does?

Makes K2-shaped models of three sizes, plans each, loads it and decodes several times, with the
machine's profile measured in the middle: machines with neighbours change from minute to minute.
Compares the median tokens per second, and the planned bytes with the growth of the resident set.
Each model has a process of its own, in which a product of each kind ran before, so that libraries
are there already.

The last line is JSON. With --check the exit status is 1 when a prediction is off by more than 15%,
or the bytes by more than 1%.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import psutil
import torch

from hybridk2.config import EngineConfig
from hybridk2.engine import Engine
from hybridk2.hardware import MachineProfile, inspect_system
from hybridk2.measurement import measure_machine
from hybridk2.planner import Choices, ModelSizes, Plan, plan
from hybridk2.request import Generation
from hybridk2.sampling import SamplingParams
from hybridk2.synthesis import synthesize, synthetic_config

MOST_TIME_ERROR, MOST_BYTES_ERROR = 0.15, 0.01
PROMPT_TOKENS = 64
LONG_PROMPT_TOKENS = 512
CONTEXT_TOKENS = 1024
MODELS = {
    "true dimensions, 2 layers of 16 experts": ("full", 2, 16),
    "true dimensions, 4 layers of 24 experts": ("full", 4, 24),
    "small, 4 layers of 64 experts": ("small", 4, 64),
}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tokens", default=8, show_default=True, help="Decoded in each run.")
@click.option("--runs", default=4, show_default=True, help="Before the profile, and after it.")
@click.option("--make-only", is_flag=True, help="Write the models and measure nothing.")
@click.option("--check", is_flag=True, help="Exit with 1 when a prediction does not hold.")
def main(folder: Path, tokens: int, runs: int, make_only: bool, check: bool) -> None:
    """Keep the models in FOLDER, 16 GB, and make those that are not there yet."""
    for number, (scale, layers, experts) in enumerate(MODELS.values()):
        if not (folder / str(number)).exists():
            config = synthetic_config(scale, layers=layers, experts=experts)  # type: ignore[arg-type]
            synthesize(folder / str(number), config, seed=number)
    if make_only:
        return
    rows = []
    for number, name in enumerate(MODELS):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            rows.append(process.submit(run, name, folder / str(number), tokens, runs).result())
    print(json.dumps({"bench": "plan", "rows": rows}))
    if check and not all(row["holds"] for row in rows):
        sys.exit(1)


def run(name: str, folder: Path, tokens: int, runs: int) -> dict[str, object]:
    """Load one model and compare; prints a line."""
    for dtype in (torch.bfloat16, torch.float32):
        torch.nn.functional.linear(torch.ones(1, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype))
    process = psutil.Process()
    before_bytes = process.memory_info().rss
    choices = EngineConfig(model=str(folder), context_tokens=CONTEXT_TOKENS)
    engine = Engine.load(choices)
    try:
        decode(engine, tokens=2, seed=0)  # what the first call compiles and allocates
        resident_bytes = process.memory_info().rss - before_bytes
        prefill = read_prompt(engine)
        speeds = [decode(engine, tokens, seed) for seed in range(runs)]
        profile = measure()
        speeds += [decode(engine, tokens, seed) for seed in range(runs)]
    finally:
        engine.close()
    made = prediction(folder, profile, tokens)
    measured = statistics.median(speeds)
    time_error = made.decode_tokens_per_second / measured - 1
    planned_bytes = sum(
        num_bytes
        for what, num_bytes in made.places[0].contents
        if what not in ("latent cache", "to work with")  # taken as they are used
    )
    bytes_error = planned_bytes / resident_bytes - 1
    holds = abs(time_error) <= MOST_TIME_ERROR and abs(bytes_error) <= MOST_BYTES_ERROR
    verdict = "pass" if holds else "FAIL"
    print(
        f"{name}: predicted {made.decode_tokens_per_second:.2f} tok/s, measured "
        f"{measured:.2f} ({min(speeds):.2f} to {max(speeds):.2f}): {time_error:+.1%}; planned "
        f"{planned_bytes / 1e9:.3f} GB, resident {resident_bytes / 1e9:.3f} GB: "
        f"{bytes_error:+.2%}: {verdict}",
        flush=True,
    )
    predicted_prefill = made.prefill_tokens_per_second(LONG_PROMPT_TOKENS)
    print(
        f"    prefill of {LONG_PROMPT_TOKENS} tokens: predicted {predicted_prefill:.1f} tok/s, "
        f"measured {prefill:.1f}"
    )
    for part in made.decode.parts:
        print(f"    {part.seconds * 1e3:8.2f} ms  {part.name}")
    return {
        "model": name,
        "predicted_tokens_per_second": made.decode_tokens_per_second,
        "measured_tokens_per_second": speeds,
        "predicted_prefill_tokens_per_second": predicted_prefill,
        "measured_prefill_tokens_per_second": prefill,
        "planned_bytes": planned_bytes,
        "resident_bytes": resident_bytes,
        "machine": profile.as_dict(),
        "holds": holds,
    }


def measure() -> MachineProfile:
    threads = torch.get_num_threads()
    try:
        return measure_machine(inspect_system(), lambda stage, done, rounds: None)
    finally:
        torch.set_num_threads(threads)


def prediction(folder: Path, profile: MachineProfile, tokens: int) -> Plan:
    choices = Choices(CONTEXT_TOKENS, decode_context_tokens=PROMPT_TOKENS + tokens // 2)
    return plan(ModelSizes.from_checkpoint(folder), profile, choices)


def decode(engine: Engine, tokens: int, seed: int) -> float:
    """Tokens per second after the first one."""
    return tokens / answer(engine, PROMPT_TOKENS, tokens + 1, seed).decode_seconds


def read_prompt(engine: Engine) -> float:
    """Tokens per second of a prompt of one whole chunk; the second, as the first compiles."""
    seconds = [answer(engine, LONG_PROMPT_TOKENS, 1, seed).prefill_seconds for seed in (-1, -2)]
    return LONG_PROMPT_TOKENS / seconds[-1]


def answer(engine: Engine, prompt_tokens: int, tokens: int, seed: int) -> Generation:
    """Run a prompt of random ids to its end; other seeds share no prefix."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = engine.config.vocab_size
    prompt = torch.randint(vocabulary, (prompt_tokens,), generator=generator).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    generation = engine.submit(prompt, params, stop_ids=())
    assert sum(1 for _ in engine.tokens(generation)) == tokens
    return generation


if __name__ == "__main__":
    main()

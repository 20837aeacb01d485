"""Does the planner predict what this machine then does?

Makes K2-shaped models of three sizes, loads each into a process of its own and plans it. The
machine's profile is measured beside it, round by round in turns with the model's tokens: machines
with neighbours change from minute to minute, so medians over the same minute are compared.

Held to: tokens per second of decoding within 15%; the resident set after the first tokens within 1%
of weights and process, and never beyond all that the plan counts. Prompts are compared and their
error is printed. The last line is JSON. With --check the exit status is 1 when one does not hold.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
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

SPAWN = multiprocessing.get_context("spawn")

MOST_TIME_ERROR, MOST_BYTES_ERROR = 0.15, 0.01
PROMPT_TOKENS = 64
LONG_PROMPT_TOKENS = 512
CONTEXT_TOKENS = 1024
# Layers and experts of each, in K2's true dimensions.
MODELS = ((2, 16), (4, 24), (3, 64))
# What a plan counts and the first tokens do not take.
USED_LATER = ("latent cache", "to work with")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tokens", default=4, show_default=True, help="Decoded in each turn.")
@click.option("--only", type=click.IntRange(1, len(MODELS)), help="One of the models, a minute.")
@click.option("--make-only", is_flag=True, help="Write the models and measure nothing.")
@click.option("--check", is_flag=True, help="Exit with 1 when a prediction does not hold.")
def main(folder: Path, tokens: int, only: int | None, make_only: bool, check: bool) -> None:
    """Keep the models in FOLDER, 24 GB, and make those that are not there yet."""
    models = [folder / f"full-{layers}-{experts}" for layers, experts in MODELS]
    for seed, (path, (layers, experts)) in enumerate(zip(models, MODELS, strict=True)):
        if not path.exists():
            synthesize(path, synthetic_config("full", layers=layers, experts=experts), seed)
    if make_only:
        return
    rows = []
    for number, (path, (layers, experts)) in enumerate(zip(models, MODELS, strict=True), 1):
        if only not in (None, number):
            continue
        with ProcessPoolExecutor(1, SPAWN) as process:
            name = f"{layers} layers of {experts} experts"
            rows.append(process.submit(compare, name, path, tokens).result())
    print(json.dumps({"bench": "plan", "rows": rows}))
    if check and not all(row["holds"] for row in rows):
        sys.exit(1)


@dataclass(frozen=True)
class Measured:
    """Seconds of each decoded token and of each long prompt; bytes of the model's process."""

    token_seconds: list[float]
    prompt_seconds: list[float]
    resident_bytes: int
    most_resident_bytes: int


def compare(name: str, folder: Path, tokens: int) -> dict[str, object]:
    """Measure one model and the machine, and compare; prints lines."""
    profile, measured = measure(folder, tokens)
    decoded = PROMPT_TOKENS + len(measured.token_seconds) // 2
    made = plan(
        ModelSizes.from_checkpoint(folder),
        profile,
        Choices(CONTEXT_TOKENS, decode_context_tokens=decoded),
    )
    speed = 1 / statistics.median(measured.token_seconds)
    prompt_speed = LONG_PROMPT_TOKENS / statistics.median(measured.prompt_seconds)
    predicted_prompt_speed = made.prefill_tokens_per_second(LONG_PROMPT_TOKENS)
    host = made.places[0]
    planned_bytes = sum(size for what, size in host.contents if what not in USED_LATER)
    errors = {
        "decode": made.decode_tokens_per_second / speed - 1,
        "bytes": planned_bytes / measured.resident_bytes - 1,
        "prefill": predicted_prompt_speed / prompt_speed - 1,
    }
    holds = (
        abs(errors["decode"]) <= MOST_TIME_ERROR
        and abs(errors["bytes"]) <= MOST_BYTES_ERROR
        and measured.most_resident_bytes <= host.needed_bytes
    )
    decode_line, prefill_line = (
        f"{predicted:8.2f} tok/s predicted, {found:8.2f} measured: {errors[what]:+.1%}"
        for what, predicted, found in (
            ("decode", made.decode_tokens_per_second, speed),
            ("prefill", predicted_prompt_speed, prompt_speed),
        )
    )
    print(
        f"{name}: {'pass' if holds else 'FAIL'}\n"
        f"    decode   {decode_line}\n"
        f"    prefill  {prefill_line}, {LONG_PROMPT_TOKENS} tokens\n"
        f"    resident {planned_bytes / 1e9:8.3f} GB planned, "
        f"{measured.resident_bytes / 1e9:8.3f} measured: {errors['bytes']:+.2%}\n"
        f"    at most  {host.needed_bytes / 1e9:8.3f} GB planned, "
        f"{measured.most_resident_bytes / 1e9:8.3f} measured",
        flush=True,
    )
    print_parts(made)
    return {
        "model": name,
        "holds": holds,
        "errors": errors,
        "predicted_tokens_per_second": made.decode_tokens_per_second,
        "predicted_prefill_tokens_per_second": predicted_prompt_speed,
        "planned_bytes": planned_bytes,
        "planned_most_bytes": host.needed_bytes,
        "measured": asdict(measured),
        "machine": profile.as_dict(),
    }


def print_parts(made: Plan) -> None:
    for what, parts in (
        ("a token", made.decode.parts),
        (f"{LONG_PROMPT_TOKENS} tokens", made.prefill(LONG_PROMPT_TOKENS).parts),
    ):
        print(f"    {what} take, as predicted:")
        for part in parts:
            print(f"    {part.seconds * 1e3:10.2f} ms  {part.name}, {part.resource}")


def measure(folder: Path, tokens: int) -> tuple[MachineProfile, Measured]:
    """The machine's profile and the model's figures, in turns."""
    token_seconds: list[float] = []
    prompt_seconds: list[float] = []
    with ProcessPoolExecutor(1, SPAWN, initializer=load, initargs=(folder,)) as model:
        resident_bytes, _ = model.submit(resident).result()

        def take_turns(stage: str, done: int, rounds: int) -> None:
            if done == rounds:
                return
            if stage == "decoding, part by part":
                token_seconds.extend(model.submit(decode, tokens).result())
            elif stage == "prompts":
                if done == 0:  # compiles and allocates
                    model.submit(read_prompt, -1).result()
                prompt_seconds.append(model.submit(read_prompt, done).result())

        profile = measure_machine(inspect_system(), take_turns)
        _, most_resident_bytes = model.submit(resident).result()
        model.submit(end).result()
    return profile, Measured(token_seconds, prompt_seconds, resident_bytes, most_resident_bytes)


# -- In the model's process -----------------------------------------------------------------------

_engine: Engine
_answer: Generation


def load(folder: Path) -> None:
    """Load the model and begin an answer that every turn goes on with."""
    global _engine, _answer
    _engine = Engine.load(EngineConfig(model=str(folder), context_tokens=CONTEXT_TOKENS))
    _answer = submit(PROMPT_TOKENS, CONTEXT_TOKENS - PROMPT_TOKENS - LONG_PROMPT_TOKENS, seed=0)
    decode(tokens=3)  # what the first ones compile and allocate


def decode(tokens: int) -> list[float]:
    """Seconds of each of the next tokens of the answer."""
    seconds = []
    for _ in range(tokens):
        before = _answer.decode_seconds
        while _engine.take(_answer) is None:
            assert _engine.step(), "the answer ended"
        seconds.append(_answer.decode_seconds - before)
    return seconds


def read_prompt(seed: int) -> float:
    """Seconds of a prompt of one whole chunk, its first token included."""
    _engine.cancel(_answer)
    generation = submit(LONG_PROMPT_TOKENS, 1, seed)
    for _ in _engine.tokens(generation):
        pass
    return generation.prefill_seconds


def resident() -> tuple[int, int]:
    """Bytes of this process now, and at most so far."""
    return psutil.Process().memory_info().rss, resource.getrusage(
        resource.RUSAGE_SELF
    ).ru_maxrss * 1024


def end() -> None:
    _engine.close()


def submit(prompt_tokens: int, max_tokens: int, seed: int) -> Generation:
    """A prompt of random ids; other seeds share no prefix."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(_engine.config.vocab_size, (prompt_tokens,), generator=generator)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return _engine.submit(prompt.tolist(), params, stop_ids=())


if __name__ == "__main__":
    main()

"""The measuring: a prompt read once, up to each context, and decoding from each several times.

Owns the workload and the order of things; what the samples come to is `figures`' business. The
prompt is random ids, one long prefix: at every context the cache already holds all before it, so
that decoding starts at once and its runs differ in their last token of the prompt only.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime

import torch

from hybridk2 import __version__
from hybridk2.benchmark.figures import (
    Benchmark,
    Frontier,
    PassFigures,
    Roofs,
    Sizes,
    Spread,
    run_seconds,
)
from hybridk2.config import K2Config
from hybridk2.engine import Engine
from hybridk2.hardware import MachineProfile, inspect_system
from hybridk2.planner import CPU_CHUNK_TOKENS, Choices, ModelSizes, plan
from hybridk2.request import Generation
from hybridk2.sampling import SamplingParams
from hybridk2.timeline import Step, Timeline

_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Workload:
    """contexts: tokens, ascending. tokens: decoded in each of `repeat` runs."""

    contexts: tuple[int, ...]
    tokens: int
    repeat: int

    @property
    def context_tokens(self) -> int:
        """What the engine needs room for: the last prompt, its answer, and the token after it."""
        return self.contexts[-1] + self.tokens + 2

    def fits(self, longest: int) -> bool:
        """Whether a model that was trained for contexts of `longest` tokens can be given it."""
        return self.context_tokens <= longest


@dataclass(frozen=True)
class Progress:
    """A moment of the measuring. stage: what goes on, for a person; done of total tokens."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Subject:
    """What is measured: the model's name, the dtype of its activations, and how it was loaded.

    profile: what `hybridk2 doctor` measured of this machine, None if it has not yet.
    """

    model: str
    dtype: str
    load_seconds: float
    profile: MachineProfile | None = None


def measure(
    engine: Engine, workload: Workload, subject: Subject
) -> Generator[Progress, None, Benchmark]:
    """Measure an idle engine with room for the workload; it yields after every step.

    Its last value is the benchmark. Closing it ends the measuring.
    """
    started_at = datetime.now().astimezone().isoformat(timespec="seconds")
    dtype: torch.dtype = getattr(torch, subject.dtype)
    sizes = replace(sizes_of(engine.config, dtype), all_on_host=engine.card is None)
    ids = random_ids(engine.config, workload.contexts[-1] + workload.repeat)
    prompt, last_ids = ids[: workload.contexts[-1]], ids[workload.contexts[-1] :]
    try:
        yield from _warm_up(engine, prompt)
        frontiers, read_roofs, flop_roofs = [], [], []
        planned = planned_decode(engine, workload, subject)
        for context, prediction in zip(workload.contexts, planned, strict=True):
            reading = yield from _read(engine, prompt[:context])
            read_roofs.append(engine.experts.read_bytes_per_second())
            flop_roofs.append(engine.experts.arithmetic_roof(dtype))
            yield Progress(f"context {context:,}: the machine's roofs", 1, 1)
            runs = []
            for number, last_id in enumerate(last_ids, start=1):
                stage = f"context {context:,}: decoding, run {number} of {workload.repeat}"
                varied = (*prompt[: context - 1], last_id)
                runs.append((yield from _decode(engine, varied, workload.tokens, stage)))
            frontiers.append(_frontier(context, reading, runs, sizes, prediction))
    finally:
        engine.record_times(None)
    return Benchmark(
        version=__version__,
        model=subject.model,
        machine=" with ".join(filter(None, (inspect_system().processor, engine.card))),
        isa=engine.experts.isa,
        threads=engine.experts.threads,
        nodes=len(engine.experts.threads_of_node),
        dtype=subject.dtype,
        weight_bytes=engine.experts.weight_bytes + sizes.dense_bytes,
        load_seconds=subject.load_seconds,
        started_at=started_at,
        roofs=Roofs(
            max(read_roofs) or None,
            max((roof for roof in flop_roofs if roof is not None), default=None),
        ),
        frontiers=tuple(frontiers),
    )


def random_ids(config: K2Config, tokens: int) -> tuple[int, ...]:
    """The same ids for the same model, so that runs can be compared."""
    generator = random.Random(0)
    return tuple(generator.randrange(config.vocab_size) for _ in range(tokens))


def sizes_of(config: K2Config, dtype: torch.dtype) -> Sizes:
    """What a step reads: weights as published, but in the activations' dtype, and routers in fp32.

    lm_head stays bf16 whatever the activations are.
    """
    parts = ModelSizes.from_config(config)
    placed = parts.attention_bytes + parts.shared_bytes + parts.dense_mlp_bytes
    return Sizes(
        expert_bytes=parts.expert_bytes,
        dense_bytes=placed * dtype.itemsize // torch.bfloat16.itemsize
        + parts.router_bytes * torch.float32.itemsize // torch.bfloat16.itemsize
        + parts.head_bytes,
        latent_bytes=config.num_hidden_layers * config.latent_dim * dtype.itemsize,
        expert_flop=2 * parts.expert_parameters,
        experts_per_token=config.num_experts_per_tok,
    )


def planned_decode(engine: Engine, workload: Workload, subject: Subject) -> list[float | None]:
    """Tokens/s at each context as `hybridk2 plan` predicts them from the machine's profile.

    None where there is no profile of these kernels, threads and activations, or a card computes,
    which a profile does not describe.
    """
    profile, experts = subject.profile, engine.experts
    measured = profile is not None and (profile.isa, profile.cores, subject.dtype) == (
        *(experts.isa, experts.threads),
        "bfloat16",
    )
    if profile is None or not measured or engine.card is not None:
        return [None] * len(workload.contexts)
    sizes, on_cpu = ModelSizes.from_config(engine.config), replace(profile, gpu=None)
    middle = workload.tokens // 2
    return [
        plan(
            sizes, on_cpu, Choices(workload.context_tokens, decode_context_tokens=context + middle)
        ).decode_tokens_per_second
        for context in workload.contexts
    ]


def _warm_up(engine: Engine, prompt: Sequence[int]) -> Generator[Progress, None, None]:
    """Run every shape of step once: torch compiles products when it first meets them.

    Backwards, the prompt shares no prefix with the one to be measured.
    """
    backwards = tuple(reversed(prompt))[:CPU_CHUNK_TOKENS]
    with _submitted(engine, backwards, _WARM_UP_TOKENS) as generation:
        while not generation.done:
            engine.step()
            yield Progress("warming up", generation.completion_tokens, _WARM_UP_TOKENS)


def _read(engine: Engine, prompt: tuple[int, ...]) -> Generator[Progress, None, list[Step]]:
    """Read what is not cached of the prompt. Returns the steps, a chunk each."""
    timeline = Timeline()
    engine.record_times(timeline)
    stage = f"context {len(prompt):,}: reading the prompt"
    with _submitted(engine, prompt, 1) as generation:
        while not generation.done:
            engine.step()
            yield Progress(stage, generation.prefilled_tokens, len(prompt))
    return timeline.steps


def _decode(
    engine: Engine, prompt: tuple[int, ...], tokens: int, stage: str
) -> Generator[Progress, None, list[Step]]:
    """Decode so many tokens after the first. Returns their steps, without that of the prompt."""
    timeline = Timeline()
    engine.record_times(timeline)
    with _submitted(engine, prompt, tokens + 1) as generation:
        while not generation.done:
            engine.step()
            yield Progress(stage, generation.completion_tokens, tokens + 1)
    return [step for step in timeline.steps if step.kind == "decode"]


@contextmanager
def _submitted(engine: Engine, prompt: tuple[int, ...], tokens: int) -> Iterator[Generation]:
    """A request that is greedy and ends at its last token; it ends with the block at the latest.

    Raises the request's error when a step of it failed.
    """
    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    generation = engine.submit(prompt, params, stop_ids=())
    try:
        yield generation
    finally:
        engine.cancel(generation)
    if generation.error is not None:
        raise generation.error


def _frontier(
    context: int,
    reading: list[Step],
    runs: list[list[Step]],
    sizes: Sizes,
    planned: float | None,
) -> Frontier:
    # Whole chunks are one kind of sample; what is left over at an end is not, where there are any.
    largest = max(step.tokens for step in reading)
    chunks = [step for step in reading if step.tokens == largest]
    prefill_rates = Spread.of(step.tokens / step.seconds for step in chunks)
    decode_rates = Spread.of(len(run) / run_seconds(run) for run in runs)
    return Frontier(
        context,
        PassFigures.of([chunks], prefill_rates, sizes),
        PassFigures.of(runs, decode_rates, sizes),
        planned,
    )

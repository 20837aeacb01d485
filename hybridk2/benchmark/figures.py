"""What steps come to: medians and their spread, by phase and layer, against the machine's roofs.

Owns the figures of a benchmark and their forms for programs, JSON and CSV. Pure: it is given steps,
and knows neither the engine that made them nor how they are drawn.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from hybridk2.timeline import Phase, Step

PHASES: tuple[Phase, ...] = get_args(Phase)
# Phases that do nothing but read the dense weights and the cache, and multiply.
DENSE_PHASES: tuple[Phase, ...] = ("attention", "dense MLP", "router", "shared expert", "head")
CSV_COLUMNS = (
    *("kind", "context_tokens", "layer", "phase"),
    *("median_ms", "lower_quartile_ms", "upper_quartile_ms", "samples"),
)


@dataclass(frozen=True)
class Spread:
    """The middle of some samples, and where the middle half of them lies."""

    median: float
    lower_quartile: float
    upper_quartile: float
    samples: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        if len(ordered) == 1:
            return cls(ordered[0], ordered[0], ordered[0], 1)
        lower, median, upper = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(median, lower, upper, len(ordered))

    def as_dict(self) -> dict[str, float]:
        return {
            "median": _rounded(self.median),
            "lower_quartile": _rounded(self.lower_quartile),
            "upper_quartile": _rounded(self.upper_quartile),
            "samples": self.samples,
        }


@dataclass(frozen=True)
class Sizes:
    """What a step reads and multiplies. All in bytes but expert_flop.

    expert_bytes: one routed expert. dense_bytes: all weights of DENSE_PHASES. latent_bytes: one
    token's latents in all layers. expert_flop: one token through one routed expert. all_on_host:
    the host's workers compute all routed experts; where they share them with a card, nobody counts
    who did how much, and there are no rates.
    """

    expert_bytes: int
    dense_bytes: int
    latent_bytes: int
    expert_flop: int
    experts_per_token: int
    all_on_host: bool = True


@dataclass(frozen=True)
class PassFigures:
    """Steps of one kind at one context.

    tokens_per_second: of runs when decoding, of chunks when reading a prompt. phase_ms: of a step,
    summed over its layers. layer_ms: by layer and phase. host_ms, host_layer_ms: the workers' own
    time, by their clock, which runs beside the phases. hidden_share: how much of the workers' time
    passed while the other thread did not wait for it; None without routed experts. expert_bytes_,
    dense_bytes_per_second: weights (and latents) over the time of the workers, and of DENSE_PHASES.
    expert_flop_per_second: of the workers. typical: the step of median length.
    """

    past_tokens: int
    tokens: int
    seconds: float
    tokens_per_second: Spread
    step_ms: Spread
    phase_ms: Mapping[Phase, Spread]
    layer_ms: Mapping[tuple[int, Phase], Spread]
    host_ms: Spread | None
    host_layer_ms: Mapping[int, Spread]
    hidden_share: float | None
    expert_bytes_per_second: Spread | None
    expert_flop_per_second: Spread | None
    dense_bytes_per_second: Spread | None
    typical: Step

    @classmethod
    def of(cls, runs: Sequence[Sequence[Step]], rates: Spread, sizes: Sizes) -> PassFigures:
        """runs: each one's steps, of one kind and of about one size."""
        steps = [step for run in runs for step in run]
        by_length = sorted(steps, key=lambda step: step.seconds)
        with_experts = [step for step in steps if step.host_calls]
        hosts = [_host_seconds(step) for step in with_experts]
        on_host, their_seconds = (with_experts, hosts) if sizes.all_on_host else ([], [])
        # A recorded step is one phase.
        with_phases = [step for step in steps if _phase_seconds(step, DENSE_PHASES) > 0]
        return cls(
            past_tokens=min(step.past_tokens for step in steps),
            tokens=sum(step.tokens for step in steps),
            seconds=sum(run_seconds(run) for run in runs),
            tokens_per_second=rates,
            step_ms=Spread.of(step.seconds * 1e3 for step in steps),
            phase_ms={
                phase: Spread.of(_phase_seconds(step, (phase,)) * 1e3 for step in steps)
                for phase in _phases_of(steps)
            },
            layer_ms=_by_layer(steps),
            host_ms=Spread.of(1e3 * host for host in hosts) if hosts else None,
            host_layer_ms=_host_by_layer(steps),
            hidden_share=_hidden_share(with_experts),
            expert_bytes_per_second=_rates(
                [sizes.expert_bytes * _experts(step) for step in on_host], their_seconds
            ),
            expert_flop_per_second=_rates(
                [
                    sizes.expert_flop * step.tokens * sizes.experts_per_token * len(step.host_calls)
                    for step in on_host
                ],
                their_seconds,
            ),
            dense_bytes_per_second=_rates(
                [
                    sizes.dense_bytes + sizes.latent_bytes * (step.past_tokens + step.tokens)
                    for step in with_phases
                ],
                [_phase_seconds(step, DENSE_PHASES) for step in with_phases],
            ),
            typical=by_length[len(by_length) // 2],
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the layers: the CSV has those."""
        rates = {
            "expert_bytes_per_second": self.expert_bytes_per_second,
            "expert_flop_per_second": self.expert_flop_per_second,
            "dense_bytes_per_second": self.dense_bytes_per_second,
            "host_experts_ms": self.host_ms,
        }
        return {
            "past_tokens": self.past_tokens,
            "tokens": self.tokens,
            "seconds": _rounded(self.seconds),
            "tokens_per_second": self.tokens_per_second.as_dict(),
            "step_ms": self.step_ms.as_dict(),
            "phase_ms": {phase: spread.as_dict() for phase, spread in self.phase_ms.items()},
            **{name: spread and spread.as_dict() for name, spread in rates.items()},
            "host_experts_hidden_share": (
                None if self.hidden_share is None else _rounded(self.hidden_share)
            ),
        }


@dataclass(frozen=True)
class Frontier:
    """What was measured at one context.

    planned_tokens_per_second: of decoding, as `hybridk2 plan` predicts it from this machine's
    profile; None where there is none.
    """

    context_tokens: int
    prefill: PassFigures
    decode: PassFigures
    planned_tokens_per_second: float | None = None


@dataclass(frozen=True)
class Roofs:
    """What this machine reached in the same run, doing nothing else.

    read_bytes_per_second: all threads reading the experts' memory; None where the host has none of
    them. expert_flop_per_second: all threads multiplying with the kernels' instruction; None where
    these kernels have no such loop.
    """

    read_bytes_per_second: float | None
    expert_flop_per_second: float | None


@dataclass(frozen=True)
class Benchmark:
    """All figures of one run, and on what they were taken."""

    version: str
    model: str
    machine: str
    isa: str
    threads: int
    nodes: int
    dtype: str
    weight_bytes: int
    load_seconds: float
    started_at: str  # ISO 8601, with the zone
    roofs: Roofs
    frontiers: tuple[Frontier, ...]

    def as_dict(self) -> dict[str, Any]:
        about = {
            name: getattr(self, name)
            for name in (
                *("version", "model", "machine", "isa", "threads", "nodes", "dtype"),
                *("weight_bytes", "started_at"),
            )
        }
        return {
            "bench": "engine",
            **about,
            "load_seconds": _rounded(self.load_seconds),
            "roofs": {name: value and _rounded(value) for name, value in vars(self.roofs).items()},
            "frontiers": [
                {
                    "context_tokens": frontier.context_tokens,
                    "planned_decode_tokens_per_second": (
                        frontier.planned_tokens_per_second
                        and _rounded(frontier.planned_tokens_per_second)
                    ),
                    "prefill": frontier.prefill.as_dict(),
                    "decode": frontier.decode.as_dict(),
                }
                for frontier in self.frontiers
            ],
        }

    def as_csv(self) -> str:
        """A line per context, kind, layer and phase, milliseconds of a step.

        The phase "step" is the whole of it, "host experts" is the workers' own time, beside the
        others; no layer: summed over all of them.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for frontier in self.frontiers:
            for kind, passed in (("prefill", frontier.prefill), ("decode", frontier.decode)):
                for layer, phase, ms in _lines(passed):
                    spread = (ms.median, ms.lower_quartile, ms.upper_quartile)
                    numbers = (*map(_rounded, spread), ms.samples)
                    writer.writerow((kind, frontier.context_tokens, layer, phase, *numbers))
        return text.getvalue()


def run_seconds(steps: Sequence[Step]) -> float:
    """From the first step's beginning to the last one's end, with what lies between them."""
    return steps[-1].began + steps[-1].seconds - steps[0].began


def _lines(figures: PassFigures) -> Iterator[tuple[int | str, str, Spread]]:
    yield "", "step", figures.step_ms
    for phase, ms in figures.phase_ms.items():
        yield "", phase, ms
    if figures.host_ms is not None:
        yield "", "host experts", figures.host_ms
    for (layer, phase), ms in figures.layer_ms.items():
        yield layer, phase, ms
    for layer, ms in figures.host_layer_ms.items():
        yield layer, "host experts", ms


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _phases_of(steps: Sequence[Step]) -> list[Phase]:
    found = {span.phase for step in steps for span in step.spans}
    return [phase for phase in PHASES if phase in found]


def _phase_seconds(step: Step, phases: Sequence[Phase]) -> float:
    return sum(span.seconds for span in step.spans if span.phase in phases)


def _host_seconds(step: Step) -> float:
    return sum(call.seconds for call in step.host_calls)


def _experts(step: Step) -> int:
    return sum(call.experts for call in step.host_calls)


def _rates(work: Sequence[int], seconds: Sequence[float]) -> Spread | None:
    if not work:
        return None
    return Spread.of(done / took for done, took in zip(work, seconds, strict=True))


def _by_layer(steps: Sequence[Step]) -> dict[tuple[int, Phase], Spread]:
    samples: dict[tuple[int, Phase], list[float]] = {}
    for step in steps:
        for span in step.spans:
            if span.layer is not None:
                samples.setdefault((span.layer, span.phase), []).append(span.seconds * 1e3)
    return {key: Spread.of(values) for key, values in samples.items()}


def _host_by_layer(steps: Sequence[Step]) -> dict[int, Spread]:
    samples: dict[int, list[float]] = {}
    for step in steps:
        for call in step.host_calls:
            samples.setdefault(call.layer, []).append(call.seconds * 1e3)
    return {layer: Spread.of(values) for layer, values in samples.items()}


def _hidden_share(steps: Sequence[Step]) -> float | None:
    """Of the workers' time, what did not pass while the other thread waited for them."""
    total = waited = 0.0
    for step in steps:
        waiting = {span.layer: span for span in step.spans if span.phase == "waiting"}
        for call in step.host_calls:
            span = waiting[call.layer]
            total += call.seconds
            waited += max(min(call.ended, span.ended) - max(call.began, span.began), 0.0)
    return 1 - waited / total if total else None

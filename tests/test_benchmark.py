"""Figures of a benchmark are what the steps come to, and the measuring does the work it says."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybridk2.benchmark.figures import (
    CSV_COLUMNS,
    Benchmark,
    PassFigures,
    Roofs,
    Spread,
    run_seconds,
)
from hybridk2.benchmark.measuring import Progress, Subject, Workload, measure, sizes_of
from hybridk2.config import KIMI_K2_THINKING, EngineConfig
from hybridk2.engine import Engine
from hybridk2.report import tables
from hybridk2.timeline import Span, Step
from tests.measured_steps import (
    DENSE_MS,
    HIDDEN_SHARE,
    HOST_MS,
    SIZES,
    STEP_MS,
    benchmark,
    step,
)

WORKLOAD = Workload(contexts=(128, 256), tokens=3, repeat=2)


def figures(*slower: float) -> PassFigures:
    return PassFigures.of([[step(slower=factor)] for factor in slower], Spread.of([1.0]), SIZES)


def test_a_spread_is_the_median_and_the_middle_half() -> None:
    assert Spread.of([5, 1, 4, 2, 3]) == Spread(3, 2, 4, 5)
    assert Spread.of([7]) == Spread(7, 7, 7, 1)


def test_phases_are_summed_over_the_layers_and_told_apart_by_layer() -> None:
    found = figures(1, 2, 4)
    assert found.step_ms.median == pytest.approx(2 * STEP_MS)
    assert found.phase_ms["attention"].median == pytest.approx(2 * 6)
    assert found.phase_ms["head"].median == pytest.approx(2 * 5)
    assert sum(ms.median for ms in found.phase_ms.values()) == pytest.approx(2 * STEP_MS)
    assert found.layer_ms[0, "dense MLP"].median == pytest.approx(2 * 3)
    assert found.layer_ms[2, "shared expert"].median == pytest.approx(2 * 4)
    assert (0, "router") not in found.layer_ms
    assert {layer for layer, _ in found.layer_ms} == {0, 1, 2}


def test_the_workers_have_their_own_time_and_what_of_it_is_hidden() -> None:
    found = figures(1, 1, 1)
    assert found.host_ms is not None
    assert found.host_ms.median == pytest.approx(HOST_MS)
    assert found.host_layer_ms[1].median == pytest.approx(HOST_MS / 2)
    assert found.hidden_share == pytest.approx(HIDDEN_SHARE)


def test_rates_are_bytes_and_operations_over_the_time_of_those_who_did_them() -> None:
    found = figures(1, 1, 1)
    assert found.expert_bytes_per_second is not None
    assert found.expert_flop_per_second is not None
    assert found.expert_bytes_per_second.median == pytest.approx(
        4 * SIZES.expert_bytes / (HOST_MS / 1e3)
    )
    assert found.expert_flop_per_second.median == pytest.approx(2e9)
    read = SIZES.dense_bytes + 100 * SIZES.latent_bytes
    assert found.dense_bytes_per_second.median == pytest.approx(read / (DENSE_MS / 1e3))


def test_the_typical_step_is_the_one_of_median_length() -> None:
    assert figures(4, 1, 2).typical.seconds == pytest.approx(2 * STEP_MS / 1e3)


def test_a_run_lasts_from_its_first_step_to_its_last_with_what_lies_between() -> None:
    assert run_seconds([step(began=1.0), step(began=2.0)]) == pytest.approx(1 + STEP_MS / 1e3)


def test_a_model_without_routed_experts_has_no_figures_of_them() -> None:
    dense = step()
    dense.spans = [span for span in dense.spans if span.layer in (None, 0)]
    dense.host_calls = []
    found = PassFigures.of([[dense]], Spread.of([1.0]), SIZES)
    assert found.hidden_share is None
    assert found.host_ms is None
    assert found.as_dict()["expert_bytes_per_second"] is None


def test_json_is_plain_and_names_kinds_contexts_and_roofs() -> None:
    document = json.loads(json.dumps(benchmark().as_dict(), allow_nan=False))
    assert [frontier["context_tokens"] for frontier in document["frontiers"]] == [128, 2048]
    assert document["roofs"] == {"read_bytes_per_second": 2e9, "expert_flop_per_second": None}
    decode = document["frontiers"][0]["decode"]
    assert decode["tokens_per_second"]["median"] == 28.4
    assert decode["phase_ms"]["waiting"]["median"] == pytest.approx(3 * 1.1)
    assert decode["host_experts_hidden_share"] == HIDDEN_SHARE


def test_csv_has_every_layer_and_its_phases_add_up_to_the_step() -> None:
    rows = list(csv.DictReader(io.StringIO(benchmark().as_csv())))
    assert tuple(rows[0]) == CSV_COLUMNS
    decode = [row for row in rows if (row["kind"], row["context_tokens"]) == ("decode", "128")]
    whole = {row["phase"]: float(row["median_ms"]) for row in decode if not row["layer"]}
    # Five digits are written of each.
    assert whole["host experts"] == pytest.approx(1.1 * HOST_MS, rel=1e-4)
    assert whole["step"] == pytest.approx(1.1 * STEP_MS, rel=1e-4)
    parts = sum(ms for phase, ms in whole.items() if phase not in ("step", "host experts"))
    assert parts == pytest.approx(whole["step"], rel=1e-4)
    attention = [row for row in decode if row["layer"] and row["phase"] == "attention"]
    assert [row["layer"] for row in attention] == ["0", "1", "2"]
    assert {row["samples"] for row in attention} == {"3"}


def test_where_a_card_shares_the_experts_nobody_says_how_fast_the_host_is() -> None:
    shared = replace(SIZES, all_on_host=False)
    found = PassFigures.of([[step()]], Spread.of([1.0]), shared)
    assert found.expert_bytes_per_second is None
    assert found.expert_flop_per_second is None
    assert found.host_ms is not None
    assert found.dense_bytes_per_second is not None


def test_a_machine_without_experts_in_its_memory_has_no_read_roof() -> None:
    nothing = replace(benchmark(), roofs=Roofs(None, 3e12))
    assert tables.roofs(nothing) == "all threads multiplied 3 TFLOP/s"
    rows = {name: cells for name, *cells in tables.rates(nothing)[1]}
    assert not any("%" in cell for cell in rows["experts GB/s"])
    neither = replace(nothing, roofs=Roofs(None, None))
    assert tables.roofs(neither) == "nothing could be measured"


def test_k2_thinking_reads_what_its_dimensions_say() -> None:
    sizes = sizes_of(KIMI_K2_THINKING, torch.bfloat16)
    assert sizes.expert_bytes == 24_772_608
    assert sizes.latent_bytes == 70_272
    assert sizes.expert_flop == 88_080_384
    # 11.72 G parameters that are not of routed experts, but for the embedding; routers in fp32.
    parameters, embedding, routers = 11.72e9, 163_840 * 7168, 60 * 384 * 7168
    assert sizes.dense_bytes == pytest.approx(2 * (parameters - embedding + routers), rel=1e-3)


@pytest.fixture(scope="module")
def engine(small_checkpoint: Path) -> Iterator[Engine]:
    engine = Engine.load(
        EngineConfig(model=str(small_checkpoint), threads=2, context_tokens=WORKLOAD.context_tokens)
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def measured(engine: Engine) -> tuple[Benchmark, list[Progress]]:
    measuring = measure(engine, WORKLOAD, Subject("small", "bfloat16", 1.0))
    moments = []
    while True:
        try:
            moments.append(next(measuring))
        except StopIteration as end:
            return end.value, moments


def test_every_context_has_its_prompt_and_its_runs(
    measured: tuple[Benchmark, list[Progress]],
) -> None:
    found = measured[0].frontiers
    assert [frontier.context_tokens for frontier in found] == [128, 256]
    assert [(f.prefill.past_tokens, f.prefill.tokens) for f in found] == [(0, 128), (128, 128)]
    for frontier in found:
        assert frontier.decode.past_tokens == frontier.context_tokens
        assert frontier.decode.tokens == WORKLOAD.tokens * WORKLOAD.repeat
        assert frontier.decode.tokens_per_second.samples == WORKLOAD.repeat
        assert frontier.decode.step_ms.samples == WORKLOAD.tokens * WORKLOAD.repeat


def test_a_prompt_is_read_once(engine: Engine, measured: tuple[Benchmark, list[Progress]]) -> None:
    stats = engine.stats()
    computed = stats.prompt_tokens_total - stats.cached_tokens_total
    warm_up = prompts = WORKLOAD.contexts[-1]
    last_tokens = len(WORKLOAD.contexts) * WORKLOAD.repeat
    assert computed == warm_up + prompts + last_tokens


def test_roofs_are_measured_in_the_same_run(measured: tuple[Benchmark, list[Progress]]) -> None:
    roofs = measured[0].roofs
    assert roofs.read_bytes_per_second > 1e8
    assert roofs.expert_flop_per_second is None or roofs.expert_flop_per_second > 1e8


def test_progress_names_what_goes_on_and_reaches_the_end_of_each(
    measured: tuple[Benchmark, list[Progress]],
) -> None:
    ends = [moment.stage for moment in measured[1] if moment.done == moment.total]
    assert ends == [
        "warming up",
        *(
            f"context {context}: {what}"
            for context in WORKLOAD.contexts
            for what in (
                "reading the prompt",
                "the machine's roofs",
                "decoding, run 1 of 2",
                "decoding, run 2 of 2",
            )
        ),
    ]


def test_a_measuring_that_is_closed_leaves_an_engine_that_nobody_times(engine: Engine) -> None:
    measuring = measure(engine, WORKLOAD, Subject("small", "bfloat16", 1.0))
    for _ in range(8):
        next(measuring)
    measuring.close()
    assert engine._model.timeline is None
    assert engine.stats().running == 0


def test_steps_that_a_device_replays_have_a_speed_and_no_phases() -> None:
    step = Step("decode", 1, 99, 0.0, [Span("embedding", None, 0.0, 0.001)])
    step.spans.append(Span("recorded step", None, 0.001, 0.02))
    figures = PassFigures.of([[step]], Spread.of([50.0]), SIZES)
    assert figures.dense_bytes_per_second is None
    assert figures.expert_bytes_per_second is None
    assert figures.phase_ms["recorded step"].median == pytest.approx(19.0)
    json.dumps(figures.as_dict())

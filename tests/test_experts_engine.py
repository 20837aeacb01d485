"""The engine around the kernels: same bits whatever runs beside, clear refusals, safe ends."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hybridk2.checkpoint import QuantizedLinear
from hybridk2.errors import ConfigError, EngineError, OutOfMemoryError
from hybridk2.experts.host import HostExperts, available_isas

from .expert_weights import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    RandomLayer,
    assert_within,
    compute,
    loaded,
    random_activations,
    random_routing,
    runnable_isas,
)


@pytest.fixture(scope="module")
def layer() -> RandomLayer:
    return RandomLayer(EXPERTS, HIDDEN, INTERMEDIATE)


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_token_does_not_depend_on_the_others_of_its_call(
    layer: RandomLayer, isa: str, dtype: torch.dtype
) -> None:
    # 600 tokens: several tiles and blocks, outputs added in place; the parts go through partials.
    x = random_activations(600, HIDDEN, dtype)
    ids, weights = random_routing(600, EXPERTS, TOP_K)
    with loaded(layer, isa=isa, threads=2) as experts:
        together = compute(experts, x, ids, weights)
        for width in (1, 2, 3, 5, 7, 8, 9, 12, 13, 100, 300):
            for begin in range(0, 600, 150):
                rows = slice(begin, begin + width)
                alone = compute(
                    experts,
                    x[rows].contiguous(),
                    ids[rows].contiguous(),
                    weights[rows].contiguous(),
                )
                assert torch.equal(alone, together[rows]), f"tokens {begin} to {begin + width}"


def test_bits_do_not_depend_on_the_number_of_threads(layer: RandomLayer) -> None:
    calls = [
        (random_activations(n, HIDDEN, torch.bfloat16, seed=n), *random_routing(n, EXPERTS, TOP_K))
        for n in (1, 4, 40, 300)
    ]
    results = []
    for threads in (1, 2, 3, 5):
        with loaded(layer, threads=threads) as experts:
            assert experts.threads == threads
            results.append([compute(experts, *call) for call in calls])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def test_a_call_too_large_for_one_pass_is_cut_without_a_trace() -> None:
    # 8 experts of 32 columns each in fp32: passes hold 131,072 tokens.
    layer = RandomLayer(8, 32, 32)
    tokens = 140_000
    x = random_activations(tokens, 32, torch.float32)
    ids, weights = random_routing(tokens, 8, 4)
    with HostExperts(1, 8, 32, 32, threads=2) as experts:
        layer.load_into(experts)
        together = compute(experts, x, ids, weights)
        for rows in (slice(131_060, 131_090), slice(139_990, 140_000)):
            parts = (t[rows].contiguous() for t in (x, ids, weights))
            assert torch.equal(compute(experts, *parts), together[rows])


def test_experts_computed_elsewhere_are_skipped(layer: RandomLayer) -> None:
    x = random_activations(20, HIDDEN, torch.float32)
    ids, weights = random_routing(20, EXPERTS, TOP_K)
    ids[::2, 0] = -1
    ids[4] = -1
    with loaded(layer, threads=2) as experts:
        result = compute(experts, x, ids, weights)
        assert torch.equal(result[4], torch.zeros(HIDDEN))
        assert_within(result, layer.reference(x, ids, weights))
        ids.fill_(-1)
        assert torch.equal(compute(experts, x, ids, weights), torch.zeros(20, HIDDEN))
        none = torch.empty(20, 0)
        assert torch.equal(compute(experts, x, none.int(), none), torch.zeros(20, HIDDEN))


def test_an_expert_may_stand_twice_in_a_row(layer: RandomLayer) -> None:
    for tokens in (1, 30, 300):
        x = random_activations(tokens, HIDDEN, torch.float32)
        ids = torch.full((tokens, 3), 2, dtype=torch.int32)
        weights = torch.tensor([[0.5, 0.25, 1.0]]).repeat(tokens, 1)
        with loaded(layer, threads=2) as experts:
            result = compute(experts, x, ids, weights)
            assert_within(result, layer.reference(x, ids, weights))


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_spoils_only_itself(
    layer: RandomLayer, isa: str, dtype: torch.dtype, poison: float
) -> None:
    with loaded(layer, isa=isa, threads=2) as experts:
        for tokens in (3, 30, 300):
            x = random_activations(tokens, HIDDEN, dtype)
            ids, weights = random_routing(tokens, EXPERTS, TOP_K)
            clean = compute(experts, x, ids, weights)
            x[1, 5] = poison
            spoilt = compute(experts, x, ids, weights)
            assert not spoilt[1].isfinite().any()
            others = [t for t in range(tokens) if t != 1]
            assert torch.equal(spoilt[others], clean[others])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_routing_weight_that_is_not_finite_spoils_only_its_token(
    layer: RandomLayer, poison: float
) -> None:
    with loaded(layer, threads=2) as experts:
        for tokens in (3, 300):
            x = random_activations(tokens, HIDDEN, torch.bfloat16)
            ids, weights = random_routing(tokens, EXPERTS, TOP_K)
            clean = compute(experts, x, ids, weights)
            weights[1, 0] = poison
            spoilt = compute(experts, x, ids, weights)
            assert not spoilt[1].isfinite().any()
            others = [t for t in range(tokens) if t != 1]
            assert torch.equal(spoilt[others], clean[others])


def test_no_tokens_have_no_rows(layer: RandomLayer) -> None:
    with loaded(layer, threads=2) as experts:
        none = torch.empty(0, TOP_K)
        assert compute(experts, torch.empty(0, HIDDEN), none.int(), none).shape == (0, HIDDEN)


def refused(experts: HostExperts, message: str, **changes: torch.Tensor | int) -> None:
    call = {
        "slot": 0,
        "x": torch.zeros(4, HIDDEN),
        "expert_ids": torch.zeros(4, TOP_K, dtype=torch.int32),
        "weights": torch.ones(4, TOP_K),
    }
    with pytest.raises(EngineError, match=message):
        experts.submit(**{**call, **changes})  # type: ignore[arg-type]


def test_a_wrong_call_is_refused_before_work_starts(layer: RandomLayer) -> None:
    with loaded(layer, threads=1) as experts:
        refused(experts, "x: expected bfloat16 or float32", x=torch.zeros(4, HIDDEN).half())
        refused(experts, r"x: expected .*\(any, 224\).*found .*\(4, 225\)", x=torch.zeros(4, 225))
        refused(experts, "not contiguous", x=torch.zeros(HIDDEN, 4).T)
        refused(experts, "expert_ids: expected torch.int32", expert_ids=torch.zeros(4, 2).long())
        refused(experts, "expert_ids: ", expert_ids=torch.zeros(3, 2).int())
        refused(experts, "weights: ", weights=torch.ones(4, 3))
        refused(experts, "weights: ", weights=torch.ones(4, 2).double())
        refused(experts, "layer slot 1: expected 0 to 0", slot=1)
        ids = torch.zeros(4, TOP_K, dtype=torch.int32)
        ids[2, 1] = EXPERTS
        refused(experts, "token 2: expert id 6, expected -1 to 5", expert_ids=ids)
        ids[2, 1] = -2
        refused(experts, "token 2: expert id -2", expert_ids=ids)


def test_an_expert_that_is_not_loaded_is_named(layer: RandomLayer) -> None:
    with HostExperts(2, EXPERTS, HIDDEN, INTERMEDIATE, threads=1) as experts:
        experts.load_expert(1, 0, *layer.experts[0])
        ids = torch.tensor([[0, 3]] * 4, dtype=torch.int32)
        refused(experts, "layer slot 1, expert 3 is not loaded", slot=1, expert_ids=ids)
        refused(experts, "layer slot 0, expert 0 is not loaded", slot=0, expert_ids=ids)
        with pytest.raises(EngineError, match="layer slot 0, expert 2 is not loaded"):
            experts.expert_weights(0, 2)


def test_loading_refuses_wrong_matrices_wrong_places_and_a_second_time(layer: RandomLayer) -> None:
    gate, up, down = layer.experts[0]
    with HostExperts(1, 2, HIDDEN, INTERMEDIATE, threads=1) as experts:
        with pytest.raises(EngineError, match=r"expert 1: gate\.packed: expected torch.int32"):
            experts.load_expert(0, 1, down, up, down)
        wrong = QuantizedLinear(up.packed, up.scale.float())
        with pytest.raises(EngineError, match=r"up\.scale: expected torch.bfloat16"):
            experts.load_expert(0, 1, gate, wrong, down)
        for slot, expert in ((0, 2), (0, -1), (1, 0), (-1, 0)):
            with pytest.raises(EngineError, match="expected 0 to"):
                experts.load_expert(slot, expert, gate, up, down)
        experts.load_expert(0, 1, gate, up, down)
        with pytest.raises(EngineError, match="expert 1 was loaded before"):
            experts.load_expert(0, 1, gate, up, down)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 1, 64, 32), "num_layers: expected 1 to"),
        ((1, 0, 64, 32), "num_experts"),
        ((1, 1, 48, 32), "hidden: expected a multiple of 32, found 48"),
        ((1, 1, 64, 40), "intermediate: expected a multiple of 32, found 40"),
    ],
)
def test_a_shape_that_cannot_be_run_is_refused(
    shape: tuple[int, int, int, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        HostExperts(*shape, threads=1)


def test_weights_that_no_memory_holds_are_refused_with_their_size() -> None:
    with pytest.raises(OutOfMemoryError, match=r"experts' weights: 1238630400000000 bytes"):
        HostExperts(10_000, 5_000, 7168, 2048, threads=1)


def test_work_that_runs_out_of_memory_fails_at_wait_and_the_engine_lives_on() -> None:
    program = """
import resource, torch
from hybridk2.experts.host import HostExperts
from hybridk2.errors import OutOfMemoryError
from tests.expert_weights import RandomLayer, random_routing
layer = RandomLayer(4, 256, 256)
experts = HostExperts(1, 4, 256, 256, threads=2)
layer.load_into(experts)
call = (torch.ones(20_000, 256), *random_routing(20_000, 4, 4))
small = tuple(tensor[:3].contiguous() for tensor in call)
before = experts.wait(experts.submit(0, *small))
status = dict(line.split(":") for line in open("/proc/self/status"))
limit = int(status["VmSize"].split()[0]) * 1024 + 100_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
ticket = experts.submit(0, *call)
try:
    experts.wait(ticket)
except OutOfMemoryError as error:
    print(error)
assert torch.equal(experts.wait(experts.submit(0, *small)), before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "no memory for gathered activations: " in run.stdout


def test_threads_that_the_system_refuses_are_a_mistake_that_is_explained() -> None:
    program = """
import resource
from hybridk2.errors import ConfigError
from hybridk2.experts.host import HostExperts
status = dict(line.split(":") for line in open("/proc/self/status"))
limit = int(status["VmSize"].split()[0]) * 1024 + 100_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    HostExperts(1, 1, 64, 32, threads=200)
except ConfigError as error:
    print(error)
HostExperts(1, 1, 64, 32, threads=2).close()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "the system refused to start the threads: " in run.stdout
    assert "ask for fewer" in run.stdout


def test_many_threads_submit_and_load_at_once(layer: RandomLayer) -> None:
    calls = [
        (random_activations(n, HIDDEN, torch.bfloat16, seed=n), *random_routing(n, EXPERTS, TOP_K))
        for n in (1, 3, 17, 200)
    ]
    with HostExperts(2, EXPERTS, HIDDEN, INTERMEDIATE, threads=2) as experts:
        layer.load_into(experts)
        expected = [compute(experts, *call) for call in calls]
        failures: list[str] = []

        def submit_often(number: int) -> None:
            for _ in range(20):
                tickets = [experts.submit(0, *call) for call in calls]
                for ticket, result in reversed(list(zip(tickets, expected, strict=True))):
                    if not torch.equal(experts.wait(ticket), result):
                        failures.append(f"thread {number}")

        def load_second_layer() -> None:
            layer.load_into(experts, slot=1)

        threads = [threading.Thread(target=submit_often, args=(n,)) for n in range(4)]
        threads.append(threading.Thread(target=load_second_layer))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        second = experts.wait(experts.submit(1, *calls[2]))
        assert torch.equal(second, expected[2])


def test_tickets_outlive_the_engine_and_may_be_waited_for_twice(layer: RandomLayer) -> None:
    experts = loaded(layer, threads=2)
    x = random_activations(100, HIDDEN, torch.bfloat16)
    ids, weights = random_routing(100, EXPERTS, TOP_K)
    expected = compute(experts, x, ids, weights)
    tickets = [experts.submit(0, x, ids, weights) for _ in range(10)]
    experts.close()
    for ticket in tickets:
        assert torch.equal(experts.wait(ticket), expected)
        assert torch.equal(experts.wait(ticket), expected)
    with pytest.raises(EngineError, match="closed"):
        experts.submit(0, x, ids, weights)


def test_a_ticket_knows_when_its_work_ran_once_it_has(layer: RandomLayer) -> None:
    x = random_activations(256, HIDDEN, torch.bfloat16)
    ids, weights = random_routing(256, EXPERTS, TOP_K)
    with loaded(layer, threads=2) as experts:
        before = time.perf_counter()
        tickets = [experts.submit(0, x, ids, weights) for _ in range(20)]
        with pytest.raises(EngineError, match="no end yet"):
            tickets[-1].times()
        for ticket in tickets:
            experts.wait(ticket)
        after = time.perf_counter()
    times = [moment for ticket in tickets for moment in ticket.times()]
    assert [before, *times, after] == sorted([before, *times, after])  # one after the other


def test_a_ticket_may_be_dropped_with_its_tensors(layer: RandomLayer) -> None:
    with loaded(layer, threads=2) as experts:
        for seed in range(50):
            experts.submit(
                0,
                random_activations(64, HIDDEN, torch.bfloat16, seed),
                *random_routing(64, EXPERTS, TOP_K, seed),
            )
        x = random_activations(2, HIDDEN, torch.float32)
        ids, weights = random_routing(2, EXPERTS, TOP_K)
        result = compute(experts, x, ids, weights)
        assert_within(result, layer.reference(x, ids, weights))


def test_a_forked_child_is_refused_and_ends_and_the_parent_lives_on(layer: RandomLayer) -> None:
    with HostExperts(2, EXPERTS, HIDDEN, INTERMEDIATE, threads=2) as experts:
        layer.load_into(experts)
        x = random_activations(3, HIDDEN, torch.float32)
        ids, weights = random_routing(3, EXPERTS, TOP_K)
        before = compute(experts, x, ids, weights)
        need_threads: list[Callable[[], object]] = [
            lambda: experts.submit(0, x, ids, weights),
            lambda: experts.load_expert(1, 0, *layer.experts[0]),
            lambda: experts.read_weights_seconds(0),
            lambda: experts.arithmetic_roof(torch.bfloat16),
        ]
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends a child that hangs
            for call in need_threads:
                try:
                    call()
                    os._exit(2)
                except EngineError as error:
                    if "after fork" not in str(error):
                        os._exit(1)
            experts.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(compute(experts, x, ids, weights), before)
        layer.load_into(experts, slot=1)


def threads_of_this_process() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def sleeps_and_wakes(thread: int) -> tuple[bool, int]:
    """Whether a thread of this process sleeps, and how often it has gone to sleep so far."""
    lines = Path(f"/proc/self/task/{thread}/status").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines)
    return facts["State"].split()[0] == "S", int(facts["voluntary_ctxt_switches"])


def test_the_threads_of_an_idle_engine_sleep_and_do_not_wake(layer: RandomLayer) -> None:
    x = random_activations(300, HIDDEN, torch.float32)
    routing = random_routing(300, EXPERTS, TOP_K)
    before = threads_of_this_process()
    with loaded(layer, threads=2) as experts:
        threads = sorted(threads_of_this_process() - before)
        assert len(threads) >= experts.threads
        compute(experts, x, *routing)
        # They spin for less than a millisecond, but a busy machine may not let them: so the end of
        # this wait is for engines that never sleep through a fifth of a second.
        deadline = time.monotonic() + 60
        while True:
            asleep = [sleeps_and_wakes(thread) for thread in threads]
            time.sleep(0.2)
            if all(sleeps for sleeps, _ in asleep) and asleep == [
                sleeps_and_wakes(thread) for thread in threads
            ]:
                break
            assert time.monotonic() < deadline, f"threads {threads} slept and woke: {asleep}"


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16"])
def test_the_arithmetic_roof_is_a_speed_of_registers(layer: RandomLayer, isa: str) -> None:
    if isa not in available_isas():
        pytest.skip(f"this machine cannot run {isa}")
    with loaded(layer, isa=isa, threads=2) as experts:
        for dtype in (torch.bfloat16, torch.float32):
            rate = experts.arithmetic_roof(dtype)
            # Faster than 100 TFLOP/s would be a loop that the compiler took away.
            assert rate is not None
            assert 1e8 < rate < 1e14


def test_the_choices_are_logged_at_start(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "hybridk2.experts.host"),
        HostExperts(1, 1, 64, 32, isa="scalar", threads=3, huge_pages=False) as experts,
    ):
        assert experts.threads == 3
    assert "scalar kernels, 3 threads, 0.0 GB of weights in 4 KB pages" in caplog.text
    caplog.clear()
    with (
        caplog.at_level(logging.INFO, "hybridk2.experts.host"),
        HostExperts(1, 1, 64, 32, isa="scalar", threads=5, simulated_nodes=3),
    ):
        assert "5 threads on 3 NUMA nodes (2 + 2 + 1)" in caplog.text

"""Crossings to the host's experts: what arrives is bit for bit what waiting in place gives."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybridk2 import _native
from hybridk2.checkpoint import Checkpoint
from hybridk2.device import CpuDevice
from hybridk2.errors import ConfigError, EngineError
from hybridk2.experts.handoff import (
    HostFunctionRouter,
    MailboxRouter,
    StreamRouter,
    fastest_router,
    measure_handoff,
)
from hybridk2.experts.host import CardPinning, HostExperts, card_stream
from hybridk2.experts.loading import load_experts
from hybridk2.experts.router import (
    HOST_SHARE,
    AsyncRouter,
    InlineRouter,
    PendingExperts,
    ThreadRouter,
)
from hybridk2.kv_cache import PAGE_TOKENS, PagedLatentCache
from hybridk2.model.loading import load_model
from hybridk2.model.moe import RoutedExperts

from .expert_weights import RandomLayer, random_activations, random_routing
from .faked_device import STREAM_ROUTERS, FakedDevice, WaitingRouter, opened

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 4, 6, 224, 96, 3
Submission = tuple[int, Tensor, Tensor, Tensor]

every_stream_router = pytest.mark.parametrize("kind", STREAM_ROUTERS, ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def experts() -> Iterator[HostExperts]:
    with HostExperts(LAYERS, EXPERTS + 1, HIDDEN, INTERMEDIATE, threads=2) as host:
        for slot in range(LAYERS):  # the last expert of each layer stays empty
            RandomLayer(EXPERTS, HIDDEN, INTERMEDIATE, seed=slot).load_into(host, slot)
        yield host


def submissions(seed: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[Submission]:
    """One for each layer; some experts are computed elsewhere."""
    step = []
    for slot in range(LAYERS):
        ids, weights = random_routing(tokens, EXPERTS, TOP_K, seed=100 * seed + slot)
        ids[slot % tokens, 0] = HOST_SHARE
        x = random_activations(tokens, HIDDEN, dtype, seed=100 * seed + slot)
        step.append((slot, x, ids, weights))
    return step


def inline(experts: HostExperts, step: list[Submission]) -> list[Tensor]:
    router = InlineRouter(experts, CpuDevice())
    return [router.collect(router.submit(*submission)) for submission in step]


def enqueue(router: AsyncRouter, step: list[Submission]) -> list[tuple[PendingExperts, Tensor]]:
    """Kept by the caller until the stream has done it: its memory is of nobody else."""
    done = []
    for submission in step:
        pending = router.submit(*submission)
        done.append((pending, router.collect(pending)))
    return done


def run(router: AsyncRouter, device: CpuDevice, step: list[Submission]) -> list[Tensor]:
    router.begin_step()
    done = enqueue(router, step)
    device.wait()
    router.end_step()
    return [result for _, result in done]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for slot, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"layer slot {slot}"


def test_a_thread_gives_what_waiting_in_place_gives(experts: HostExperts) -> None:
    step = submissions(1, 20)
    router = ThreadRouter(experts, CpuDevice())
    router.begin_step()
    pending = [router.submit(*submission) for submission in step]
    assert_same([router.collect(one) for one in pending], inline(experts, step))
    router.end_step()
    for one in pending:
        times = one.times()
        assert times is not None
        assert times[0] <= times[1]


@every_stream_router
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_stream_gives_what_waiting_in_place_gives(
    experts: HostExperts, kind: type[StreamRouter], dtype: torch.dtype
) -> None:
    device = FakedDevice()
    with opened(kind, experts, device, submissions=LAYERS, top_k=TOP_K, dtype=dtype) as router:
        for number in range(24):
            step = submissions(number, 1 + number % 8, dtype)
            assert_same(run(router, device, step), inline(experts, step))


@every_stream_router
def test_a_recorded_step_reads_its_tensors_anew(
    experts: HostExperts, kind: type[StreamRouter]
) -> None:
    device = FakedDevice()
    with opened(kind, experts, device, submissions=LAYERS, top_k=TOP_K) as router:
        run(router, device, submissions(0, 2))
        static = submissions(1, 2)
        done: list[tuple[PendingExperts, Tensor]] = []
        replay = device.record(lambda: done.extend(enqueue(router, static)))
        for number in range(2, 12):
            step = submissions(number, 2)
            for (_, *targets), (_, *sources) in zip(static, step, strict=True):
                for target, source in zip(targets, sources, strict=True):
                    target.copy_(source)
            router.begin_step()
            replay()
            device.wait()
            router.end_step()
            assert_same([result for _, result in done], inline(experts, step))


@every_stream_router
def test_a_part_of_a_layer_may_be_collected_in_the_next(
    experts: HostExperts, kind: type[StreamRouter]
) -> None:
    device = FakedDevice()
    step, deferred = submissions(1, 3), submissions(2, 3)
    with opened(kind, experts, device, submissions=2 * LAYERS - 1, top_k=TOP_K) as router:
        for _ in range(5):
            router.begin_step()
            found: list[Tensor] = []
            found_later: list[Tensor] = []
            later = None
            for now, then in zip(step, deferred, strict=True):
                pending = router.submit(*now)
                if later is not None:
                    found_later.append(router.collect(later))
                later = router.submit(*then) if len(found) < LAYERS - 1 else None
                found.append(router.collect(pending))
            device.wait()
            router.end_step()
            assert_same(found, inline(experts, step))
            assert_same(found_later, inline(experts, deferred[:-1]))


@every_stream_router
def test_a_failure_of_an_expert_is_raised_at_the_end_of_the_step(
    experts: HostExperts, kind: type[StreamRouter]
) -> None:
    device = FakedDevice()
    sound = submissions(1, 2)
    broken = submissions(2, 2)
    broken[2][2][1, 1] = EXPERTS  # not loaded
    with opened(kind, experts, device, submissions=LAYERS, top_k=TOP_K) as router:
        for _ in range(3):
            with pytest.raises(EngineError, match=r"layer slot 2.*expert 6 is not loaded"):
                run(router, device, broken)
            with pytest.raises(EngineError, match="reset before the next"):
                router.begin_step()
            router.reset()
            assert_same(run(router, device, sound), inline(experts, sound))


@every_stream_router
def test_workers_that_do_not_come_are_an_error_within_the_timeout(
    experts: HostExperts, kind: type[StreamRouter]
) -> None:
    device = FakedDevice()
    # A prompt that keeps the workers busy for longer than a layer of the step may take.
    many = 30_000
    prompt = ThreadRouter(experts, CpuDevice())
    step = submissions(1, 1)
    inputs = (
        random_activations(many, HIDDEN, torch.float32),
        *random_routing(many, EXPERTS, TOP_K),
    )
    with opened(
        kind, experts, device, submissions=LAYERS, top_k=TOP_K, timeout_seconds=0.02
    ) as router:
        pending = prompt.submit(0, *inputs)
        started = time.perf_counter()
        with pytest.raises(EngineError, match=r"layer slot 0: .* did not answer within 0.02 s"):
            run(router, device, step)
        seconds = time.perf_counter() - started
        prompt.collect(pending)
        busy = time.perf_counter() - started
        router.reset()
        assert_same(run(router, device, step), inline(experts, step))
    assert seconds < busy, f"the error took {seconds} s of the {busy} s that the workers were busy"


@every_stream_router
def test_a_step_that_python_leaves_half_way_can_be_reset(
    experts: HostExperts, kind: type[StreamRouter]
) -> None:
    device = FakedDevice()
    step = submissions(1, 2)
    with opened(kind, experts, device, submissions=LAYERS, top_k=TOP_K) as router:
        for submitted in range(4):
            router.begin_step()
            kept = [router.submit(*submission) for submission in step[:submitted]]
            router.reset()
            assert len(kept) == submitted
            assert_same(run(router, device, step), inline(experts, step))


@every_stream_router
def test_a_reset_ends_the_servers_waiting_and_frees_the_workers(
    experts: HostExperts, kind: type[StreamRouter]
) -> None:
    device = FakedDevice()
    with opened(kind, experts, device, submissions=LAYERS, top_k=TOP_K) as router:
        router.begin_step()
        router.reset()
        step = submissions(3, 12)  # by the workers' thread, which the step held
        assert len(inline(experts, step)) == LAYERS


@every_stream_router
def test_what_cannot_cross_is_refused_where_it_is_submitted(
    experts: HostExperts, kind: type[StreamRouter]
) -> None:
    device = FakedDevice()
    (slot, x, ids, weights), *_ = submissions(1, 2)
    with opened(kind, experts, device, submissions=LAYERS, top_k=TOP_K) as router:
        with pytest.raises(EngineError, match="no step is open"):
            router.submit(slot, x, ids, weights)
        router.begin_step()
        with pytest.raises(EngineError, match=r"x: expected torch.bfloat16 \(2, 224\)"):
            router.submit(slot, x.float(), ids, weights)
        with pytest.raises(EngineError, match="expert_ids: expected"):
            router.submit(slot, x, ids.long(), weights)
        with pytest.raises(EngineError, match=r"weights: expected .* found torch.float32 \(2, 2\)"):
            router.submit(slot, x, ids, weights[:, :2])
        with pytest.raises(EngineError, match="9 tokens at once: expected at most 8"):
            router.submit(0, *(t.repeat(9, 1) for t in (x[:1], ids[:1], weights[:1])))
        with pytest.raises(EngineError, match="layer slot 4: expected 0 to 3"):
            router.submit(LAYERS, x, ids, weights)
        first = router.submit(0, x, ids, weights)
        second = router.submit(1, x, ids, weights)
        with pytest.raises(EngineError, match=r"collected before .* layer slot 0"):
            router.collect(second)
        result = router.collect(first)
        kept = [router.submit(2, x, ids, weights) for _ in range(_native.HANDOFF_SLOTS - 1)]
        with pytest.raises(EngineError, match="submitted while 4 wait to be collected"):
            router.submit(2, x, ids, weights)
        router.reset()
        assert (len(kept), result.shape) == (3, x.shape)
        router.close()
        with pytest.raises(EngineError, match="closed"):
            router.begin_step()


@every_stream_router
def test_a_handoff_that_cannot_be_is_refused(
    experts: HostExperts, kind: type[StreamRouter]
) -> None:
    device = FakedDevice()
    with (
        pytest.raises(EngineError, match="expected bfloat16 or float32"),
        opened(kind, experts, device, submissions=1, top_k=1, dtype=torch.float16),
    ):
        pass
    with (
        pytest.raises(EngineError, match="a timeout must be positive"),
        opened(kind, experts, device, submissions=1, top_k=1, timeout_seconds=0),
    ):
        pass


@every_stream_router
def test_the_events_tell_that_both_sides_worked_at_once(
    experts: HostExperts, kind: type[StreamRouter]
) -> None:
    """For every layer: published, then the experts and the shared expert side by side, then
    collected; and no slot is published anew before it was read."""
    # Without delays: experts this small would be done before the shared expert begins.
    device = FakedDevice(delay=0.0)
    stream = device.fake_stream
    steps = 20
    step = submissions(1, 8)
    with opened(kind, experts, device, submissions=LAYERS, top_k=TOP_K) as router:
        stream.record_events(True)
        for _ in range(steps):
            router.begin_step()
            kept = []
            for submission in step:
                pending = router.submit(*submission)
                stream.work("shared expert", submission[0], 5e-4)  # longer than an expert
                kept.append((pending, router.collect(pending)))
            device.wait()
            router.end_step()
    events = stream.take_events()
    assert [seconds for *_, seconds in events] == sorted(seconds for *_, seconds in events)
    at: dict[str, list[float]] = {}
    for name, _, seconds in events:
        at.setdefault(name, []).append(seconds)
    assert {len(times) for times in at.values()} == {steps * LAYERS}
    overlapped = 0
    for number in range(steps * LAYERS):
        times = {name: seconds[number] for name, seconds in at.items()}
        assert times["publish"] <= times["experts begin"] <= times["experts end"]
        assert times["experts end"] <= times["await ends"]
        assert times["publish"] <= times["shared expert begins"] <= times["shared expert ends"]
        assert times["shared expert ends"] <= times["await begins"]
        overlapped += times["experts begin"] < times["shared expert ends"] and (
            times["shared expert begins"] < times["experts end"]
        )
        reused = number + _native.HANDOFF_SLOTS
        if reused < steps * LAYERS:
            assert times["await ends"] <= at["publish"][reused]
    assert overlapped > 0


def test_an_idle_mailbox_uses_no_processor(experts: HostExperts) -> None:
    device = FakedDevice()
    with opened(MailboxRouter, experts, device, submissions=LAYERS, top_k=TOP_K) as router:
        run(router, device, submissions(1, 1))
        time.sleep(0.05)  # the workers stop spinning
        started = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - started < 0.03


def test_a_model_says_the_same_through_the_mailbox(small_checkpoint: Path) -> None:
    logits: dict[str, list[Tensor]] = {}
    with Checkpoint.open(small_checkpoint) as checkpoint:
        config = checkpoint.config
        shape = (config.num_moe_layers, config.n_routed_experts, config.hidden_size)
        with HostExperts(*shape, config.moe_intermediate_size, threads=2) as host:
            load_experts(checkpoint, host, lambda progress: None)
            device = FakedDevice()
            mailbox = WaitingRouter(
                host,
                device,
                device.fake_stream,
                submissions=config.num_moe_layers,
                top_k=config.num_experts_per_tok,
                dtype=torch.bfloat16,
            )
            thread = ThreadRouter(host, CpuDevice())
            for router in (thread, mailbox):
                routed = RoutedExperts(router, prompts=thread)
                model = load_model(checkpoint, host, CpuDevice(), torch.bfloat16, routed=routed)
                cache = PagedLatentCache(config, 256, PAGE_TOKENS, CpuDevice(), torch.bfloat16)
                sequence = cache.open([1, 2, 3], repeatable=True)
                sequence.reserve(64)
                ids = torch.tensor([1, 2, 3])
                model.forward(ids, torch.arange(3), sequence)
                said = logits.setdefault(router.name, [])
                for token in range(5):
                    said.append(
                        model.decode([token], [sequence], rows_are_independent=True).clone()
                    )
                    sequence.advance([token])
            mailbox.close()
    for one, other in zip(logits["thread"], logits["mailbox"], strict=True):
        assert torch.equal(one, other)


@every_stream_router
def test_a_handoff_is_measured_by_recorded_steps(
    experts: HostExperts, kind: type[StreamRouter]
) -> None:
    device = FakedDevice(delay=0)
    shape = {"rows": 2, "hidden": HIDDEN, "top_k": TOP_K, "dtype": torch.bfloat16}
    with opened(kind, experts, device, submissions=6, top_k=TOP_K) as router:
        seconds = measure_handoff(router, device, submissions=6, **shape)  # type: ignore[arg-type]
        assert 0 < seconds < 0.1
        with pytest.raises(EngineError, match="the step ended after 5 of 6"):
            measure_handoff(router, device, submissions=5, **shape)  # type: ignore[arg-type]
        step = submissions(1, 2)
        router.submissions = LAYERS
        assert_same(run(router, device, step), inline(experts, step))


def test_the_fastest_that_works_is_chosen_and_said(
    experts: HostExperts, caplog: pytest.LogCaptureFixture
) -> None:
    device = FakedDevice()
    options = {"submissions": LAYERS, "top_k": TOP_K, "dtype": torch.bfloat16}
    stream = device.fake_stream
    first = HostFunctionRouter(experts, device, stream, **options)  # type: ignore[arg-type]
    second = MailboxRouter(experts, device, stream, **options)  # type: ignore[arg-type]
    third = ThreadRouter(experts, device)
    took = {first: 20e-6, second: 7e-6}

    def seconds(router: AsyncRouter) -> float:
        if router not in took:
            raise EngineError("it does not")
        return took[router]  # type: ignore[index]

    with caplog.at_level(logging.INFO):
        assert fastest_router([first, second, third], seconds) is second
    assert "thread does not work here: it does not" in caplog.text
    assert "mailbox (host-functions 20.0 us, mailbox 7.0 us a layer)" in caplog.text
    with pytest.raises(EngineError, match="closed"):
        first.begin_step()
    second.close()
    with pytest.raises(EngineError, match="it does not"):
        fastest_router([third], seconds)


def test_without_a_driver_that_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(ConfigError, match=r"no NVIDIA driver: libcuda\.so\.1"):
        card_stream(0)
    with pytest.raises(ConfigError, match=r"no NVIDIA driver: libcuda\.so\.1"):
        CardPinning().pin(4096, 4096)

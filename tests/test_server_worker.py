"""The worker carries replies between its thread and the loop, loses none, and bounds them all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from hybridk2.chat.events import Finished, PromptProgress, TextDelta
from hybridk2.errors import EngineError, QueueFullError, RequestError
from hybridk2.server.worker import MAX_UNREAD_BYTES, EngineWorker, NotReadyError, RemoteReply
from tests.scripted_engine import ENDLESS, ScriptedEngine, until, words

Talk = Callable[[EngineWorker, ScriptedEngine], Coroutine[Any, Any, None]]


def start(assistant: Any) -> Any:
    return assistant.begin([])


def run(talk: Talk, engine: ScriptedEngine | None = None, capacity: int = 4) -> EngineWorker:
    """Run a coroutine beside a worker; the worker is closed afterwards."""
    engine = engine or ScriptedEngine()
    worker = EngineWorker(lambda on_progress: engine, capacity)
    assert worker.ready.wait(30)
    try:
        asyncio.run(talk(worker, engine))
    finally:
        assert worker.close(30)
    assert engine.closed
    return worker


async def begin(worker: EngineWorker) -> RemoteReply:
    (reply,) = await worker.begin_all([start])
    return reply


async def all_of(reply: RemoteReply, seen: list[Any] | None = None) -> list[Any]:
    """Everything that comes, also in `seen` as far as it came before an error."""
    seen = [] if seen is None else seen
    while not reply.finished:
        await reply.arrived.wait()
        seen += reply.take()
    return seen


def test_a_replys_events_arrive_in_order_and_then_it_ends() -> None:
    async def talk(worker: EngineWorker, engine: ScriptedEngine) -> None:
        engine.scripts.append(words("a", "b"))
        events = await all_of(await begin(worker))
        assert events[0] == PromptProgress(5, 5)
        assert events[1:-1] == [TextDelta("a"), TextDelta("b")]
        assert isinstance(events[-1], Finished)
        assert worker.under_way == 0

    run(talk)


def test_beyond_its_capacity_the_worker_refuses_at_once_and_a_place_comes_back() -> None:
    async def talk(worker: EngineWorker, engine: ScriptedEngine) -> None:
        engine.going.clear()
        replies = await worker.begin_all([start] * 4)
        with pytest.raises(QueueFullError, match="4 requests"):  # while none of them goes on
            await begin(worker)
        assert len(engine.replies) == 4
        engine.going.set()
        for reply in replies:
            await all_of(reply)
        await all_of(await begin(worker))

    run(talk)


def test_several_replies_begin_together_or_not_at_all() -> None:
    async def talk(worker: EngineWorker, engine: ScriptedEngine) -> None:
        def fail(assistant: Any) -> Any:
            raise RequestError("no")

        with pytest.raises(RequestError, match="no"):
            await worker.begin_all([start, fail])
        assert worker.under_way == 0
        assert await asyncio.to_thread(until, lambda: engine.replies[0].cancelled)

    run(talk)


def test_an_error_of_a_reply_comes_after_its_events_and_leaves_others_alone() -> None:
    async def talk(worker: EngineWorker, engine: ScriptedEngine) -> None:
        engine.scripts += [[TextDelta("a"), EngineError("broken")], words("b")]
        failing, other = await worker.begin_all([start, start])
        seen: list[Any] = []
        with pytest.raises(EngineError, match="broken"):
            await all_of(failing, seen)
        assert seen == [TextDelta("a")]
        assert TextDelta("b") in await all_of(other)
        assert worker.under_way == 0

    run(talk)


def test_a_cancelled_reply_is_cancelled_in_the_engine_within_a_step() -> None:
    async def talk(worker: EngineWorker, engine: ScriptedEngine) -> None:
        engine.scripts.append(ENDLESS)
        reply = await begin(worker)
        await reply.arrived.wait()
        reply.cancel()
        assert await asyncio.to_thread(until, lambda: engine.replies[0].cancelled)
        await asyncio.to_thread(until, lambda: reply.ended)
        assert worker.under_way == 0

    run(talk)


def test_a_reply_that_is_not_read_ends_before_it_costs_more_than_its_bound() -> None:
    async def talk(worker: EngineWorker, engine: ScriptedEngine) -> None:
        engine.scripts.append(words(*["x" * 1000] * (MAX_UNREAD_BYTES // 1000 + 100)))
        reply = await begin(worker)
        assert await asyncio.to_thread(until, lambda: reply.ended)
        with pytest.raises(RequestError, match="does not read"):
            await all_of(reply)
        assert await asyncio.to_thread(until, lambda: engine.replies[0].cancelled)
        assert worker.under_way == 0

    run(talk, ScriptedEngine(step_seconds=0))


def test_when_the_engine_crashes_every_reply_fails_and_no_more_begin() -> None:
    async def talk(worker: EngineWorker, engine: ScriptedEngine) -> None:
        engine.scripts.append(ENDLESS)
        reply = await begin(worker)
        engine.crash = MemoryError("of the machine")
        with pytest.raises(EngineError, match="thread ended: MemoryError"):
            await asyncio.wait_for(all_of(reply), 30)
        assert not worker.alive
        assert worker.failure is engine.crash
        with pytest.raises(NotReadyError):
            await begin(worker)

    assert run(talk).state == "failed"


def test_a_failing_load_is_kept_and_nothing_begins() -> None:
    error = RuntimeError("no such weights")

    def load(on_progress: Any) -> Any:
        raise error

    worker = EngineWorker(load, 4)
    assert worker.ready.wait(30)
    assert worker.failure is error
    with pytest.raises(NotReadyError):
        asyncio.run(begin(worker))
    assert worker.close(30)


def test_closing_cuts_replies_off_and_says_so() -> None:
    async def talk(worker: EngineWorker, engine: ScriptedEngine) -> None:
        engine.scripts.append(ENDLESS)
        reply = await begin(worker)
        await reply.arrived.wait()
        worker.end()
        with pytest.raises(NotReadyError, match="shutting down"):
            await asyncio.wait_for(all_of(reply), 30)

    assert run(talk).state == "closed"

"""Requests come, go, fail and wait over real sockets, and the server keeps its count."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from hybridk2.chat.events import TextDelta
from hybridk2.errors import DeadlineError, EngineError, OutOfMemoryError, ReplyError
from hybridk2.server import listener, sse
from tests.scripted_engine import ENDLESS, ScriptedEngine, until, words
from tests.served import HOST, Served, serving

BODY = {"model": "nano", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def served(engine: ScriptedEngine) -> Iterator[Served]:
    with serving(lambda on_progress: engine, capacity=24) as served:
        yield served


def raw_request(served: Served, **fields: object) -> bytes:
    """A chat completion as it goes over the wire."""
    body = json.dumps(BODY | fields).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}:{served.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def connect(served: Served, receive_buffer: int | None = None) -> socket.socket:
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(30)
    client.connect((HOST, served.port))
    return client


def data_of(text: str) -> list[dict]:
    """The JSON of every frame of a stream, which ends with [DONE]."""
    frames = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data")]
    assert frames[-1] == "[DONE]"
    return [json.loads(frame) for frame in frames[:-1]]


# -- Going away -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("state", ["queued", "answering"])
def test_a_client_that_leaves_frees_its_place(
    served: Served, engine: ScriptedEngine, stream: bool, state: str
) -> None:
    engine.default = ENDLESS
    if state == "queued":
        engine.going.clear()
    client = connect(served)
    client.sendall(raw_request(served, stream=stream))
    assert until(lambda: engine.replies)
    time.sleep(0.1)
    client.close()
    engine.going.set()
    assert until(lambda: engine.replies[0].done), "the engine still works for nobody"
    assert until(lambda: served.context.worker.under_way == 0)
    assert until(lambda: served.context.open_requests == 0)


def test_a_client_that_leaves_while_its_body_is_on_the_way_leaves_nothing(served: Served) -> None:
    client = connect(served)
    client.sendall(raw_request(served)[:-5])
    assert until(lambda: served.context.open_requests == 1)
    client.close()
    assert until(lambda: served.context.open_requests == 0)


# -- Waiting ----------------------------------------------------------------------------------


def test_while_nothing_comes_the_stream_says_what_it_waits_for(
    served: Served, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "PING_SECONDS", 0.05)
    engine.going.clear()
    with httpx.stream(
        "POST", served.url + "/v1/chat/completions", json=BODY | {"stream": True}
    ) as answer:
        assert answer.status_code == 200, "headers come at admission"
        lines = answer.iter_lines()
        assert next(lines) == ": queued, 0 ahead"
        engine.going.set()
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""]
    assert not any(line.startswith("id:") for line in rest)


def test_exactly_what_is_beyond_the_queue_is_refused_and_health_answers_throughout(
    served: Served, engine: ScriptedEngine
) -> None:
    engine.going.clear()
    clients, capacity = 200, served.context.worker.capacity
    refused = []

    def ask(number: int) -> int:
        answer = served.post("/v1/chat/completions", BODY)
        if answer.status_code == 503:
            refused.append(number)
            assert answer.json()["error"]["code"] == "queue_full"
            assert 1 <= int(answer.headers["retry-after"]) <= 120
        return answer.status_code

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        asked = [pool.submit(ask, number) for number in range(clients)]
        assert until(lambda: len(refused) == clients - capacity)
        for _ in range(21):
            assert served.get("/health").status_code == 200
            assert served.post("/v1/chat/completions", BODY).status_code == 503
        assert len(engine.replies) == capacity, "the engine hears of what is refused"
        engine.going.set()
        statuses = [future.result(30) for future in asked]
    assert statuses.count(200) == capacity
    assert statuses.count(503) == clients - capacity
    assert served.context.worker.under_way == 0


def test_background_requests_leave_places_to_those_that_somebody_waits_for(
    engine: ScriptedEngine,
) -> None:
    engine.going.clear()
    background = {"service_tier": "flex"}
    with (
        serving(lambda on_progress: engine, capacity=6, reserved=2) as served,
        concurrent.futures.ThreadPoolExecutor(6) as pool,
    ):
        asked = [pool.submit(served.chat, **background) for _ in range(4)]
        assert until(lambda: len(engine.replies) == 4)
        full = served.chat(**background)
        assert full.status_code == 503
        assert full.json()["error"]["code"] == "queue_full"
        assert "4 requests run and wait, and 4 may" in full.json()["error"]["message"]
        assert served.chat(n=3, **background).status_code == 503
        asked += [pool.submit(served.chat) for _ in range(2)]
        assert until(lambda: len(engine.replies) == 6), "interactive requests get no place"
        assert "6 requests run and wait, and 6 may" in served.chat().json()["error"]["message"]
        engine.going.set()
        assert [future.result(30).status_code for future in asked] == [200] * 6
        assert served.chat(**background).status_code == 200, "the places come back"


def test_a_reader_of_a_byte_a_second_costs_little_and_holds_nobody_up(
    served: Served, engine: ScriptedEngine
) -> None:
    engine.scripts.append(words(*["x" * 1000] * 4000))
    slow = connect(served, receive_buffer=4096)
    slow.sendall(raw_request(served, stream=True))
    assert slow.recv(1)
    assert until(lambda: engine.replies[0].done), "the slow reader keeps its slot"
    assert engine.replies[0].cancelled
    assert served.chat().json()["choices"][0]["message"]["content"] == "hello world"
    slow.close()
    assert until(lambda: served.context.open_requests == 0)


def test_a_client_that_does_not_read_does_not_hold_up_the_end(
    engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.default = words(*["x" * 10_000] * 2000)
    with serving(lambda on_progress: engine) as served:
        slow = connect(served, receive_buffer=4096)
        slow.sendall(raw_request(served, stream=True))
        assert until(lambda: engine.replies and engine.replies[0].done)
    assert not served.thread.is_alive()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    slow.close()


def test_sockets_that_say_nothing_are_closed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert listener.HEAD_SECONDS <= 30
    assert listener.KEEP_ALIVE_SECONDS <= 30
    monkeypatch.setattr(listener, "HEAD_SECONDS", 0.2)
    idle = [connect(served) for _ in range(100)]
    half = connect(served)
    half.sendall(b"GET /health HTTP/1.1\r\nHo")
    used = connect(served)
    used.sendall(f"GET /health HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
    answered = b""
    while not answered.endswith(b"}"):
        answered += used.recv(65536)
    used.sendall(b"GET /health HT")
    for client in [*idle, half, used]:
        client.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
        client.close()
    assert until(lambda: not served.server.server_state.connections)


def test_a_client_that_trickles_its_head_is_not_given_more_time_for_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "HEAD_SECONDS", 0.3)
    client = connect(served)

    def trickle() -> None:
        for _ in range(600):  # half a minute
            client.sendall(b"G")
            time.sleep(0.05)

    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        trickle()


# -- Failing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineError("weights at /secret/path are broken"), 500, "engine_error"),
        (OutOfMemoryError("of the machine"), 503, "out_of_memory"),
        (DeadlineError("too late"), 504, "deadline_exceeded"),
        (ReplyError("not valid under the schema"), 500, "invalid_output"),
    ],
)
def test_a_failing_reply_is_an_error_with_its_status_or_a_frame_of_the_stream(
    served: Served, engine: ScriptedEngine, error: Exception, status: int, code: str
) -> None:
    engine.scripts += [[error], [TextDelta("a"), error]]
    whole = served.chat()
    assert whole.status_code == status
    assert whole.json()["error"]["code"] == code
    assert "/secret" not in whole.text
    streamed = served.chat(stream=True)
    assert streamed.status_code == 200
    *_, last = data_of(streamed.text)
    assert last["error"] == whole.json()["error"]
    assert served.chat().status_code == 200, "the server is usable afterwards"


def test_when_the_engine_dies_requests_fail_and_health_says_so(
    served: Served, engine: ScriptedEngine
) -> None:
    engine.default = ENDLESS
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(served.chat, stream=stream) for stream in (False, True, False)]
        assert until(lambda: len(engine.replies) == 3)
        engine.crash = RuntimeError("broken")
        whole, streamed, _ = [future.result(30) for future in waiting]
    assert whole.status_code == 500
    assert "error" in data_of(streamed.text)[-1]
    health = served.get("/health")
    assert health.status_code == 503
    assert health.json()["status"] == "failed"
    assert served.chat().json()["error"]["code"] == "model_unavailable"


def test_while_the_model_loads_health_tells_how_far_it_is() -> None:
    from hybridk2.checkpoint import LoadProgress

    engine = ScriptedEngine()
    engine.going.clear()

    def load(on_progress):
        on_progress(LoadProgress("experts", 30, 100, 2.0))
        engine.going.wait(30)
        return engine

    with serving(load, wait=False) as served:
        health = served.get("/health")
        assert health.status_code == 503
        assert health.json()["status"] == "loading"
        assert health.json()["loading"]["done_bytes"] == 30
        refusal = served.chat()
        assert refusal.status_code == 503
        assert refusal.json()["error"]["code"] == "model_loading"
        assert int(refusal.headers["retry-after"]) >= 1
        engine.going.set()
        assert until(lambda: served.get("/health").status_code == 200)
        assert served.chat().status_code == 200


def test_a_draining_server_finishes_what_it_began_and_begins_no_more(
    served: Served, engine: ScriptedEngine
) -> None:
    engine.going.clear()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(served.chat)
        assert until(lambda: engine.replies)
        served.signal()
        assert until(lambda: served.get("/health").status_code == 503)
        assert served.chat().json()["error"]["code"] == "draining"
        engine.going.set()
        assert under_way.result(30).status_code == 200
    assert until(lambda: served.server.should_exit)


def test_a_drain_has_an_end(served: Served, engine: ScriptedEngine) -> None:
    engine.default = ENDLESS
    served.server._drain_seconds = 0.2
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(served.chat, stream=True)
        assert until(lambda: engine.replies)
        served.signal()
        *_, last = data_of(under_way.result(30).text)
    assert "shutting down" in last["error"]["message"]

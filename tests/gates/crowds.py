"""Gates 10 and 11: more requests than places, readers that do not read, sockets that are silent."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tests.gates.fleet import ENDLESS, HOST, Fleet, Server
from tests.gates.gate import Outcome, gate
from tests.scripted_engine import until

CLIENTS, RUNNING, QUEUE = 200, 8, 16
COMPLETIONS = "/v1/completions"
_HEALTH = f"GET /health HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()


@dataclass(frozen=True)
class _Reply:
    status: int
    text: bytes
    seconds: float  # from the request's last byte to the answer's first


@gate("10", f"{CLIENTS} requests at once, queue of {QUEUE}")
def overflow(fleet: Fleet, outcome: Outcome) -> None:
    options = ("--max-running", str(RUNNING), "--max-queue", str(QUEUE))
    with fleet.serving(*options) as server:
        # First a small crowd, as the first requests of a process import and allocate.
        for tokens in (2, 250):
            # 250: long enough for nobody to be done while the others still come.
            body = server.completion("1", tokens, logit_bias=ENDLESS)
            request = server.raw_request(COMPLETIONS, body)
            with _health_asked(server) as asked:
                replies = asyncio.run(_at_once(server, request))
            server.until_idle(5)
        refused = [reply for reply in replies if reply.status == 503]
        answered = [reply for reply in replies if reply.status == 200]
        outcome.hold(len(refused) == CLIENTS - RUNNING - QUEUE, f"{len(refused)} refused")
        outcome.hold(len(answered) == RUNNING + QUEUE, f"{len(answered)} answered")
        outcome.hold(len(replies) == CLIENTS, f"{CLIENTS - len(replies)} lost")
        for reply in refused:
            found = re.search(rb"\r\nretry-after: (\d+)\r\n", reply.text, re.I)
            told = found is not None and 1 <= int(found[1]) <= 120 and b"queue_full" in reply.text
            outcome.hold(told, "a refusal lacks its code or Retry-After")
        whole = sum(b'"completion_tokens":250' in reply.text for reply in answered)
        outcome.hold(whole == len(answered), f"only {whole} answers are whole")
    slowest = 1000 * max((reply.seconds for reply in refused), default=0.0)
    typical = 1000 * statistics.median(reply.seconds for reply in refused)
    health = 1000 * max(asked)
    outcome.hold(slowest < 100, "a refusal takes 100 ms or more")
    outcome.hold(health < 50, "/health takes 50 ms or more")
    outcome.say(f"{len(refused)} refused in at most {slowest:.0f} ms (median {typical:.0f} ms)")
    outcome.say(f"{len(answered)} answered, {len(asked)} times /health in at most {health:.0f} ms")


async def _at_once(server: Server, request: bytes) -> list[_Reply]:
    """Connect all clients, then send all requests; the answers, as far as any came."""
    links = [await asyncio.open_connection(HOST, server.port) for _ in range(CLIENTS)]
    await asyncio.sleep(0.5)  # all are accepted then: the limits are of requests
    async with asyncio.timeout(120):
        answers = (_answer(*link, request) for link in links)
        replies = await asyncio.gather(*answers, return_exceptions=True)
    for _, writer in links:
        writer.close()
    return [reply for reply in replies if isinstance(reply, _Reply)]


@contextlib.contextmanager
def _health_asked(server: Server) -> Iterator[list[float]]:
    """While inside, /health is asked every 10 ms; the seconds that each answer took.

    In a thread that soon has its turn: the clients' own work is no part of the server's answer.
    """
    seconds: list[float] = []
    over = threading.Event()
    switch_interval = sys.getswitchinterval()

    def ask() -> None:
        with socket.create_connection((HOST, server.port), timeout=10) as client:
            while not over.wait(0.01):
                before = time.monotonic()
                client.sendall(_HEALTH)
                answer = b""
                while not answer.endswith(b"}"):
                    answer += client.recv(4096)
                healthy = b'"status":"ok"' in answer
                seconds.append(time.monotonic() - before if healthy else math.inf)

    asking = threading.Thread(target=ask)
    sys.setswitchinterval(0.0005)
    asking.start()
    try:
        yield seconds
    finally:
        over.set()
        asking.join(10)
        sys.setswitchinterval(switch_interval)


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> _Reply:
    writer.write(request)
    before = time.monotonic()
    head = await reader.readuntil(b"\r\n\r\n")
    seconds = time.monotonic() - before
    found = re.search(rb"content-length: (\d+)", head, re.I)
    assert found, "an answer without a length"
    body = await reader.readexactly(int(found[1]))
    return _Reply(int(head.split(b" ")[1]), head + body, seconds)


# -- Gate 11 ------------------------------------------------------------------------------------

SLOW_READERS, IDLE = 20, 500
_FIRST_READERS = 10


@gate("11", f"{SLOW_READERS} readers of 1 B/s, {IDLE} idle sockets")
def slow_readers(fleet: Fleet, outcome: Outcome) -> None:
    options = ("--max-running", str(_FIRST_READERS + SLOW_READERS + 2), "--context", "8192")
    with fleet.serving(*options, model=str(fleet.random_model("tiny"))) as server:
        alone = _median_seconds(server)
        started = time.monotonic()
        idle = [socket.create_connection((HOST, server.port)) for _ in range(IDLE)]
        # What the first cost is the server's to have once. Its memory is taken again by as many of
        # the second crowd, and the others are what is measured.
        _slow_crowd(server, outcome, _FIRST_READERS)
        before = server.memory()
        server.start_peak()
        in_company = _slow_crowd(server, outcome, _FIRST_READERS + SLOW_READERS)
        grown = (server.peak() - before) / SLOW_READERS / 1e6
        outcome.hold(grown < 1, "a slow reader costs 1 MB or more")
        # Their places among those that compute are shared, so all are slower: not held up.
        outcome.hold(in_company < 10, f"another answer takes {in_company:.1f} s")
        closed_after = _until_closed(idle) - started
        outcome.hold(closed_after < 30, f"idle sockets closed after {closed_after:.1f} s only")
        outcome.hold(server.ask("/health").status == 200, "/health is ill afterwards")
    outcome.say(f"each slow reader cost {grown:.2f} MB and lost its place")
    outcome.say(f"another answer took {in_company:.2f} s beside them ({alone:.2f} s alone)")
    outcome.say(f"{IDLE} idle sockets closed after {closed_after:.1f} s")


def _slow_crowd(server: Server, outcome: Outcome, count: int) -> float:
    """Slow readers until they have lost their places; seconds of an answer beside them."""
    slow = [_slow_reader(server) for _ in range(count)]
    over = threading.Event()
    reading = threading.Thread(target=_read_slowly, args=(slow, over))
    reading.start()
    assert until(lambda: server.figures()["running"] >= count, 20), "not all of them run"
    seconds = _median_seconds(server)
    held = until(lambda: server.held().idle, 120)
    outcome.hold(held, f"slow readers keep their places: {server.held()}")
    over.set()
    reading.join(10)
    for client in slow:
        client.close()
    return seconds


def _slow_reader(server: Server) -> socket.socket:
    """A client that asks for much, and reads next to nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((HOST, server.port))
    body = server.completion("1", 4000, logprobs=20, stream=True, logit_bias=ENDLESS)
    client.sendall(server.raw_request(COMPLETIONS, body))
    return client


def _read_slowly(clients: list[socket.socket], over: threading.Event) -> None:
    while not over.wait(1):
        for client in clients:
            with contextlib.suppress(OSError):
                client.recv(1)


def _median_seconds(server: Server) -> float:
    body = server.completion("1", 20, logit_bias=ENDLESS)
    return statistics.median(server.ask(COMPLETIONS, body).seconds for _ in range(5))


def _until_closed(sockets: list[socket.socket]) -> float:
    """When the last of them was closed by the server."""
    for client in sockets:
        client.settimeout(40)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b"", "an idle socket is told something"
        client.close()
    return time.monotonic()


GATES = (overflow, slow_readers)

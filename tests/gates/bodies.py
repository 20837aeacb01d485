"""Gates 1 to 3: bodies that are not what they should be, too large, or made to hold others up."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import math
import random
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from tests.gates.fleet import ENDLESS, HOST, Answer, Fleet, Server
from tests.gates.gate import Outcome, gate
from tests.scripted_engine import until
from tests.test_server_mutations import MESSAGES_BODY, RESPONSES_BODY, mutated

MALFORMED = 10_000
_CASES_PER_OPERATION = 120  # schemathesis makes about 20 a second

_CHAT = {
    "model": "gates",
    "max_tokens": 1,
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "grüße 北京"}]},
    ],
    "stop": ["a"],
    "n": 1,
    "temperature": 0.5,
    "logit_bias": {"5": 1},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "none",
    "response_format": {"type": "text"},
}
_BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _CHAT,
    "/v1/completions": {"model": "gates", "prompt": ["é", "x"], "max_tokens": 1, "logprobs": 2},
    "/v1/messages": {**MESSAGES_BODY, "model": "gates", "max_tokens": 1},
    "/v1/messages/count_tokens": {**MESSAGES_BODY, "model": "gates"},
    "/v1/responses": {**RESPONSES_BODY, "model": "gates", "max_output_tokens": 1},
    "/tokenize": {"messages": _CHAT["messages"], "tools": _CHAT["tools"]},
    "/detokenize": {"tokens": [1, 2, 3]},
}


@gate("1", "malformed bodies")
def malformed_bodies(fleet: Fleet, outcome: Outcome) -> None:
    server = fleet.random
    statuses: Counter[int] = Counter()
    wrong_shape: list[str] = []

    def count(answer: Answer, sent: str) -> None:
        statuses[answer.status] += 1
        outcome.hold(answer.status < 500, f"{answer.status} to {sent[:200]}")
        if answer.status >= 400 and not answer.is_error:
            wrong_shape.append(sent[:200])

    made = _schemathesis_cases(server, count)
    connection = server.connect()
    draw = random.Random(20261125)
    for number in itertools.count():
        refused = sum(many for status, many in statuses.items() if 400 <= status < 500)
        if refused >= MALFORMED or number > 3 * MALFORMED:
            break
        path = draw.choice(list(_BODIES))
        content = _mutated_bytes(_BODIES[path], draw)
        try:
            answer = server.ask(path, content, connection=connection)
        except (http.client.HTTPException, ConnectionError) as error:
            outcome.hold(False, f"{type(error).__name__} to {content[:200]!r}")
            connection = server.connect()
            continue
        count(answer, f"{path} {content!r}")
    outcome.hold(not wrong_shape, f"{len(wrong_shape)} errors of another shape: {wrong_shape[:1]}")
    outcome.hold(refused >= MALFORMED, f"only {refused} bodies were refused")
    outcome.hold(server.ask("/health").status == 200, "the server is not well afterwards")
    outcome.say(f"{refused} refused in the shape of an error ({made} requests of schemathesis)")
    outcome.say(f"{statuses[200]} that stayed valid answered, none with 5xx")


def _schemathesis_cases(server: Server, count: Any) -> int:
    """Send requests that break /openapi.json; how many there were."""
    description = schemathesis.openapi.from_dict(server.ask("/openapi.json").json)
    sent = 0
    for found in description.get_all_operations():
        operation = found.ok()
        if operation.method.lower() != "post":
            continue

        @settings(
            max_examples=_CASES_PER_OPERATION,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
        def send(case: Any) -> None:
            nonlocal sent
            sent += 1
            response = case.call(base_url=f"http://{HOST}:{server.port}")
            answer = Answer(response.status_code, response.headers, response.content, 0.0)
            count(answer, f"{case.method} {case.path} {case.body!r}")

        send()
    return sent


def _mutated_bytes(body: dict[str, Any], draw: random.Random) -> bytes:
    """A body with other fields, other bytes, or cut off, in a character even."""
    value = mutated(body, draw) if draw.random() < 0.5 else body
    content = bytearray(json.dumps(value, ensure_ascii=False).encode())
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(content)) if content else 0
        kind = draw.randrange(4)
        if kind == 0 and content:
            content[at] = draw.randrange(256)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            junk = [b'"', b"{", b"[", b"null", b"-", b"\xf0\x9f", b"\xed\xa0\x80", b"1e999", b"NaN"]
            content[at:at] = draw.choice(junk)
        elif content:
            del content[at : at + draw.randrange(1, 20)]
    return bytes(content)


@gate("2", "bodies over 16 MB")
def large_bodies(fleet: Fleet, outcome: Outcome) -> None:
    server = fleet.random
    megabyte = b"x" * (1 << 20)
    start = b'{"model": "'
    attempts: dict[str, tuple[list[str], Iterator[bytes], set[int]]] = {
        "sized": ([f"Content-Length: {17 << 20}"], iter([start, *[megabyte] * 17]), {413}),
        "chunked": (["Transfer-Encoding: chunked"], _chunks(megabyte, 100), {413}),
        "a length of 1 GB": ([f"Content-Length: {1 << 30}"], iter([megabyte]), {413}),
        "a length beyond 64 bits": ([f"Content-Length: {10**30}"], iter([start]), {413, 400}),
        # What is beyond the length that was told is the next request, and no HTTP.
        "a length of 100 before 17 MB": (["Content-Length: 100"], iter([megabyte] * 17), {400}),
        "a length and chunks": (
            ["Content-Length: 5", "Transfer-Encoding: chunked"],
            _chunks(megabyte, 100),
            {413, 400},
        ),
    }
    server.start_peak()
    before = server.peak()
    for kind, (headers, pieces, expected) in attempts.items():
        status = _status_while_sending(server, headers, pieces)
        outcome.hold(status in expected, f"{kind}: status {status}")
    grown = (server.peak() - before) / 1e6
    outcome.hold(grown < 64, "memory grows by 64 MB or more")
    outcome.hold(server.ask("/health").status == 200, "the server is not well afterwards")
    outcome.say(f"{len(attempts)} ways to send one refused, memory grew by {grown:.1f} MB at most")


def _chunks(piece: bytes, count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def _status_while_sending(server: Server, headers: list[str], pieces: Iterator[bytes]) -> int:
    """The status that comes while the body is on its way, or after it; 0 where none came."""
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: {HOST}",
        "Content-Type: application/json",
        *headers,
    ]
    with socket.create_connection((HOST, server.port), timeout=30) as client:
        received: list[bytes] = []
        reading = threading.Thread(target=_receive_head, args=(client, received))
        reading.start()
        try:
            client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
            for piece in pieces:
                client.sendall(piece)
        except ConnectionError:
            pass  # closed after the refusal, which the other thread has
        reading.join(30)
    return int(received[0].split(b" ")[1]) if received else 0


def _receive_head(client: socket.socket, received: list[bytes]) -> None:
    try:
        if data := client.recv(65536):
            received.append(data)
    except OSError:
        return


# -- Gate 3 -------------------------------------------------------------------------------------


def _tool(parameters: Any) -> dict[str, Any]:
    function = {"name": "f", "parameters": parameters}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


def _chained(depth: int) -> dict[str, Any]:
    """A schema that is deep without being nested."""
    names = {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(depth)}
    return {"properties": {"x": {"$ref": "#/$defs/d0"}}, "$defs": {**names, f"d{depth}": {}}}


def _with_pattern(pattern: str) -> dict[str, Any]:
    string = {"type": "string", "pattern": pattern}
    return _tool({"type": "object", "properties": {"x": string}, "required": ["x"]})


def _attacks() -> dict[str, bytes]:
    """Bodies by what they are; each must be refused, and soon."""
    chat = {"model": "gates", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
    start = json.dumps(chat)[:-1]
    objects = '{"a":' * 10_000 + "1" + "}" * 10_000
    deep = '{"type":"object","properties":{"x":' * 20_000 + "{}" + "}}" * 20_000
    tools = json.dumps(_tool("HERE"))[1:-1].replace('"HERE"', deep)
    attacks = {
        "depth 10,000": f'{start}, "metadata": {"[" * 10_000}{"]" * 10_000}}}',
        "depth 10,000, of objects": f'{start}, "metadata": {objects}}}',
        "depth 10,000, unclosed": f'{start}, "metadata": {"[" * 10_000}',
        "schema depth 20,000": f"{start}, {tools}}}",
        "schema depth 20,000 by reference": json.dumps({**chat, **_tool(_chained(20_000))}),
        "schema depth 1,800 by reference": json.dumps({**chat, **_tool(_chained(1_800))}),
    }
    bombs = {
        "a million times": "a{1000000}",
        "overlapping counts": "(x?){20000}x{20000}",
        "exponentially many states": "^(a|b)*a(a|b){3000}$",
        "exponentially many states, counted": r"^(\w+\s?)*" * 40,
        "a look ahead": "^(?=(a+)+$)a+b$",
        "a back reference": r"^(a+)+\1$",
    }
    for kind, pattern in bombs.items():
        attacks[f"regex of {kind}"] = json.dumps({**chat, **_with_pattern(pattern)})
    return {kind: text.encode() for kind, text in attacks.items()}


# What backtracks for ever elsewhere, and is held here: answered within the same second.
_HARMLESS_HERE = (
    "^(a+)+$",
    "(((a{1,100}){1,100}){1,100}){1,100}",
    r"^(\p{L}{1,300}\d{1,300}){1,300}$",
)


@dataclass
class _Watched:
    """When the frames of a stream came."""

    moments: list[float] = field(default_factory=list)

    def gaps(self, start: float, end: float) -> list[float]:
        """Milliseconds between frames, of those that came between two moments."""
        inside = [moment for moment in self.moments if start <= moment <= end]
        return [1000 * (b - a) for a, b in itertools.pairwise(inside)]


@contextmanager
def _flowing(server: Server) -> Iterator[_Watched]:
    """While inside, an answer streams, and its frames are noted."""
    watched = _Watched()
    prompt = server.completion("1", 3900, logit_bias=ENDLESS)
    with server.stream("/v1/completions", prompt) as stream:

        def read() -> None:
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                for _ in stream.frames():
                    watched.moments.append(time.monotonic())

        reader = threading.Thread(target=read)
        reader.start()
        assert until(lambda: len(watched.moments) > 20, 30), "nothing streams"
        yield watched
        assert reader.is_alive(), "the stream ended early"
        stream.hang_up()
        reader.join(10)


@gate("3", "deep JSON, deep schemas, regex bombs")
def heavy_bodies(fleet: Fleet, outcome: Outcome) -> None:
    server = fleet.nano
    attacks = _attacks()
    slowest = 0.0
    busy: list[float] = []
    # The first constraint builds its tables, once in the life of a server.
    assert server.ask("/v1/chat/completions", server.chat("x", 1, **_tool({}))).status == 200
    with _flowing(server) as watched:
        started = time.monotonic()
        time.sleep(4)
        quiet = watched.gaps(started, time.monotonic())
        for kind, content in attacks.items():
            before = time.monotonic()
            answer = server.ask("/v1/chat/completions", content)
            slowest = max(slowest, answer.seconds)
            time.sleep(0.3)
            gaps = watched.gaps(before, time.monotonic())
            busy += gaps
            named = f"{kind}: {answer.status} after {answer.seconds:.2f} s"
            longest = max(gaps, default=math.inf)
            print(f"  {named}, longest gap {longest:.0f} ms", file=sys.stderr)
            outcome.hold(400 <= answer.status < 500 and answer.is_error, named)
            outcome.hold(answer.seconds < 1, named)
        for pattern in _HARMLESS_HERE:
            body = server.chat("x", 8, **_with_pattern(pattern))
            answer = server.ask("/v1/chat/completions", body)
            outcome.hold(answer.status == 200, f"{pattern}: {answer.status}")
            outcome.hold(answer.seconds < 1, f"{pattern}: after {answer.seconds:.2f} s")
    typical, in_company = statistics.median(quiet), statistics.median(busy)
    outcome.hold(in_company < 2 * typical, "the token gap is twice its baseline")
    outcome.say(f"{len(attacks)} refused, the slowest after {slowest:.2f} s")
    outcome.say(f"{len(_HARMLESS_HERE)} patterns that are bombs elsewhere held")
    outcome.say(
        f"token gap of another stream {in_company:.1f} ms where its baseline is {typical:.1f} ms "
        f"(longest {max(busy):.0f} and {max(quiet):.0f} ms)"
    )


GATES = (malformed_bodies, large_bodies, heavy_bodies)

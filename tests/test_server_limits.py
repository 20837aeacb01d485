"""Whatever a body says, the answer is an answer or a refusal by name, soon, and nothing is hurt."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridk2.server import limits, listener
from hybridk2.server.errors import ApiError
from hybridk2.server.limits import MAX_BODY_BYTES, MAX_DEPTH, check_structure, parse_body
from hybridk2.server.protocol import ChatCompletionRequest, CompletionRequest
from tests.scripted_engine import ENDLESS, ScriptedEngine, until
from tests.served import HOST, Served, serving

MESSAGES = [{"role": "user", "content": "hello"}]
BODY = {"model": "nano", "messages": MESSAGES}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(lambda on_progress: ScriptedEngine()) as served:
        yield served


def refusal(content: bytes, model: Any = ChatCompletionRequest) -> ApiError:
    with pytest.raises(ApiError) as refused:
        parse_body(content, model)
    return refused.value


def post(served: Served, content: bytes) -> httpx.Response:
    return httpx.post(
        served.url + "/v1/chat/completions",
        content=content,
        headers={"content-type": "application/json"},
        timeout=60,
    )


# -- JSON -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'"text"', "invalid_json"),
        (b'{"a": NaN}', "invalid_json"),
        (b'{"a": -Infinity}', "invalid_json"),
        (b'{"a": "\xff"}', "invalid_json"),
        (b'{"a": "\\ud800"}', "invalid_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"\xef\xbb\xbf{}", "invalid_json"),
        (b"\x00", "invalid_json"),
        (b'{"a":' * 10_000, "too_deep"),
        (b"[" * 10_000 + b"]" * 10_000, "too_deep"),
    ],
)
def test_what_is_not_json_is_refused_as_that(content: bytes, code: str) -> None:
    error = refusal(content)
    assert (error.status, error.code) == (400, code)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=40,
)


def depth_of(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(depth_of, children), default=0)


@settings(max_examples=200, deadline=None)
@given(JSON, st.integers(1, 7), st.booleans())
def test_the_scan_finds_the_depth_of_any_json_whatever_its_strings_hold(
    value: Any, block: int, ascii_only: bool
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(limits, "_SCAN_BYTES", block)
        patched.setattr(limits, "MAX_DEPTH", depth_of(value))
        check_structure(text)
        if depth_of(value):
            patched.setattr(limits, "MAX_DEPTH", depth_of(value) - 1)
            with pytest.raises(ApiError, match="nested"):
                check_structure(text)


def test_strings_full_of_quotes_brackets_and_backslashes_are_no_structure() -> None:
    nasty = '\\"[{' * (2 * MAX_DEPTH) + "\\" * 7 + '"'
    body = parse_body(json.dumps(BODY | {"service_tier": nasty}).encode(), ChatCompletionRequest)
    assert body.service_tier == nasty


def test_a_body_of_very_many_values_is_refused_before_objects_are_made_of_it() -> None:
    many = b'{"x": [' + b"[]," * (MAX_BODY_BYTES // 4) + b"0]}"
    process = psutil.Process()
    before = process.memory_info().rss
    assert refusal(many).code == "too_many_values"
    assert process.memory_info().rss - before < 64 << 20


@pytest.mark.parametrize("depth", [MAX_DEPTH - 2, MAX_DEPTH])
def test_nesting_is_allowed_up_to_its_bound(depth: int) -> None:
    nested = b'{"model": "m", "messages": [{}], "metadata": {"x": %b%b}}'
    text = nested % (b"[" * depth, b"]" * depth)
    if depth < MAX_DEPTH - 1:
        parse_body(text, ChatCompletionRequest)
    else:
        assert refusal(text).code == "too_deep"


# -- Fields -----------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f"}}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("field", "allowed", "refused"),
    [
        ("n", [1, 4], [0, 5, -1, 1.5, "1", True, 2**64]),
        ("stop", ["x" * 256, ["a"] * 4], ["", "x" * 257, ["a"] * 5, [""], 1]),
        ("temperature", [0, 2, 0.5], [-0.1, 101, "0.5", True]),
        ("top_p", [0.01, 1], [0, 1.1, -1]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
        ("seed", [-(2**63), 2**63 - 1], [2**63, 10**300, 1.5]),
        ("max_tokens", [1, 2**31 - 1], [0, -1, 2**31, 2**64]),
        ("max_completion_tokens", [1], [0, -1, 2**64]),
        ("logit_bias", [{"5": 100}, {str(i): 0 for i in range(1024)}], [
            {"5": 101}, {"x": 1}, {"-1": 1}, {str(i): 0 for i in range(1025)}, [1],
        ]),
        ("tools", [[tool(f"f{i}") for i in range(128)], [tool("n" * 64)]], [
            [tool(f"f{i}") for i in range(129)], [tool("n" * 65)], [tool("a b")], [tool("")],
            [TOOL, TOOL], [{"type": "web_search"}], [{}],
        ]),
        ("messages", [[{"name": "n" * 64}]], [[{"name": "n" * 65}], [], "x", [1], None]),
        ("response_format", [{"type": "text"}, {"type": "json_object"}], [
            {"type": "xml"}, {"type": "json_schema"}, {},
        ]),
        ("stream", [True, False, None], ["true", 1]),
        ("model", ["m"], ["", None, 1, "m" * 513]),
    ],
)  # fmt: skip
def test_fields_keep_to_their_bounds(field: str, allowed: list[Any], refused: list[Any]) -> None:
    for value in allowed:
        parse_body(json.dumps(BODY | {field: value}).encode(), ChatCompletionRequest)
    for value in refused:
        error = refusal(json.dumps(BODY | {field: value}).encode())
        assert error.status == 400
        assert field in error.message


def test_a_number_that_overflows_to_infinity_is_refused() -> None:
    content = json.dumps(BODY | {"temperature": 12345}).replace("12345", "1e999").encode()
    assert refusal(content).param == "temperature"


@pytest.mark.parametrize("count", [0, 20, None])
def test_top_logprobs_needs_logprobs_and_has_a_bound(count: int | None) -> None:
    body = BODY | {"top_logprobs": count, "logprobs": True}
    parse_body(json.dumps(body).encode(), ChatCompletionRequest)
    refusal(json.dumps(BODY | {"top_logprobs": 21, "logprobs": True}).encode())
    if count is not None:
        refusal(json.dumps(BODY | {"top_logprobs": count}).encode())


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": ["a"] * 65},
        {"prompt": [[]]},
        {"prompt": [-1]},
        {"prompt": [2**31]},
        {"prompt": "x", "max_tokens": 0},
        {"prompt": "x", "best_of": 3, "n": 2},
        {"prompt": "x", "suffix": "y"},
        {"prompt": "x", "logprobs": 21},
        {"prompt": {"x": 1}},
    ],
)
def test_completions_keep_to_their_bounds(fields: dict[str, Any]) -> None:
    assert refusal(json.dumps({"model": "m"} | fields).encode(), CompletionRequest).status == 400


def test_a_refusal_names_the_field_and_never_repeats_what_was_sent() -> None:
    secret = "hunter2-hunter2"
    for fields in (
        {"temperature": secret},
        {"logit_bias": {secret: 1}},
        {"tools": [{"type": secret, "function": {"name": secret + "!"}}]},
        {"messages": [{"role": secret, "content": secret, "name": secret * 9}]},
        {"response_format": {"type": secret}},
        {"tool_choice": secret},
        {secret: 1, "model": 5},
    ):
        error = refusal(json.dumps(BODY | fields).encode())
        assert secret not in json.dumps(error.openai_body())
        assert error.param is not None
    assert secret not in refusal(f'{{"model": "{secret}'.encode()).message


# -- Bytes ------------------------------------------------------------------------------------


def head(served: Served, *lines: str) -> bytes:
    start = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\n"
    return (start + "".join(f"{line}\r\n" for line in lines) + "\r\n").encode()


def status_of(client: socket.socket) -> int:
    return int(client.recv(65536).split(b" ")[1])


def test_a_body_beyond_the_limit_costs_no_more_memory_than_the_limit(served: Served) -> None:
    process = psutil.Process()
    before, peak = process.memory_info().rss, 0
    piece = b"x" * (1 << 20)

    def pieces() -> Iterator[bytes]:
        nonlocal peak
        yield b'{"model": "'
        for _ in range(100):
            peak = max(peak, process.memory_info().rss)
            yield piece

    sized = httpx.post(
        served.url + "/v1/chat/completions",
        content=b" " * (MAX_BODY_BYTES + 1),
        headers={"content-type": "application/json"},
        timeout=60,
    )
    chunked = httpx.post(
        served.url + "/v1/chat/completions",
        content=pieces(),
        headers={"content-type": "application/json"},
        timeout=60,
    )
    for answer in (sized, chunked):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
    assert peak - before < 64 << 20


def test_a_declared_length_beyond_the_limit_is_refused_without_reading(served: Served) -> None:
    with socket.create_connection((HOST, served.port), timeout=10) as client:
        length = f"Content-Length: {MAX_BODY_BYTES + 1}"
        client.sendall(head(served, "Content-Type: application/json", length))
        assert status_of(client) == 413


def test_bodies_together_hold_no_more_than_their_bound_and_give_it_back(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_HELD_BYTES", 1000)
    with socket.create_connection((HOST, served.port), timeout=10) as client:
        client.sendall(head(served, "Content-Type: application/json", "Content-Length: 900"))
        client.sendall(b" " * 800)
        assert until(lambda: served.context.open_requests == 1)
        time.sleep(0.1)
        refused = post(served, json.dumps(BODY | {"service_tier": "x" * 500}).encode())
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "busy"
    assert until(lambda: served.context.open_requests == 0)
    assert post(served, json.dumps(BODY).encode()).status_code == 200


def test_a_body_that_stops_before_its_declared_length_is_given_up(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PIECE_SECONDS", 0.2)
    with socket.create_connection((HOST, served.port), timeout=10) as client:
        client.sendall(head(served, "Content-Type: application/json", "Content-Length: 100"))
        client.sendall(b'{"model"')
        assert status_of(client) == 408


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET / HTTP/9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"CONNECT 127.0.0.1:80 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET http://127.0.0.1/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: h2c\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_http_gets_the_error_body_that_everything_gets(
    served: Served, request_bytes: bytes
) -> None:
    with socket.create_connection((HOST, served.port), timeout=10) as client:
        client.sendall(request_bytes)
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


@pytest.mark.parametrize("piece", [b"a" * 20_000, b"a: b\r\n" * 3_000])
def test_a_head_that_comes_in_pieces_and_does_not_end_is_refused(
    served: Served, piece: bytes
) -> None:
    with socket.create_connection((HOST, served.port), timeout=10) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nx: ")
        answer = b""
        for _ in range(listener.MAX_HEAD_BYTES // len(piece) + 2):
            with contextlib.suppress(ConnectionError):
                client.sendall(piece)
            time.sleep(0.02)  # so that each is read on its own
        with contextlib.suppress(ConnectionError):
            answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 400 ") or not answer


def test_a_body_and_the_start_of_the_next_head_in_one_piece_are_no_long_head(
    served: Served,
) -> None:
    body = json.dumps(BODY | {"user": "x" * 150_000}).encode()
    first = head(served, "Content-Type: application/json", f"Content-Length: {len(body)}")
    second = f"GET /health HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode()
    with socket.create_connection((HOST, served.port), timeout=10) as client:
        client.sendall(first[:-2])
        client.sendall(first[-2:] + body + second[:-2])
        client.sendall(second[-2:])
        answer = b""
        while piece := client.recv(65536):
            answer += piece
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2
    assert answer.endswith(b"}")


def test_who_asks_for_another_protocol_is_answered_in_this_one_and_may_ask_again(
    served: Served,
) -> None:
    # As Java's client and `curl --http2` ask.
    upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    body = json.dumps(BODY).encode()
    post = head(served, *upgrade, "Content-Type: application/json", f"Content-Length: {len(body)}")
    with socket.create_connection((HOST, served.port), timeout=10) as client:
        for _ in range(2):
            client.sendall(post + body)
            answer = b""
            while b"\r\n\r\n" not in answer or not answer.endswith(b"}"):
                answer += client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


# -- Together ---------------------------------------------------------------------------------


def test_mutated_bodies_never_make_the_server_fail(served: Served) -> None:
    generator = random.Random(7)
    whole = json.dumps(BODY | {"stop": ["a"], "tools": [TOOL], "n": 2, "temperature": 0.5}).encode()
    with httpx.Client(base_url=served.url, timeout=30) as client:
        for _ in range(300):
            content = bytearray(whole)
            for _ in range(generator.randrange(1, 4)):
                at = generator.randrange(len(content))
                kind = generator.randrange(3)
                if kind == 0:
                    content[at] = generator.randrange(256)
                elif kind == 1:
                    del content[at:]
                    content += b"}" * generator.randrange(2)
                else:
                    content[at:at] = generator.choice([b'"', b"{", b"[", b"null", b"-", b"\xf0"])
                if not content:
                    break
            answer = client.post(
                "/v1/chat/completions",
                content=bytes(content),
                headers={"content-type": "application/json"},
            )
            assert answer.status_code < 500, bytes(content)
            if answer.status_code != 200:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


# Many levels, many values, a string that must be unescaped.
HEAVY = {
    "deep": json.dumps(BODY)[:-1] + ', "metadata": ' + "[" * 20_000 + "]" * 20_000 + "}",
    "wide": json.dumps(BODY)[:-1] + ', "metadata": [' + "{}," * 5_000_000 + "0]}",
    "long": json.dumps(BODY | {"temperature": -1, "service_tier": '\\"\u00e9' * 1_500_000}),
}


@pytest.mark.parametrize("kind", HEAVY)
def test_a_heavy_body_is_parsed_beside_the_event_loop_and_other_streams_go_on(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine()
    engine.default = ENDLESS
    parsed_in: list[threading.Thread] = []

    def noting_parse(body: bytearray, model: Any) -> Any:
        parsed_in.append(threading.current_thread())
        return parse_body(body, model)

    with serving(lambda on_progress: engine) as served:
        request = BODY | {"stream": True}
        with httpx.stream("POST", served.url + "/v1/chat/completions", json=request) as answer:
            frames = answer.iter_lines()
            next(frames)
            monkeypatch.setattr(limits, "parse_body", noting_parse)
            assert post(served, HEAVY[kind].encode()).status_code == 400
            for _ in range(100):
                next(frames)
        assert len(parsed_in) == 1
        assert (parsed_in[0] is served.thread) == (len(HEAVY[kind]) < limits._THREAD_BYTES)


@pytest.mark.soak
def test_while_heavy_bodies_are_refused_another_stream_keeps_its_pace() -> None:
    engine = ScriptedEngine(step_seconds=0.02)
    engine.default = ENDLESS
    gaps: list[float] = []
    with serving(lambda on_progress: engine) as served:
        stop = threading.Event()

        def read() -> None:
            request = BODY | {"stream": True}
            with httpx.stream("POST", served.url + "/v1/chat/completions", json=request) as answer:
                last = time.monotonic()
                for _ in answer.iter_raw():
                    gaps.append(time.monotonic() - last)
                    last = time.monotonic()
                    if stop.is_set():
                        return

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.5)
        quiet = sorted(gaps)[len(gaps) // 2]
        started = len(gaps)
        for content in HEAVY.values():
            before = time.monotonic()
            assert post(served, content.encode()).status_code == 400
            assert time.monotonic() - before < 1.5
        stop.set()
        reader.join(10)
    busy = gaps[started:]
    assert sorted(busy)[len(busy) // 2] < 2 * quiet
    # One gap is the longest hold of the interpreter: parsing a string of the greatest size.
    assert max(busy) < quiet + 0.3

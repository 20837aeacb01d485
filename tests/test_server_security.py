"""Who may ask: every request passes one gate, and no spelling of a path gets around it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from hybridk2.errors import ConfigError
from hybridk2.server.security import Gate, gate, is_loopback, read_key_file, read_keys
from tests.scripted_engine import ScriptedEngine
from tests.served import HOST, Served, serving

KEY = "a-key-of-some-length"
OTHER = "another-key-as-long"


@pytest.fixture(scope="module")
def open_server() -> Iterator[Served]:
    with serving(lambda on_progress: ScriptedEngine()) as served:
        yield served


@pytest.fixture(scope="module")
def locked_server() -> Iterator[Served]:
    keys = read_keys(f"# keys\n{KEY}\n\n{OTHER}\n", "test")
    with serving(lambda on_progress: ScriptedEngine(), the_gate=gate(keys, HOST, ())) as served:
        yield served


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer {OTHER}"},
        {"x-api-key": KEY},
    ],
)
def test_any_of_the_keys_opens_in_either_header(
    locked_server: Served, headers: dict[str, str]
) -> None:
    assert locked_server.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"x-api-key": ""},
        {"x-api-key": "# keys"},
    ],
)
def test_anything_else_is_refused_in_the_shape_of_its_api(
    locked_server: Served, headers: dict[str, str]
) -> None:
    refusal = locked_server.get("/v1/models", headers=headers)
    assert refusal.status_code == 401
    assert refusal.json()["error"]["code"] == "invalid_api_key"
    assert refusal.headers["www-authenticate"] == "Bearer"
    of_anthropic = locked_server.post("/v1/messages", {}, headers=headers)
    assert of_anthropic.status_code == 401
    assert of_anthropic.json()["type"] == "error"
    assert of_anthropic.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "//health",
        "/health/",
        "/health/../v1/models",
        "/%68ealth",
        "/health%2f..%2fv1%2fmodels",
        "/HEALTH",
        "/metrics",
        "/version",
        "/openapi.json",
        "/nowhere",
    ],
)
def test_only_the_few_open_paths_answer_without_a_key(locked_server: Served, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n"
    assert b" 401 " in raw(locked_server, request.encode()).split(b"\r\n")[0]


def test_health_and_the_page_are_open(locked_server: Served) -> None:
    assert locked_server.get("/health").status_code == 200
    assert locked_server.get("/").status_code == 200


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST:8000", "127.0.0.1:1", "localhost."]
)
def test_the_server_answers_to_names_of_its_own(open_server: Served, host: str) -> None:
    assert open_server.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "192.0.2.7", "127.0.0.1.nip.io", "", "[::2]"]
)
def test_a_page_that_was_rebound_to_this_machine_is_refused(open_server: Served, host: str) -> None:
    refusal = open_server.get("/health", headers={"Host": host})
    assert refusal.status_code == 403
    assert refusal.json()["error"]["code"] == "host_not_allowed"
    assert host not in refusal.text or not host


def test_two_host_headers_or_none_are_refused(open_server: Served) -> None:
    two = f"GET /health HTTP/1.1\r\nHost: {HOST}\r\nHost: evil.example\r\n\r\n"
    none = "GET /health HTTP/1.0\r\n\r\n"
    for request in (two, none):
        status = raw(open_server, request.encode()).split(b"\r\n")[0]
        assert b" 403 " in status or b" 400 " in status


def test_a_server_of_other_machines_answers_to_addresses_and_to_names_it_was_given() -> None:
    remote = Gate(hosts=frozenset({"workstation.lan"}), any_address=True)
    assert gate((), "0.0.0.0", ["Workstation.LAN"]) == Gate(
        hosts=frozenset({"0.0.0.0", "workstation.lan"}), any_address=True
    )

    def scope(host: bytes) -> dict:
        headers = [(b"host", host)]
        return {"headers": headers, "method": "GET", "raw_path": b"/", "type": "http"}

    for host in (b"192.0.2.7:8000", b"workstation.lan", b"[2001:db8::1]"):
        remote.check(scope(host))
    with pytest.raises(Exception, match="does not answer to"):
        remote.check(scope(b"evil.example"))


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None],
)
def test_what_a_page_can_post_without_asking_the_browser_is_refused(
    open_server: Served, content_type: str | None
) -> None:
    headers = {"content-type": content_type} if content_type else {}
    refusal = httpx.post(
        open_server.url + "/v1/chat/completions", content=b"{}", headers=headers, timeout=10
    )
    assert refusal.status_code == 415
    assert refusal.json()["error"]["code"] == "unsupported_media_type"


def test_json_with_a_charset_is_json(open_server: Served) -> None:
    answer = open_server.chat()
    again = open_server.post(
        "/v1/chat/completions",
        {"model": "nano", "messages": [{"role": "user", "content": "hello"}]},
        headers={"content-type": "application/json; charset=utf-8"},
    )
    assert again.status_code == answer.status_code == 200


def test_other_origins_get_no_permission_unless_they_are_named(open_server: Served) -> None:
    asking = {
        "Origin": "https://page.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }

    def preflight(served: Served) -> httpx.Response:
        return httpx.options(served.url + "/v1/chat/completions", headers=asking, timeout=10)

    closed = preflight(open_server)
    assert closed.status_code == 405
    assert not any(name.startswith("access-control") for name in closed.headers)
    named = ("https://page.example",)
    with serving(lambda on_progress: ScriptedEngine(), cors_origins=named) as served:
        opened = preflight(served)
        assert opened.headers["access-control-allow-origin"] == "https://page.example"
        asking["Origin"] = "https://other.example"
        assert "access-control-allow-origin" not in preflight(served).headers


def test_nothing_of_a_request_but_its_route_gets_into_the_log(
    locked_server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    headers = {"x-api-key": KEY}
    body = {"model": "nano", "messages": [{"role": "user", "content": "my secret question"}]}
    assert locked_server.post("/v1/chat/completions?q=secret", body, headers=headers).is_success
    locked_server.get("/v1/models/secret-name", headers=headers)
    locked_server.get("/secret-path", headers=headers)
    server_side = [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith(("hybridk2", "uvicorn", "asyncio"))
    ]
    assert any("POST /v1/chat/completions 200" in line for line in server_side)
    written = "\n".join(server_side) + locked_server.get("/metrics", headers=headers).text
    assert "secret" not in written
    assert KEY not in written


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "found none"),
        ("# only a comment\n", "found none"),
        ("short", "at least 16 characters"),
        ("with a space in between it", "without spaces"),
        ("schlüssel-mit-umlauten", "printable ASCII"),
    ],
)
def test_keys_that_protect_nothing_are_refused(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as refusal:
        read_keys(text, "keys.txt")
    assert not text or text.strip() not in str(refusal.value), "a key is not repeated"


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key_file(file)
    file.chmod(0o600)
    assert read_key_file(file) == (KEY.encode(),)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key_file(tmp_path / "nothing")


def test_loopback_is_what_only_this_machine_reaches() -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    with pytest.raises(ConfigError, match="no address"):
        is_loopback("no such host!")


def raw(served: Served, request: bytes) -> bytes:
    """What the server answers to these bytes, as far as it comes at once."""
    with socket.create_connection((HOST, served.port), timeout=10) as client:
        client.sendall(request)
        return client.recv(65536)

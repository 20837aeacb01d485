"""Gates 21, 22 and 24: who is let in, what is told, and that nothing from outside is run."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping

import psutil

from tests.gates.fleet import HOST, Fleet, Server
from tests.gates.gate import Outcome, gate
from tests.gates.storage import ROOT, run_tests
from tests.serve_process import started
from tests.test_architecture import MODULES, code_from_data

CHAT = "/v1/chat/completions"


@gate("21", "addresses")
def addresses(fleet: Fleet, outcome: Outcome) -> None:
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for connection in fleet.nano.watched.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    outcome.hold(listening == {(HOST, fleet.nano.port)}, f"listens on {listening}")
    refused = ("0.0.0.0", "::", "192.0.2.7")
    for host in refused:
        with started("--host", host) as server:
            code = server.ended(30)
        outcome.hold(code == 1, f"--host {host} without a key: exit status {code}")
        outcome.hold("API key" in server.text, f"--host {host} without a key: {server.text[-200:]}")
    # A model that is not there ends it after the address was taken.
    with started("--host", "0.0.0.0", "--without-api-key", "--model", "/nonexistent") as server:
        server.ended(30)
    outcome.hold("there is no API key" not in server.text, "refused although overridden by name")
    outcome.say(f"listens on {HOST} alone, {len(refused)} other addresses refused without a key")
    outcome.say("--without-api-key overrides it")


@gate("22", "who may ask, and what is logged")
def who_may_ask(fleet: Fleet, outcome: Outcome) -> None:
    key, prompt = secrets.token_hex(16), f"secret-{secrets.token_hex(8)}"
    key_file = fleet.folder / "keys"
    key_file.write_text(key)
    key_file.chmod(0o600)
    for style in ("text", "json"):
        options = ("--api-key-file", str(key_file), "--log-format", style)
        with fleet.serving(*options) as server:
            right = {"Authorization": f"Bearer {key}"}
            probes = _probes(server, right, prompt)
            for kind, (status, expected) in probes.items():
                outcome.hold(status == expected, f"{kind}: {status}, expected {expected}")
            written = server.process.text + server.ask("/metrics", headers=right).body.decode()
            line = " ".join(server.watched.cmdline())
        outcome.hold(CHAT in written, "the log says nothing of the requests")
        for name, secret in (("key", key), ("prompt", prompt)):
            outcome.hold(secret not in written, f"the {name} is in the {style} log or metrics")
        outcome.hold(key not in line, "the key is in argv")
    with started("--api-key", key) as server:
        code = server.ended(30)
        outcome.hold(code == 2, f"a key in argv: exit status {code}")
        outcome.hold(key not in server.text, "a key in argv is repeated")
    source = (ROOT / "hybridk2/server/security.py").read_text()
    constant = "hmac.compare_digest(key, candidate)" in source and "== key" not in source
    outcome.hold(constant, "keys are not compared by hmac.compare_digest")
    outcome.say(f"{len(probes)} ways in probed, key and prompt in no log, metric or argv")


def _probes(server: Server, right: Mapping[str, str], prompt: str) -> dict[str, tuple[int, int]]:
    """Requests by what they are: the status that came, and the one that should."""
    chat = server.chat(prompt, 3)
    plain = {"content-type": "text/plain", **right}
    origin = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    probes = {
        "the right key": (server.ask(CHAT, chat, right).status, 200),
        "no key": (server.ask(CHAT, chat).status, 401),
        "a wrong key": (server.ask(CHAT, chat, {"x-api-key": "x" * 32}).status, 401),
        "a malformed body": (server.ask(CHAT, f'{{"{prompt}'.encode(), right).status, 400),
        "an unknown model": (server.ask(CHAT, {**chat, "model": prompt}, right).status, 404),
        "a foreign Host": (
            server.ask(CHAT, chat, {"host": "evil.example", **right}).status,
            403,
        ),
        "text/plain": (server.ask(CHAT, json.dumps(chat).encode(), plain).status, 415),
        "a preflight": (server.ask(CHAT, headers=origin, method="OPTIONS").status, 405),
        "health without a key": (server.ask("/health").status, 200),
        "the page without a key": (server.ask("/").status, 200),
        **{
            f"{path} without a key": (_status_of_path(server, path), 401)
            for path in (
                *("/metrics", "/openapi.json", "/v1/models", "//health", "/health/", "/%68ealth"),
                *("/health/../metrics", "/chat.js/..%2fmetrics", "/nowhere", "/health;/metrics"),
            )
        },
        "a whole URL for a path": (_status_of_path(server, "http://127.0.0.1/health"), 400),
    }
    answer = server.ask(CHAT, chat, {**right, "origin": "https://evil.example"})
    allowed = any(name.lower().startswith("access-control") for name in answer.headers)
    return {**probes, "permission for another origin": (int(allowed), 0)}


def _status_of_path(server: Server, path: str, *headers: str) -> int:
    """The status of a GET of this path as it is, which a client would tidy up."""
    return int(_raw_get(server, path, *headers).split(b" ")[1])


def _raw_get(server: Server, path: str, *headers: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", f"Host: {HOST}", "Connection: close", *headers]
    answer = b""
    with socket.create_connection((HOST, server.port), timeout=10) as client:
        client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        while data := client.recv(65536):
            answer += data
    return answer


# -- Gate 24 ------------------------------------------------------------------------------------

# In a checkpoint's folder these would be run by whoever trusts its code.
_TRAP = "import pathlib\npathlib.Path({marker!r}).touch()\n"
_TRAPS = (
    *("modeling_kimi.py", "configuration_kimi.py", "tokenization_kimi.py", "conftest.py"),
    *("__init__.py", "sitecustomize.py", "hybridk2.py", "torch.py"),
)


@gate("24", "code and paths from outside")
def nothing_is_run(fleet: Fleet, outcome: Outcome) -> None:
    found = [finding for module in MODULES for finding in code_from_data(module)]
    outcome.hold(not found, "; ".join(found))
    outcome.say(f"{len(MODULES)} modules without pickle, torch.load, eval, shell, foreign code")
    _trapped_checkpoint(fleet, outcome)
    passed = run_tests(
        outcome,
        "tests/test_sessions.py::test_files_are_for_their_owner_only_whatever_the_umask",
        "tests/test_sessions.py::test_names_cannot_leave_the_folder",
    )
    outcome.say(f"sessions 0600 and in their folder ({passed} tests)")
    server = fleet.nano
    up = ("/..", "/%2e%2e", "/..%2f", "/.%2e", "/%252e%252e", "/..\\", "/....//")
    paths = [start + step * 8 + "/etc/passwd" for start in ("", "/chat.js", "/v1") for step in up]
    paths += ["//etc/passwd", "/etc/passwd", "/chat.js%00/etc/passwd", "file:///etc/passwd"]
    for path in paths:
        answer = _raw_get(server, path)
        outcome.hold(b"root:" not in answer, f"{path} reaches a file")
        outcome.hold(answer[9:12] in (b"404", b"400", b"403"), f"{path}: {answer[9:12]!r}")
    outcome.say(f"{len(paths)} paths upwards reach no file")


def _trapped_checkpoint(fleet: Fleet, outcome: Outcome) -> None:
    """Ask a model whose folder is full of code that leaves a mark when it runs."""
    folder = fleet.folder / "trapped"
    folder.mkdir()
    marker = folder / "was-run"
    for path in fleet.random_model("tiny").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name in _TRAPS:
        (folder / name).write_text(_TRAP.format(marker=str(marker)))
    pickled = f"cbuiltins\nexec\n(S'import pathlib; pathlib.Path({str(marker)!r}).touch()'\ntR."
    for name in ("pytorch_model.bin", "training_args.bin", "tokenizer.pkl"):
        (folder / name).write_bytes(pickled.encode())
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        settings["auto_map"] = {
            "AutoConfig": "configuration_kimi.KimiConfig",
            "AutoModelForCausalLM": "modeling_kimi.KimiForCausalLM",
            "AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None],
        }
        (folder / name).write_text(json.dumps(settings))
    command = [sys.executable, "-m", "hybridk2"]
    for arguments in (
        ["chat", "--json", "--max-tokens", "3", "--model", str(folder), "hello"],
        ["verify", str(folder)],
    ):
        ran = subprocess.run(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        outcome.hold(ran.returncode == 0, f"{arguments[0]} refuses it: {ran.stderr[-200:]}")
    outcome.hold(not marker.exists(), "code of the checkpoint's folder was run")
    outcome.say(f"none of {len(_TRAPS) + 3} traps in a checkpoint's folder was sprung")


GATES = (addresses, who_may_ask, nothing_is_run)

"""`hybridk2 serve` as a process: what it prints, when it is ready, how it ends."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from click.testing import CliRunner

from hybridk2.cli import main
from tests.gates.fleet import ENDLESS
from tests.scripted_engine import until
from tests.serve_process import started

KEY = "a-key-of-some-length"
BODY = {
    "model": "nano",
    "messages": [{"role": "user", "content": "which one is bigger, 9.11 or 9.9?"}],
    "max_tokens": 60,
    "temperature": 0,
}


def test_it_listens_at_once_says_how_to_use_it_and_drains_at_sigterm(tmp_path: Path) -> None:
    with started() as server:
        url = server.url
        early = httpx.get(f"{url}/health", timeout=10)
        assert early.status_code == 503, "loading takes longer than listening"
        assert early.json()["status"] == "loading"
        server.ready()
        assert until(lambda: "print(answer" in server.text)
        curl = re.search(r"curl .*?'\n", server.text, re.S)
        assert curl
        shown = subprocess.run(
            ["sh", "-c", curl.group()], capture_output=True, text=True, timeout=60, check=True
        )
        assert "9.9" in json.loads(shown.stdout)["choices"][0]["message"]["content"]

        answers: list[httpx.Response] = []
        long = BODY | {"max_tokens": 300, "temperature": 1, "stream": True}
        asking = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{url}/v1/chat/completions", json=long, timeout=60)
            )
        )
        asking.start()
        assert until(lambda: "running 1.0" in httpx.get(f"{url}/metrics").text, 10)
        for _ in range(2):  # as `timeout` sends it, to the process and to its group
            server.process.send_signal(signal.SIGTERM)
        code = server.ended(30)
        asking.join(10)
        assert code == 0, server.text
        assert answers[0].status_code == 200
        assert answers[0].text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"stop"' in answers[0].text
        assert not psutil.pid_exists(server.process.pid)


def test_json_logs_hold_no_prompt_and_no_key_and_a_second_sigterm_ends_at_once() -> None:
    options = ("--log-format", "json", "--drain-seconds", "3600")
    with started(*options, HYBRIDK2_API_KEY=KEY) as server:
        url = server.ready()
        assert httpx.post(f"{url}/v1/chat/completions", json=BODY).status_code == 401
        headers = {"Authorization": f"Bearer {KEY}"}
        answer = httpx.post(f"{url}/v1/chat/completions", json=BODY, headers=headers, timeout=60)
        assert answer.status_code == 200
        endless = {"model": "nano", "prompt": "1", "max_tokens": 4000, "stream": True}
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=endless, headers=headers, timeout=60
        ) as stream:
            frames = stream.iter_lines()
            next(frames)
            server.process.send_signal(signal.SIGTERM)
            assert until(lambda: "shutting down" in server.text)
            time.sleep(0.5)  # sooner would be the same wish sent twice
            server.process.send_signal(signal.SIGTERM)
            assert server.ended(60) == 128 + signal.SIGTERM
            *_, error, done = [line for line in frames if line]
        assert "cut off" in error
        assert done == "data: [DONE]"
    records = [json.loads(line) for line in server.lines]
    served = [record for record in records if record.get("route") == "/v1/chat/completions"]
    assert [record["status"] for record in served] == [401, 200]
    assert served[1]["ms"] > 0
    assert KEY not in server.text
    assert "bigger" not in server.text


def test_a_quarter_of_the_queue_is_kept_from_background_requests() -> None:
    with started("--max-running", "1", "--max-queue", "5") as server:
        url = server.ready()
        endless = {"model": "nano", "prompt": "1", "max_tokens": 4000, "stream": True}
        endless |= {"logit_bias": ENDLESS}
        background = endless | {"service_tier": "flex"}
        with contextlib.ExitStack() as stack:

            def ask(body: dict[str, Any]) -> int:
                streamed = httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60)
                return stack.enter_context(streamed).status_code

            assert [ask(background) for _ in range(5)] == [200] * 4 + [503]
            assert [ask(endless) for _ in range(3)] == [200] * 2 + [503]


def test_a_model_that_cannot_be_loaded_ends_it_with_the_reason(tmp_path: Path) -> None:
    with started("--model", str(tmp_path)) as server:
        assert server.ended(60) == 1
    assert "tiktoken.model" in server.text
    assert "Traceback" not in server.text


@pytest.mark.parametrize(
    ("arguments", "status", "what"),
    [
        (["--host", "0.0.0.0"], 1, "there is no API key"),
        (["--host", "no such host!"], 1, "no address of this machine"),
        (["--api-key", KEY], 2, "can be read by every user"),
        (["--api-key-file", "/nonexistent"], 1, "cannot be read"),
        (["--port", "70000"], 2, "70000"),
        (["--max-running", "0"], 2, "0"),
    ],
)
def test_what_would_not_be_safe_or_cannot_be_is_refused_before_anything_is_loaded(
    arguments: list[str], status: int, what: str
) -> None:
    result = CliRunner().invoke(main, ["serve", *arguments])
    assert result.exit_code == status
    assert what in result.output
    assert KEY not in result.output


def test_a_port_that_is_taken_is_named() -> None:
    from hybridk2.server.listener import listen

    taken = listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    result = CliRunner().invoke(main, ["serve", "--port", str(port)])
    taken.close()
    assert result.exit_code == 1
    assert f"port {port}" in result.output

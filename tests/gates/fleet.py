"""Running servers of the gates, and ways to reach them, watch them and measure them.

A server is a process of `hybridk2 serve` on a free port of the loopback. Those that gates only ask
are shared and started when first needed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hybridk2.synthesis import Scale, config_for_tokenizer, synthesize, synthetic_config
from hybridk2.tokenizer import Tokenizer
from tests.scripted_engine import NANO_FOLDER, until
from tests.serve_process import Process, started

HOST = "127.0.0.1"
TOKENIZER = Tokenizer.from_folder(NANO_FOLDER)

# With this an answer goes on until max_tokens: none of its ends can be sampled.
ENDLESS = {str(TOKENIZER.control.im_end): -100, str(TOKENIZER.control.eos): -100}


@dataclass(frozen=True)
class Answer:
    """What came back. seconds: from the connection to the last byte."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        return self.json["error"].get("code")

    @property
    def is_error(self) -> bool:
        """Whether the body is an error in OpenAI's shape, or in Anthropic's."""
        try:
            body = self.json
        except ValueError:
            return False
        if not isinstance(body, dict) or not isinstance(body.get("error"), dict):
            return False
        names = set(body["error"])
        anthropic = body.get("type") == "error" and names == {"type", "message"}
        return names == {"message", "type", "param", "code"} or anthropic


class Stream:
    """A streamed answer, line by line."""

    def __init__(self, response: http.client.HTTPResponse, connection: socket.socket) -> None:
        self.status = response.status
        self._response = response
        self._socket = connection

    def lines(self) -> Iterator[str]:
        for line in self._response:
            if line.strip():
                yield line.decode().strip()

    def frames(self) -> Iterator[Any]:
        """The JSON of every data frame; [DONE] is none."""
        for line in self.lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data: "))

    def leave(self) -> None:
        """Go away without a word, as a closed laptop does."""
        self.hang_up()
        self._response.close()
        self._socket.close()

    def hang_up(self) -> None:
        """End the connection; whoever reads it in another thread comes to its end."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Held:
    """What a server holds for requests."""

    running: int
    waiting: int
    under_way: int
    cache_tokens: int
    descriptors: int
    threads: int

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting or self.under_way or self.cache_tokens)


class Server:
    """One running server."""

    def __init__(self, process: Process, model: str) -> None:
        self.port = int(process.ready().rpartition(":")[2])
        self.process = process
        self.model = model
        self.watched = psutil.Process(process.process.pid)

    def connect(self, timeout: float = 60.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(HOST, self.port, timeout=timeout)

    def ask(
        self,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        method: str | None = None,
        connection: http.client.HTTPConnection | None = None,
    ) -> Answer:
        """A whole request and its answer. body: bytes go out as they are, else as JSON; None GETs.
        connection: one to use and to leave open."""
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if content is not None else {}
        through = connection or self.connect()
        before = time.monotonic()
        try:
            verb = method or ("GET" if content is None else "POST")
            through.request(verb, path, content, {**sent, **(headers or {})})
            response = through.getresponse()
            answer = response.read()
            seconds = time.monotonic() - before
            return Answer(response.status, dict(response.headers), answer, seconds)
        finally:
            if connection is None:
                through.close()

    @contextmanager
    def stream(self, path: str, body: Mapping[str, Any], timeout: float = 120) -> Iterator[Stream]:
        """A streamed answer while inside; leaving before its end is a disconnect."""
        connection = self.connect(timeout)
        content = json.dumps({**body, "stream": True})
        connection.request("POST", path, content, {"Content-Type": "application/json"})
        wire = connection.sock
        stream = Stream(connection.getresponse(), wire)
        try:
            yield stream
        finally:
            stream.leave()
            connection.close()

    def raw_request(self, path: str, body: Mapping[str, Any]) -> bytes:
        """A POST as it goes over the wire."""
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    def completion(self, prompt: Any, max_tokens: int, **fields: Any) -> dict[str, Any]:
        """A body for /v1/completions."""
        return {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, **fields}

    def chat(self, question: str, max_tokens: int, **fields: Any) -> dict[str, Any]:
        """A body for /v1/chat/completions."""
        messages = [{"role": "user", "content": question}]
        return {"model": self.model, "messages": messages, "max_tokens": max_tokens, **fields}

    def figures(self) -> dict[str, float]:
        """Everything at /metrics, without `hybridk2_`; labels summed up."""
        found: dict[str, float] = {}
        for line in self.ask("/metrics").body.decode().splitlines():
            if match := re.fullmatch(r"hybridk2_(\w+)(?:\{.*\})? (\S+)", line):
                found[match[1]] = found.get(match[1], 0.0) + float(match[2])
        return found

    def held(self) -> Held:
        figures = self.figures()
        return Held(
            running=int(figures["running"]),
            waiting=int(figures["waiting"]),
            under_way=int(figures["replies_under_way"]),
            cache_tokens=int(figures["cache_tokens_used"]),
            descriptors=self.watched.num_fds(),
            threads=self.watched.num_threads(),
        )

    def until_idle(self, seconds: float) -> float:
        """Seconds until nothing is held for requests; fails when that takes too long."""
        before = time.monotonic()
        assert until(lambda: self.held().idle, seconds), f"after {seconds} s: {self.held()}"
        return time.monotonic() - before

    def until_descriptors(self, most: int, seconds: float) -> int:
        """Wait until so many files are open; how many are."""
        until(lambda: self.watched.num_fds() <= most, seconds)
        return int(self.watched.num_fds())

    def memory(self) -> int:
        """Resident bytes now."""
        return int(self.watched.memory_info().rss)

    def start_peak(self) -> None:
        """From now on `peak` is the largest resident size."""
        Path(f"/proc/{self.watched.pid}/clear_refs").write_text("5")

    def peak(self) -> int:
        """The largest resident size since `start_peak`, bytes."""
        status = Path(f"/proc/{self.watched.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found, "the kernel tells no peak"
        return int(found[1]) * 1024


class Fleet:
    """The servers and checkpoints of one run of the gates."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._servers: dict[str, Server] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="hybridk2-gates-"))
        self._stack.callback(shutil.rmtree, self.folder)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def random_model(self, scale: Scale) -> Path:
        """A checkpoint of random weights that speaks K2-nano's tokens: tiny is quick, small takes
        its time."""
        folder = self.folder / f"random-{scale}"
        if not folder.exists():
            config = config_for_tokenizer(synthetic_config(scale), NANO_FOLDER)
            synthesize(folder, config, seed=1, tokenizer_folder=NANO_FOLDER)
        return folder

    @property
    def nano(self) -> Server:
        """Shared: K2-nano, nothing chosen but the address."""
        return self._shared("nano", "nano")

    @property
    def random(self) -> Server:
        """Shared: a tiny model of random weights."""
        return self._shared("random", str(self.random_model("tiny")), "--context", "8192")

    @property
    def slow(self) -> Server:
        """Shared: a model of random weights, large enough for long prompts to take seconds."""
        return self._shared("slow", str(self.random_model("small")), "--context", "16384")

    def _shared(self, name: str, model: str, *arguments: str) -> Server:
        server = self._servers.get(name)
        if server is None or server.process.process.poll() is not None:
            server = self._stack.enter_context(self.serving(*arguments, model=model))
            self._servers[name] = server
        return server

    @contextmanager
    def serving(
        self, *arguments: str, model: str = "nano", module: str = "hybridk2", **environment: str
    ) -> Iterator[Server]:
        """A server of its own, killed afterwards if it still runs."""
        options = ["--model", model, "--served-model-name", "gates", *arguments]
        with started(*options, module=module, **environment) as process:
            yield Server(process, "gates")

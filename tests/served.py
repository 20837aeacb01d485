"""A server on a socket of its own, in a thread of the test's process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from openai import OpenAI

from hybridk2.server.app import create_app
from hybridk2.server.context import ServerContext, ServerSettings
from hybridk2.server.listener import HttpServer, listen
from hybridk2.server.metrics import ServerMetrics
from hybridk2.server.security import Gate, gate
from hybridk2.server.worker import EngineWorker

HOST = "127.0.0.1"

# One for all: making a client costs more than most requests. It leaves no connection open.
_CLIENT = httpx.Client(
    timeout=60, headers={"Connection": "close"}, limits=httpx.Limits(max_connections=None)
)


@dataclass
class Served:
    """A running server and ways to reach it."""

    url: str
    context: ServerContext
    server: HttpServer
    thread: threading.Thread  # the event loop's

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def openai(self) -> OpenAI:
        """The official client, as an application would make it; it does not try again."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return _CLIENT.get(self.url + path, **options)

    def post(self, path: str, body: Mapping[str, Any], **options: Any) -> httpx.Response:
        return _CLIENT.post(self.url + path, json=body, **options)

    def signal(self) -> None:
        """What the first SIGTERM does."""
        loop = self.server.servers[0].get_loop()
        loop.call_soon_threadsafe(self.server.leave, signal.SIGTERM)

    def chat(self, question: str = "hello", **fields: Any) -> httpx.Response:
        """One chat completion, by hand."""
        messages = [{"role": "user", "content": question}]
        return self.post("/v1/chat/completions", {"model": "nano", "messages": messages} | fields)


@contextmanager
def serving(
    load: Callable[[Any], Any],
    *,
    capacity: int = 72,
    reserved: int = 0,
    the_gate: Gate | None = None,
    wait: bool = True,
    **settings: Any,
) -> Iterator[Served]:
    """Serve what `load` loads while inside. wait: until it is loaded."""
    metrics = ServerMetrics()
    worker = EngineWorker(load, capacity, metrics.count_reply, reserved=reserved)
    context = ServerContext(worker, ServerSettings(("nano",), **settings), metrics)
    listening = listen(HOST, 0)
    app = create_app(context, the_gate or gate((), HOST, ()))
    server = HttpServer(app, context, drain_seconds=5)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    if wait:
        assert worker.ready.wait(60)
        assert worker.failure is None, worker.failure
    while not server.started:
        time.sleep(0.01)
    try:
        yield Served(f"http://{HOST}:{listening.getsockname()[1]}", context, server, thread)
    finally:
        server.should_exit = True
        worker.close(30)
        thread.join(30)


@contextmanager
def serving_nano(context_tokens: int | None = None, **options: Any) -> Iterator[Served]:
    """Serve K2-nano. context_tokens: None for all that it can have, 4,096."""
    from hybridk2.assistant import Assistant
    from hybridk2.config import EngineConfig

    queued = options.get("capacity", 72)
    choices = EngineConfig(threads=2, max_queued=queued, context_tokens=context_tokens)
    with serving(lambda on_progress: Assistant.load(choices, on_progress), **options) as served:
        yield served

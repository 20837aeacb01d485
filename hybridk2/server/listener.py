"""Sockets, connections and signals: uvicorn, told what a server left running needs.

Owns the listening socket, the timeouts of connections that say nothing or do not read, and the way
out: the first signal lets requests finish, the second ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hybridk2.errors import ConfigError
from hybridk2.server.context import ServerContext
from hybridk2.server.errors import ApiError

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 20  # between two requests of a connection
HEAD_SECONDS = 20.0  # from a connection, or a request's first byte, to the end of its head
STALL_SECONDS = 60.0  # for which a client may read nothing
MAX_HEAD_BYTES = 64 << 10  # of a request line and its headers

# What the kernel may hold of an answer that is not read; it doubles this for its own records. The
# default grows to megabytes for every slow reader.
_SEND_BUFFER_BYTES = 128 << 10

# How long the engine's thread may keep the interpreter to itself while the loop has work. Of 200
# requests at once against a queue of 16, the last refusal came after 0.42 s with Python's own 5 ms,
# after 0.18 s with this (K2-nano, 2 Zen 5 cores with other work on them).
_SWITCH_SECONDS = 0.001

_BACKLOG = 1024
_ECHO_SECONDS = 0.3  # `timeout` and some shells send a signal to the process and to its group

# For requests that were cut off to say so to their clients.
_LAST_SECONDS = 1
_FORCED_LAST_SECONDS = 0.05


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        listening.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}. Try --port") from error
    listening.listen(_BACKLOG)
    listening.setblocking(False)
    return listening


class HttpServer(uvicorn.Server):
    """Serves until a signal has let the open requests finish."""

    def __init__(self, app: ASGIApp, context: ServerContext, drain_seconds: float) -> None:
        """drain_seconds: what the first signal gives open requests to finish."""
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=2 * _LAST_SECONDS,
        )
        super().__init__(config)
        sys.setswitchinterval(_SWITCH_SECONDS)
        self.forced_by: int | None = None  # the signal that cut requests off
        self._context = context
        self._drain_seconds = drain_seconds
        self._draining: asyncio.Task[None] | None = None
        self._asked = 0.0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """While inside, SIGINT and SIGTERM drain; uvicorn's own way would end with their status."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.leave, number)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def leave(self, signal_number: int) -> None:
        """Finish open requests and end; asked a second time, end now."""
        now = time.monotonic()
        if self._draining is None:
            self._context.draining = True
            self._draining = asyncio.create_task(self._drain())
            self._asked = now
        elif now - self._asked > _ECHO_SECONDS:
            self.forced_by = signal_number
            self._context.worker.end()
            self.force_exit = self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all connections: those of clients that do not read, without waiting for them."""
        seconds = _FORCED_LAST_SECONDS if self.force_exit else _LAST_SECONDS
        asyncio.get_running_loop().call_later(seconds, self._abort_connections)
        await super().shutdown(sockets)

    def _abort_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._drain_seconds):
                logger.info("shutting down: %d requests open", self._context.open_requests)
                await self._context.idle()
        except TimeoutError:
            logger.warning("%d requests are cut off", self._context.open_requests)
            self._context.worker.end()
        self.should_exit = True


class Connection(HttpToolsProtocol):
    """A connection that does not outlive a client that says nothing, or reads nothing.

    Parsed by httptools, not h11, which takes 0.2 ms for a request: 200 at once hold up everybody
    else for as long as all their heads take together.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.access_log = False  # uvicorn's has whole paths; ours is written by app.Door
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._requests = 0  # that began
        self._in_head = False
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        requests, head_bytes = self._requests, self._head_bytes
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("")
            return
        if self._in_head and self._requests == requests:
            # The parser tells of a header once it is whole: until then it keeps all of this.
            self._head_bytes = head_bytes + len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("")
                return
        self._expect_head()

    def _parse(self, data: bytes) -> None:
        """Raises HttpParserError.

        Who asks for another protocol is answered in this one (RFC 9110, section 7.8): Java's client
        asks with every first request, `curl --http2` too. The parser takes what follows the head
        for the other protocol, a body included, so another one reads the head without the wish.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if not any(name == b"upgrade" for name, _ in self.headers):
                raise httptools.HttpParserError("CONNECT is for proxies") from None
            line = b"%s %s HTTP/1.1" % (self.parser.get_method(), self.url)
            kept = (
                b"%s: %s" % header
                for header in self.headers
                if header[0] not in (b"upgrade", b"connection")
            )
            self.parser = httptools.HttpRequestParser(self)
            self._parse(b"\r\n".join((line, *kept, b"", b"")) + data[upgrade.args[0] :])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._requests += 1
        self._in_head, self._head_bytes = True, 0

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Raises ValueError, which the parser makes an invalid request, for a target that is no
        path: proxies are sent whole URLs, and the gate looks at the path as it came."""
        self._in_head = False
        if not self.url.startswith(b"/"):
            raise ValueError("a target that is no path")
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._head_arrived()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets the error body that everything gets."""
        error = ApiError(400, "what came is not a valid HTTP request", "invalid_http")
        body = bytes(error.response("").body)
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-length: {len(body)}\r\n"
        rest = "content-type: application/json\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + rest.encode() + body)
        self.transport.close()

    def _count_head(self, count: int) -> None:
        """Raises ValueError, which the parser makes an invalid request."""
        self._head_bytes += count
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError(f"a head of more than {MAX_HEAD_BYTES} bytes")

    def _expect_head(self) -> None:
        """Give a head that is not here yet its time, from its first byte: never more for more."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._head_arrived()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

"""From replies to HTTP: streamed as server-sent events, or collected; ended when the client goes.

Owns the life of an answer on the wire: headers at admission, comments while nothing comes, the
disconnect that cancels. What a frame says is the business of each API's encoder.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hybridk2.chat.events import Event
from hybridk2.server.errors import ApiError, as_api_error
from hybridk2.server.worker import RemoteReply

PING_SECONDS = 5.0  # some clients drop a socket that says nothing, the hastiest after 10 s


class StreamEncoder(Protocol):
    """One API's frames. Each method returns whole frames, b"" for none."""

    def start(self) -> bytes:
        """The request was admitted."""

    def event(self, choice: int, event: Event) -> bytes:
        """An event of reply number `choice`."""

    def ping(self, comment: str) -> bytes:
        """Nothing came for a while; comment: what is going on, in words."""

    def error(self, error: ApiError) -> bytes:
        """A reply failed. Nothing follows, `end` neither."""

    def end(self) -> bytes:
        """All replies have ended."""


def data_frame(value: Any, event: str | None = None) -> bytes:
    """One frame of JSON. event: its type, for the APIs that name one."""
    head = f"event: {event}\n".encode() if event else b""
    return b"".join([head, b"data: ", to_json(value), b"\n\n"])


def comment_frame(text: str) -> bytes:
    """A frame that every client ignores."""
    return f": {text}\n\n".encode()


class ReplyStream(Response):
    """Replies that have begun, streamed through an encoder."""

    media_type = "text/event-stream"

    def __init__(self, replies: Sequence[RemoteReply], encoder: StreamEncoder) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._replies = replies
        self._encoder = encoder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. Whatever ends it, no reply is left running."""
        gone = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(head)
            async for frames in self._frames(gone):
                await send({"type": "http.response.body", "body": frames, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            cancel_all(self._replies)

    async def _frames(self, gone: asyncio.Task[None]) -> AsyncIterator[bytes]:
        if head := self._encoder.start():
            yield head
        said = time.monotonic()
        async for ready in _as_they_come(self._replies, gone):
            try:
                frames = b"".join(
                    self._encoder.event(choice, event)
                    for choice in ready
                    for event in self._replies[choice].take()
                )
            except Exception as error:  # noqa: BLE001 - told to the client, unexpected ones logged
                yield self._encoder.error(as_api_error(error))
                return
            if not frames and time.monotonic() - said >= PING_SECONDS:
                frames = self._encoder.ping(_what_goes_on(self._replies))
            if frames:
                said = time.monotonic()
                yield frames
        if not gone.done():
            yield self._encoder.end()


async def collect_events(request: Request, replies: Sequence[RemoteReply]) -> list[list[Event]]:
    """All events of all replies. Raises the first error, and ApiError when the client has gone.

    Whatever ends it, no reply is left running.
    """
    gone = asyncio.create_task(_wait_for_disconnect(request.receive))
    events: list[list[Event]] = [[] for _ in replies]
    try:
        async for ready in _as_they_come(replies, gone):
            for choice in ready:
                events[choice].extend(replies[choice].take())
        if gone.done():
            raise ApiError(499, "the client has gone")  # nobody reads it; the log does
        return events
    finally:
        gone.cancel()
        cancel_all(replies)


def cancel_all(replies: Sequence[RemoteReply]) -> None:
    for reply in replies:
        if not reply.ended:
            reply.cancel()


async def _as_they_come(
    replies: Sequence[RemoteReply], gone: asyncio.Task[None]
) -> AsyncIterator[list[int]]:
    """The numbers of the replies that have something to take; none of them after a silence.

    Ends when all replies have ended and were taken from, or the client has gone.
    """
    left = dict(enumerate(replies))
    waits: dict[int, asyncio.Task[Any]] = {}
    try:
        while left:
            for number, reply in left.items():
                if number not in waits:
                    waits[number] = asyncio.create_task(reply.arrived.wait())
            await asyncio.wait(
                {gone, *waits.values()},
                timeout=PING_SECONDS,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if gone.done():
                return
            ready = [number for number, wait in waits.items() if wait.done()]
            for number in ready:
                del waits[number]
            yield ready
            left = {number: reply for number, reply in left.items() if not reply.finished}
    finally:
        for wait in waits.values():
            wait.cancel()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _what_goes_on(replies: Sequence[RemoteReply]) -> str:
    positions = [reply.queue_position for reply in replies]
    ahead = max((position for position in positions if position is not None), default=None)
    if ahead is not None:
        return f"queued, {ahead} ahead"
    for reply in replies:
        progress = reply.progress
        if progress is not None and progress.read_tokens < progress.total_tokens:
            return f"reading the prompt, {progress.read_tokens} of {progress.total_tokens} tokens"
    return "working"

"""What a request's body may be, checked before anything is made of it.

Owns the bounds on bytes, time, nesting and number of values, and the way from a body to a validated
pydantic model. Big bodies are parsed in a thread, and scanned first by numpy, which lets other
threads run meanwhile: the part that holds up running streams stays short.
"""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request
from starlette.types import Receive, Scope

from hybridk2.server.errors import ApiError

MAX_BODY_BYTES = 16 << 20
MAX_DEPTH = 100  # of nested lists and objects; the deepest schemas in use have about 30
MAX_VALUES = 400_000  # of lists and objects together; a prompt of token ids has up to 262,144

MAX_HELD_BYTES = 256 << 20  # of all bodies together
PIECE_SECONDS = 30.0  # within which the next piece of a body has to come
UPLOAD_SECONDS = 300.0  # within which all of it has to

_SCAN_BYTES = 1 << 20
_THREAD_BYTES = 64 << 10  # parsing less than this takes below a millisecond

_BODY = "hybridk2.body"  # where the body lies in the ASGI scope

Model = TypeVar("Model", bound=BaseModel)


class Bodies:
    """The bodies that one server holds unread, together no more than MAX_HELD_BYTES."""

    def __init__(self) -> None:
        self._held_bytes = 0

    async def receive(self, scope: Scope, receive: Receive) -> None:
        """Read the whole body and keep it for `validated_body`, or until `release`.

        Raises ApiError beyond the limits. The rest of a body that is refused is read and dropped by
        uvicorn, so that the client, which may still be sending, gets to read the refusal.
        """
        if _content_length(scope) > MAX_BODY_BYTES:
            raise _too_large()
        body = scope[_BODY] = _Body(self)
        try:
            async with asyncio.timeout(UPLOAD_SECONDS):
                while await self._receive_piece(body, receive):
                    pass
        except TimeoutError as error:
            raise ApiError(408, "the body did not come in time", "body_too_slow") from error

    async def _receive_piece(self, body: _Body, receive: Receive) -> bool:
        """Whether more is to come."""
        async with asyncio.timeout(PIECE_SECONDS):
            message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(499, "the client has gone")  # nobody reads it; the log does
        piece = message.get("body", b"")
        if len(body.content) + len(piece) > MAX_BODY_BYTES:
            raise _too_large()
        if self._held_bytes + len(piece) > MAX_HELD_BYTES:
            refusal = "too many large requests arrive at once; come again later"
            raise ApiError(503, refusal, "busy", retry_after_seconds=5)
        self._held_bytes += len(piece)
        body.content += piece
        return bool(message.get("more_body", False))

    def let_go(self, count: int) -> None:
        """So many bytes are no longer held."""
        self._held_bytes -= count

    @staticmethod
    def release(scope: Scope) -> None:
        """The request has ended, whether its body was read or not."""
        if _BODY in scope:
            scope[_BODY].take()


class _Body:
    """One body, until it is taken."""

    def __init__(self, bodies: Bodies) -> None:
        self.content = bytearray()
        self._bodies = bodies

    def take(self) -> bytearray:
        """All of it, no longer held here."""
        content, self.content = self.content, bytearray()
        self._bodies.let_go(len(content))
        return content


def described_body(model: type[BaseModel]) -> dict[str, Any]:
    """A route's `openapi_extra`: that its body is this model, which /openapi.json describes."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def validated_body(request: Request, model: type[Model]) -> Model:
    """The request's JSON body as `model`. Raises ApiError for what is not that."""
    body: bytearray = request.scope[_BODY].take()
    if len(body) < _THREAD_BYTES:
        return parse_body(body, model)
    return await asyncio.to_thread(parse_body, body, model)


def parse_body(body: bytes | bytearray, model: type[Model]) -> Model:
    """A JSON text as `model`. Raises ApiError that names the field, and never quotes its value."""
    check_structure(body)
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", "invalid_json") from error
    except RecursionError as error:
        raise _too_deep() from error
    if not isinstance(value, dict):
        raise ApiError(400, "the body has to be a JSON object", "invalid_json")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _invalid(error, model) from error


def check_structure(body: bytes | bytearray) -> None:
    """Refuse JSON of too many levels or values, without making objects of it.

    Raises ApiError. Assumes nothing: in a text that is not JSON the count is of no meaning, and the
    parser refuses the text afterwards.
    """
    # What is escaped goes first: pairs of backslashes, then quotes that one stands before.
    text = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    codes = np.frombuffer(text, np.uint8)
    depth, values, quotes = 0, 0, 0
    for start in range(0, len(codes), _SCAN_BYTES):
        block = codes[start : start + _SCAN_BYTES]
        quoted = np.cumsum(block == ord('"'), dtype=np.int32) + quotes
        outside = quoted % 2 == 0
        opening = outside & ((block == ord("[")) | (block == ord("{")))
        closing = outside & ((block == ord("]")) | (block == ord("}")))
        levels = np.cumsum(opening.astype(np.int32) - closing, dtype=np.int32) + depth
        values += int(np.count_nonzero(opening) + np.count_nonzero(outside & (block == ord(","))))
        if levels.max() > MAX_DEPTH:
            raise _too_deep()
        if values > MAX_VALUES:
            raise ApiError(400, f"the body has more than {MAX_VALUES} values", "too_many_values")
        depth, quotes = int(levels[-1]), int(quoted[-1])


def _invalid(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """The first thing that is wrong, by its place."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    # Where a field may be of several types, each that it is not of is an error as well; what is
    # wrong with it as the type that it is says more.
    first = next((found for found in errors if not found["type"].endswith("_type")), errors[0])
    place = ""
    for part in first["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part in _field_names(model):
            place += f".{part}"
    param = place.removeprefix(".") or None
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, "invalid_value", param)


@cache
def _field_names(model: type[BaseModel]) -> frozenset[str]:
    """Every name that the model itself knows: others came from the client and are not repeated."""
    schema = model.model_json_schema()
    objects = [schema, *schema.get("$defs", {}).values()]
    return frozenset(name for found in objects for name in found.get("properties", ()))


def _content_length(scope: Scope) -> int:
    """What the request says; 0 where it says nothing."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)  # the parser lets through digits only
    return 0


def _too_large() -> ApiError:
    limit = MAX_BODY_BYTES >> 20
    return ApiError(
        413,
        f"the body is larger than {limit} MB",
        "body_too_large",
        headers={"Connection": "close"},
    )


def _too_deep() -> ApiError:
    return ApiError(400, f"the body is nested more than {MAX_DEPTH} levels deep", "too_deep")

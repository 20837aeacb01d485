"""The application: every API's routes behind one door.

Owns the order in which a request is checked, the one place where exceptions become responses, and
the access log, which holds no more of a request than its route.
"""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybridk2 import __version__
from hybridk2.errors import HybridK2Error
from hybridk2.server import anthropic, catalogue, completions, openai, operations, page, responses
from hybridk2.server.context import ServerContext
from hybridk2.server.errors import UNEXPECTED, ApiError, as_api_error
from hybridk2.server.limits import Bodies
from hybridk2.server.security import Gate

access_log = logging.getLogger("hybridk2.server.access")

_PROBES = ("/health", "/metrics")  # asked every few seconds, and of no interest in a log

# What needs a place among the replies.
_ANSWERING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})

# Each has `router(context) -> APIRouter`, and REQUESTS, the models of its bodies.
APIS: tuple[Any, ...] = (openai, completions, responses, anthropic, catalogue, operations, page)


def create_app(context: ServerContext, gate: Gate) -> ASGIApp:
    """The ASGI application of a server."""
    app = FastAPI(
        title="HybridK2",
        version=__version__,
        docs_url=None,  # its scripts come from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    routers = [api.router(context) for api in APIS]
    for router in routers:
        app.include_router(router)
    for kind in (ApiError, HybridK2Error, HTTPException, MemoryError):
        app.add_exception_handler(kind, _refuse)
    app.add_exception_handler(Exception, _refuse_unexpected)
    description = _description(app)  # now: later it would hold up streams
    app.openapi = lambda: description  # type: ignore[method-assign]  # as FastAPI documents
    paths = {getattr(route, "path", "") for router in routers for route in router.routes}
    guarded: ASGIApp = Door(app, context, gate, frozenset(paths))
    if context.settings.cors_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=context.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return guarded


def _description(app: FastAPI) -> dict[str, Any]:
    """/openapi.json, with the bodies that routes read themselves."""
    models = [model for api in APIS for model in api.REQUESTS]
    _, schemas = models_json_schema(
        [(model, "validation") for model in models],
        ref_template="#/components/schemas/{model}",
    )
    description = get_openapi(title=app.title, version=app.version, routes=app.routes)
    description.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    return description


async def _refuse(request: Request, error: Exception) -> Response:
    return as_api_error(error).response(request.url.path)


async def _refuse_unexpected(request: Request, error: Exception) -> Response:
    """Starlette raises it on, so that the door sees and logs it."""
    return UNEXPECTED.response(request.url.path)


class Door:
    """What every request passes: the gate, the body's limits, the count and the log."""

    def __init__(
        self, app: ASGIApp, context: ServerContext, gate: Gate, paths: frozenset[str]
    ) -> None:
        """paths: those that a log may name; any other is the client's own words."""
        self._app = app
        self._paths = paths
        self._context = context
        self._gate = gate
        self._bodies = Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. Whatever is raised has become a response before it gets out of here."""
        assert scope["type"] == "http", "the listener speaks HTTP only"
        started = time.monotonic()
        status = 0

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._context.open_request() if scope["method"] == "POST" else nullcontext():
            try:
                self._gate.check(scope)
                if scope["method"] == "POST":
                    if scope["path"] in _ANSWERING:
                        self._context.refuse_without_place()
                    await self._bodies.receive(scope, receive)
                await self._app(scope, receive, noting_send)
            except Exception as error:  # noqa: BLE001 - becomes the response, if none was begun
                refusal = as_api_error(error)
                if not status:
                    await refusal.response(scope["path"])(scope, receive, noting_send)
            finally:
                self._bodies.release(scope)
        self._log(scope, status, time.monotonic() - started)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        refused_at = scope["path"] if scope["path"] in self._paths else "(none)"
        route = str(getattr(scope.get("route"), "path", refused_at))
        self._context.metrics.count_response(route, status)
        figures: dict[str, Any] = {
            "method": scope["method"] if scope["method"] in ("GET", "POST") else "other",
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 1),
        }
        level = logging.DEBUG if route in _PROBES else logging.INFO
        access_log.log(level, "%(method)s %(route)s %(status)d %(ms).1f ms", figures)

"""What operates a server rather than asks its model: health, metrics, version."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from hybridk2 import __version__
from hybridk2.server.context import ServerContext
from hybridk2.server.openai import json_response

REQUESTS = ()


def router(context: ServerContext) -> APIRouter:
    """The endpoints of operation."""
    routes = APIRouter()

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health")
    async def health() -> Response:
        """200 while requests are answered, 503 while loading, draining or broken."""
        body = context.health()
        return json_response(body, 200 if body["status"] == "ok" else 503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Figures in Prometheus' text format."""
        return Response(context.metrics.exposition(), media_type="text/plain; version=0.0.4")

    @routes.get("/version")
    async def version() -> dict[str, str]:
        """The version of this server."""
        return {"version": __version__}

    return routes

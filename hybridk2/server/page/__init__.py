"""The chat page: static files, served without a key, that ask the API for everything else.

The policy lets the page run its own script and speak to its own server, and nothing more; with
trusted types required and none allowed, no script can turn text into markup.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.responses import Response

from hybridk2.server.context import ServerContext

REQUESTS = ()

_FILES = {
    "/": ("chat.html", "text/html; charset=utf-8"),
    "/chat.css": ("chat.css", "text/css; charset=utf-8"),
    "/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def router(context: ServerContext) -> APIRouter:
    """The page and its two files."""
    routes = APIRouter()
    for path, (name, media_type) in _FILES.items():
        _serve(routes, path, name, media_type)
    return routes


def _serve(routes: APIRouter, path: str, name: str, media_type: str) -> None:
    content = files(__package__).joinpath(name).read_bytes()
    headers = {**_HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    @routes.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
    async def page_file(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

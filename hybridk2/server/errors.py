"""Refusals as HTTP: every exception becomes one ApiError, and that the body its API expects.

Owns statuses, codes and the two body shapes, OpenAI's and Anthropic's. A message never repeats what
the client sent: it may be private, or huge.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.responses import Response

from hybridk2.errors import (
    ChatError,
    ContextLengthError,
    DeadlineError,
    EngineError,
    HybridK2Error,
    OutOfMemoryError,
    QueueFullError,
    ReplyError,
    RequestError,
)
from hybridk2.server.worker import NotReadyError

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER_SECONDS = 120

_ANTHROPIC_PATH = "/v1/messages"

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}

# The field that a message of the chat template or of sampling begins with: `messages[0].role: ...`.
_FIELD = re.compile(r"((?:[a-z_]+)(?:\[\d+\]|\.[a-z_]+)*)(?: \([\w.-]+\))?: ")


class ApiError(Exception):
    """What a client is told when its request is not answered."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after_seconds: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """param: the field that is at fault. retry_after_seconds: when to come again."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        if retry_after_seconds is not None:
            bounded = min(max(retry_after_seconds, 1), MAX_RETRY_AFTER_SECONDS)
            self.headers["Retry-After"] = str(bounded)

    def openai_body(self) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`, as OpenAI's libraries read it."""
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _OPENAI_TYPES.get(self.status, fallback),
                "param": self.param,
                "code": self.code,
            }
        }

    def anthropic_body(self) -> dict[str, Any]:
        """`{"type": "error", "error": {type, message}}`, as Anthropic's libraries read it."""
        fallback = "api_error" if self.status >= 500 else "invalid_request_error"
        kind = _ANTHROPIC_TYPES.get(self.status, fallback)
        where = f"{self.param}: " if self.param and not self.message.startswith(self.param) else ""
        return {"type": "error", "error": {"type": kind, "message": where + self.message}}

    def response(self, path: str) -> Response:
        """The whole response, in the shape of the API that the path belongs to."""
        anthropic = path == _ANTHROPIC_PATH or path.startswith(f"{_ANTHROPIC_PATH}/")
        body = self.anthropic_body() if anthropic else self.openai_body()
        return Response(to_json(body), self.status, self.headers, media_type="application/json")


UNEXPECTED = ApiError(500, "the server failed at this request; see its log", "internal_error")


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of this exception. What nobody expected is logged, with its traceback.

    The engine's own text goes out only where it is about the request; other failures may quote
    paths and weights.
    """
    match error:
        case ApiError():
            return error
        case HTTPException():
            return _of_routing(error)
        case QueueFullError():
            return ApiError(503, str(error), "queue_full", retry_after_seconds=1)
        case NotReadyError():
            return ApiError(503, str(error), "model_unavailable", retry_after_seconds=10)
        case ContextLengthError():
            return ApiError(400, str(error), "context_length_exceeded")
        case ChatError() | RequestError():
            field = _FIELD.match(str(error))
            return ApiError(400, str(error), "invalid_value", field.group(1) if field else None)
        case OutOfMemoryError() | MemoryError():
            message = "out of memory while answering; the server goes on, come again later"
            return ApiError(503, message, "out_of_memory", retry_after_seconds=10)
        case DeadlineError():
            return ApiError(504, str(error), "deadline_exceeded")
        case ReplyError():
            return ApiError(500, str(error), "invalid_output")
        case EngineError():
            logger.error("a request failed in the engine", exc_info=error)
            return ApiError(500, "the engine failed at this request; see its log", "engine_error")
        case HybridK2Error():
            logger.error("a request failed", exc_info=error)
            return ApiError(500, "the server failed at this request; see its log", "server_error")
    logger.error("a request failed unexpectedly", exc_info=error)
    return UNEXPECTED


def _of_routing(error: HTTPException) -> ApiError:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return ApiError(404, "there is no such path here", "not_found", headers=headers)
    if error.status_code == 405:
        allowed = headers.get("allow") or headers.get("Allow", "")
        message = f"this path does not take that method; expected {allowed}"
        return ApiError(405, message, "method_not_allowed", headers=headers)
    return ApiError(error.status_code, "the request was refused", headers=headers)

"""OpenAI's Responses API, as Codex speaks it, over the same engine."""

from hybridk2.server.responses.routes import REQUESTS, router

__all__ = ["REQUESTS", "router"]

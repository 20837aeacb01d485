"""Anthropic's Messages API, as Claude Code speaks it, over the same engine."""

from hybridk2.server.anthropic.routes import REQUESTS, router

__all__ = ["REQUESTS", "router"]

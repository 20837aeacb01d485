"""Anthropic's Messages API, as Claude Code speaks it, over the same engine."""

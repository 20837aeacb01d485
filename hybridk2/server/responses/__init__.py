"""OpenAI's Responses API, as Codex speaks it, over the same engine."""

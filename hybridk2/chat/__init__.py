"""K2's chat format: messages to token ids (template), token ids to events (parser, generation)."""

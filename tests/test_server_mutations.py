"""Whatever the body of a Messages or Responses request is, it is a conversation or a refusal."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from hybridk2.chat.template import render_text
from hybridk2.errors import ChatError
from hybridk2.server.anthropic import request as messages
from hybridk2.server.errors import ApiError
from hybridk2.server.limits import parse_body
from hybridk2.server.responses import request as responses
from hybridk2.server.responses.reply import ResponseEvents

MESSAGES_BODY = {
    "model": "k2",
    "max_tokens": 5,
    "system": [{"type": "text", "text": "x-anthropic-billing-header: a\nb"}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "", "signature": "hybridk2:aGk="},
                {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t",
                    "content": [{"type": "text", "text": "r"}],
                    "is_error": True,
                }
            ],
        },
    ],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "tool", "name": "f"},
    "thinking": {"type": "enabled", "budget_tokens": 5},
    "output_config": {"format": {"type": "json_schema", "schema": {}}},
    "stop_sequences": ["a"],
}
RESPONSES_BODY = {
    "model": "k2",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
        {
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": "s"}],
            "content": None,
            "encrypted_content": "hybridk2:aGk=",
        },
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {
            "type": "function_call_output",
            "call_id": "c",
            "output": [{"type": "input_text", "text": "x"}],
        },
    ],
    "instructions": "i",
    "tools": [{"type": "function", "name": "f", "parameters": {}}, {"type": "web_search"}],
    "tool_choice": {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": "f"}],
    },
    "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
    "include": ["reasoning.encrypted_content"],
    "metadata": {"a": "b"},
}
SCALARS = [None, True, 0, -1, 1.5, 2**70, "", "x", "function", "\x00", "hybridk2:%"]
JUNK = [*SCALARS, [], {}, [None], [{}], ["f"], {"type": "text"}, {"type": ["a"]}, {"name": {}}]
KEYS = ["type", "role", "content", "name", "id", "text"]


def mutated(value: Any, chance: random.Random) -> Any:
    """`value` with some of its parts replaced, left out or added to."""
    if chance.random() < 0.02:
        return chance.choice(JUNK)
    if isinstance(value, dict):
        kept = {key: mutated(part, chance) for key, part in value.items() if chance.random() > 0.01}
        return kept | ({chance.choice(KEYS): chance.choice(JUNK)} if chance.random() < 0.01 else {})
    if isinstance(value, list):
        kept_parts = [mutated(part, chance) for part in value if chance.random() > 0.01]
        return kept_parts + ([chance.choice(JUNK)] if chance.random() < 0.02 else [])
    return value


@pytest.mark.parametrize("api", ["messages", "responses"])
def test_every_mutated_body_is_a_conversation_or_a_refusal(api: str) -> None:
    chance = random.Random(20261125)
    outcomes = {"conversation": 0, "refusal": 0}
    for _ in range(4000):
        original = MESSAGES_BODY if api == "messages" else RESPONSES_BODY
        body = json.dumps(mutated(original, chance)).encode()
        try:
            if api == "messages":
                asked = messages.read_conversation(parse_body(body, messages.MessagesRequest))
            else:
                request = parse_body(body, responses.ResponsesRequest)
                asked = responses.read_conversation(request)
                ResponseEvents(request, "k2").start()
            render_text(asked.messages, asked.tools)
        except (ApiError, ChatError):
            outcomes["refusal"] += 1
        else:
            outcomes["conversation"] += 1
    # Both have to be common, or the mutations test nothing.
    assert min(outcomes.values()) > 100, outcomes

"""Which models there are, and what text is in tokens."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hybridk2.chat.template import render
from hybridk2.server.context import ServerContext
from hybridk2.server.errors import ApiError
from hybridk2.server.limits import described_body, validated_body
from hybridk2.server.openai import json_response
from hybridk2.server.protocol import DetokenizeRequest, TokenizeRequest, as_written

REQUESTS = (TokenizeRequest, DetokenizeRequest)


def router(context: ServerContext) -> APIRouter:
    """The endpoints of models and tokens."""
    routes = APIRouter()

    def described(name: str) -> dict[str, Any]:
        context_tokens = context.assistant.context_tokens
        return {
            "id": name,
            "object": "model",
            "created": context.created,
            "owned_by": "hybridk2",
            # Three names under which clients look for the same number.
            "context_length": context_tokens,
            "context_window": context_tokens,
            "max_model_len": context_tokens,
        }

    @routes.get("/v1/models")
    async def models() -> Response:
        """The models that are served: one, under each of its names."""
        names = context.settings.model_names
        return json_response({"object": "list", "data": list(map(described, names))})

    @routes.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        """One model."""
        context.check_model(model)
        return json_response(described(model))

    @routes.post("/tokenize", openapi_extra=described_body(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """The token ids of a text, or of the prompt that a conversation becomes."""
        body = await validated_body(request, TokenizeRequest)
        context.refuse_unless_ready()
        return await context.worker.in_thread(lambda: _tokenized(context, body))

    @routes.post("/detokenize", openapi_extra=described_body(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        body = await validated_body(request, DetokenizeRequest)
        tokenizer = context.tokenizer
        if body.tokens and max(body.tokens) >= tokenizer.vocab_size:
            message = f"tokens: expected ids below {tokenizer.vocab_size}"
            raise ApiError(400, message, "invalid_value", "tokens")
        text = await context.worker.in_thread(lambda: tokenizer.decode(body.tokens))
        return json_response({"prompt": text})

    return routes


def _tokenized(context: ServerContext, body: TokenizeRequest) -> Response:
    tokenizer = context.tokenizer
    if body.prompt is not None:
        ids = tokenizer.encode(body.prompt)
    else:
        assert body.messages is not None, "validated: one of the two is there"
        tools = as_written(body.tools)
        ids = render(body.messages, tools, tokenizer, body.add_generation_prompt)
    limit = context.assistant.context_tokens
    return json_response({"count": len(ids), "max_model_len": limit, "tokens": ids})

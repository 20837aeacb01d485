"""What a Responses request says: its body, checked, and the conversation that it means.

Owns this API's side of the translation on the way in: instructions, input items, tools and text
format to the OpenAI chat-style messages and tools that chat.template renders. Knows nothing of HTTP
and nothing of replies.

This server stores no responses, so `store` is ignored and whatever refers to a stored one is
refused. Tools of types other than function run on OpenAI's servers or in a client that has its own
model for them; the model is not told of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from hybridk2.errors import ChatError
from hybridk2.server.carried_reasoning import carried
from hybridk2.server.conversation import AssistantTurn, Conversation, check_names
from hybridk2.server.protocol import MAX_TOOLS, Count, Name, StrictBody

Item = dict[str, Any]

ENCRYPTED_REASONING = "reasoning.encrypted_content"
_LOGPROBS = "message.output_text.logprobs"

_TEXT_PARTS = ("input_text", "output_text", "text")
_OTHER_MEDIA = ("input_image", "input_file", "input_audio", "computer_screenshot")


class FunctionTool(StrictBody):
    """A function that the model may call."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OtherTool(StrictBody):
    """A tool that the model is not told of."""

    type: str


def _tool_kind(tool: Any) -> str:
    return "function" if isinstance(tool, dict) and tool.get("type") == "function" else "other"


Tool = Annotated[
    Annotated[FunctionTool, Tag("function")] | Annotated[OtherTool, Tag("other")],
    Discriminator(_tool_kind),
]


class TextFormat(StrictBody):
    """The form of the text. name and schema: for json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name = "output"
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(StrictBody):
    """What is asked of the text."""

    format: TextFormat | None = None


class ResponsesRequest(StrictBody):
    """The body of POST /v1/responses."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    input: str | list[Item]
    instructions: str | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None


def read_conversation(request: ResponsesRequest) -> Conversation:
    """The conversation that a request means. Raises ChatError, which names the field."""
    _refuse_what_is_not_here(request)
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
    else:
        messages.extend(_InputReader().read(request.input))
    tools = _read_tools(request.tools or [])
    return Conversation(
        messages=messages,
        tools=tools or None,
        tool_choice=_read_tool_choice(request.tool_choice, tools),
        parallel_tool_calls=request.parallel_tool_calls is not False,
        response_format=_read_format(request.text.format if request.text is not None else None),
    )


def _refuse_what_is_not_here(request: ResponsesRequest) -> None:
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(request, name) is not None:
            raise ChatError(
                f"{name}: this server stores no responses, conversations or prompts. Send the "
                "whole conversation as input items instead."
            )
    if request.background:
        raise ChatError(
            "background: this server stores no responses, so nothing could be fetched later. Send "
            "the request without it, and with stream if it may take long."
        )
    if request.top_logprobs or _LOGPROBS in (request.include or ()):
        raise ChatError(
            "top_logprobs: this interface reports no log-probabilities here. /v1/chat/completions "
            "does."
        )


class _InputReader:
    """Reads a list of input items, once.

    Reasoning, text and calls that stand side by side as items are one message of K2's.
    """

    def __init__(self) -> None:
        self._turn: AssistantTurn | None = None
        self._tool_names: dict[str, str] = {}

    def read(self, items: list[Item]) -> Iterator[dict[str, Any]]:
        for index, item in enumerate(items):
            yield from self._read_item(item, f"input[{index}]")
        yield from self._end_turn()

    def _read_item(self, item: Item, where: str) -> Iterator[dict[str, Any]]:
        match item.get("type", "message"):
            case "message":
                yield from self._read_message(item, where)
            case "reasoning":
                yield from self._begin_after_calls()
                self._assistant().reasoning.append(_reasoning_text(item, where))
            case "function_call":
                call_id, name = _string(item, "call_id", where), _string(item, "name", where)
                self._tool_names[call_id] = name
                self._assistant().call(call_id, name, _string(item, "arguments", where))
            case "function_call_output":
                yield from self._end_turn()
                yield self._read_result(item, where)
            case "item_reference":
                raise ChatError(
                    f"{where}: this server stores no items that could be referred to. Send the "
                    "item itself."
                )
            case _:
                raise ChatError(
                    f"{where}.type: expected message, reasoning, function_call or "
                    "function_call_output; this server has no other items."
                )

    def _read_message(self, item: Item, where: str) -> Iterator[dict[str, Any]]:
        role = item.get("role")
        text = _parts_text(item.get("content"), f"{where}.content")
        if role == "assistant":
            yield from self._begin_after_calls()
            self._assistant().texts.append(text)
            return
        if role not in ("user", "system", "developer"):
            raise ChatError(f"{where}.role: expected user, assistant, system or developer.")
        yield from self._end_turn()
        yield {"role": role, "content": text}

    def _read_result(self, item: Item, where: str) -> dict[str, Any]:
        call_id = _string(item, "call_id", where)
        if call_id not in self._tool_names:
            raise ChatError(
                f"{where}.call_id: no function_call before it has this id. Send the function_call "
                "items back together with their outputs."
            )
        return {
            "role": "tool",
            "tool_call_id": call_id,
            "name": self._tool_names[call_id],
            "content": _parts_text(item.get("output"), f"{where}.output"),
        }

    def _assistant(self) -> AssistantTurn:
        if self._turn is None:
            self._turn = AssistantTurn()
        return self._turn

    def _begin_after_calls(self) -> Iterator[dict[str, Any]]:
        """A message of K2's ends with its tool calls: what follows them begins the next one."""
        if self._turn is not None and self._turn.tool_calls:
            yield from self._end_turn()

    def _end_turn(self) -> Iterator[dict[str, Any]]:
        turn, self._turn = self._turn, None
        if turn is not None:
            yield turn.message


def _reasoning_text(item: Item, where: str) -> str:
    """The reasoning itself; a summary, which is something else, only if there is nothing better."""
    for key in ("content", "summary"):
        parts = item.get(key) or []
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise ChatError(f"{where}.{key}: expected a list of text parts.")
        text = "".join(_string(part, "text", f"{where}.{key}[{i}]") for i, part in enumerate(parts))
        if key == "content" and not text and item.get("encrypted_content") is not None:
            text = carried(_string(item, "encrypted_content", where))
        if text:
            return text
    return ""


def _parts_text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ChatError(f"{where}: expected text or a list of text parts.")
    texts = []
    for index, part in enumerate(content):
        here = f"{where}[{index}]"
        if part.get("type") in _OTHER_MEDIA:
            raise ChatError(
                f"{here}.type: Kimi-K2-Thinking reads text only, no images, audio or files. Send "
                "what they say as text."
            )
        if part.get("type") == "refusal":
            texts.append(_string(part, "refusal", here))
        elif part.get("type") in _TEXT_PARTS:
            texts.append(_string(part, "text", here))
        else:
            raise ChatError(f"{here}.type: expected one of {', '.join(_TEXT_PARTS)}.")
    return "".join(texts)


def _string(item: Item, key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise ChatError(f"{where}.{key}: expected text.")
    return value


def _read_tools(declared: Sequence[FunctionTool | OtherTool]) -> list[dict[str, Any]]:
    tools = []
    for tool in declared:
        if isinstance(tool, OtherTool):
            continue
        function = tool.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        if tool.strict:
            function["strict"] = True
        tools.append({"type": "function", "function": function})
    check_names(tools)
    return tools


def _read_tool_choice(
    choice: str | dict[str, Any] | None, tools: list[dict[str, Any]]
) -> str | dict[str, Any]:
    """In chat completions' terms. Raises ChatError for what the declared functions cannot fulfil.

    All tools are rendered whatever the choice is, so that prompts keep their prefix.
    """
    names = [tool["function"]["name"] for tool in tools]
    match choice:
        case None | "auto" | "none":
            return choice or "auto"
        case "required" if names:
            return choice
        case {"type": "function", "name": str(name)} if name in names:
            return _function(name)
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": list(listed)}:
            allowed = [
                _function(name) for name in names if {"type": "function", "name": name} in listed
            ]
            if not allowed and mode == "auto":
                return "none"
            if allowed:
                return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}}
    raise ChatError(
        'tool_choice: expected "auto", "none", "required", a declared function as '
        '{"type": "function", "name": ...} or {"type": "allowed_tools", ...}; what it asks for '
        "must be declared in tools, with type function."
    )


def _function(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _read_format(text_format: TextFormat | None) -> dict[str, Any] | None:
    if text_format is None or text_format.type == "text":
        return None
    if text_format.type == "json_object":
        return {"type": "json_object"}
    if text_format.schema_ is None:
        raise ChatError("text.format.schema: expected a JSON schema, found nothing.")
    return {
        "type": "json_schema",
        "json_schema": {
            "name": text_format.name,
            "schema": text_format.schema_,
            "strict": text_format.strict,
        },
    }

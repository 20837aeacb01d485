"""What a Messages request says: its body, checked, and the conversation that it means.

Owns Anthropic's side of the translation on the way in: system prompts, content blocks, tools and
tool_choice to the OpenAI-style messages and tools that chat.template renders. Knows nothing of HTTP
and nothing of replies.

Left out because they must not change the prompt, or mean nothing to one local model: cache_control,
citations, metadata, service tiers, and tools of types that only Anthropic's own servers can run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from hybridk2.errors import ChatError
from hybridk2.server.carried_reasoning import carried
from hybridk2.server.conversation import AssistantTurn, Conversation, check_names
from hybridk2.server.protocol import MAX_STOPS, MAX_TOOLS, Count, Name, StopString, StrictBody

Block = dict[str, Any]

# Claude Code begins its system prompt with a line that differs in every request. It says nothing to
# a model, and with it no request would share its prefix with the one before.
_CHANGING_LINE = "x-anthropic-billing-header:"


class TextBlock(StrictBody):
    """A block of a system prompt."""

    type: Literal["text"]
    text: str


class InputMessage(StrictBody):
    """One message. Blocks are checked when they are translated."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class CustomTool(StrictBody):
    """A tool of the client's."""

    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ServerTool(StrictBody):
    """A tool that only Anthropic's servers can run."""

    type: str


def _tool_kind(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else None
    return "custom" if kind in (None, "custom") else "server"


Tool = Annotated[
    Annotated[CustomTool, Tag("custom")] | Annotated[ServerTool, Tag("server")],
    Discriminator(_tool_kind),
]


class ToolChoice(StrictBody):
    """Whether and which tools must be called. name: for type tool only."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(StrictBody):
    """Whether thinking is shown. K2-Thinking always thinks; "disabled" leaves it out of replies.

    display "omitted": the blocks come without their text, which their signature carries.
    """

    type: str
    display: str | None = None


class OutputFormat(StrictBody):
    """The form of the text: JSON under a schema."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(StrictBody):
    """What else is asked of the output."""

    format: OutputFormat | None = None


class CountTokensRequest(StrictBody):
    """What makes the prompt: all that /v1/messages/count_tokens looks at."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest):
    """The body of POST /v1/messages."""

    max_tokens: Count
    temperature: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None

    @model_validator(mode="after")
    def _leaves_the_reply_to_the_model(self) -> MessagesRequest:
        if self.messages[-1].role == "assistant":
            raise ValueError(
                "messages: the last one is the assistant's, but a reply cannot be begun for this "
                "model (prefill); end with a user message"
            )
        return self


def read_conversation(request: CountTokensRequest) -> Conversation:
    """The conversation that a request means. Raises ChatError, which names the field.

    Consecutive assistant messages are one turn, as Anthropic defines it; K2's template would else
    take the first for a finished answer and drop the reasoning of the run. Everything else stays in
    its place.
    """
    messages: list[dict[str, Any]] = []
    system = request.system or []
    texts = [system] if isinstance(system, str) else [block.text for block in system]
    system_text = "\n\n".join(text for text in map(_without_changing_line, texts) if text)
    if system_text:
        messages.append({"role": "system", "content": system_text})
    messages.extend(_read_messages(request.messages))
    tools = _read_tools(request.tools or [])
    choice = request.tool_choice or ToolChoice(type="auto")
    output_format = request.output_config.format if request.output_config is not None else None
    return Conversation(
        messages=messages,
        tools=tools or None,
        tool_choice=_read_tool_choice(choice, tools),
        parallel_tool_calls=not choice.disable_parallel_tool_use,
        response_format=_read_format(output_format),
    )


def _read_messages(input_messages: Sequence[InputMessage]) -> Iterator[dict[str, Any]]:
    tool_names: dict[str, str] = {}
    turn = AssistantTurn()
    for index, message in enumerate(input_messages):
        where = f"messages[{index}].content"
        blocks = _blocks(message.content)
        if message.role == "assistant":
            _read_assistant(blocks, where, turn, tool_names)
            is_last = index + 1 == len(input_messages)
            if is_last or input_messages[index + 1].role != "assistant":
                yield turn.message
                turn = AssistantTurn()
        elif message.role == "system":
            texts = (_without_changing_line(_text(b, f"{where}[{i}]")) for i, b in blocks)
            yield {"role": "system", "content": "".join(texts)}
        else:
            yield from _read_user(blocks, where, tool_names)


def _without_changing_line(text: str) -> str:
    if not text.startswith(_CHANGING_LINE):
        return text
    return text.partition("\n")[2]


def _blocks(content: str | list[Block]) -> list[tuple[int, Block]]:
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return list(enumerate(blocks))


def _read_assistant(
    blocks: list[tuple[int, Block]], where: str, turn: AssistantTurn, tool_names: dict[str, str]
) -> None:
    """Add an assistant message to a turn; tool_names learns which tool each id calls."""
    for index, block in blocks:
        here = f"{where}[{index}]"
        match block.get("type"):
            case "text":
                turn.texts.append(_text(block, here))
            case "thinking":
                thinking = _string(block, "thinking", here)
                turn.reasoning.append(thinking or carried(_string(block, "signature", here)))
            case "redacted_thinking":
                pass  # another model's thoughts, which nobody can read
            case "tool_use":
                call_id, name = _string(block, "id", here), _string(block, "name", here)
                tool_names[call_id] = name
                turn.call(call_id, name, block.get("input"))
            case other:
                raise _unreadable(other, here)


def _read_user(
    blocks: list[tuple[int, Block]], where: str, tool_names: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """A user message is any number of tool results and of texts, each in its place."""
    texts: list[str] = []
    for index, block in blocks:
        here = f"{where}[{index}]"
        if block.get("type") != "tool_result":
            texts.append(_text(block, here))
            continue
        if texts:
            yield {"role": "user", "content": "".join(texts)}
            texts = []
        call_id = _string(block, "tool_use_id", here)
        if call_id not in tool_names:
            raise ChatError(
                f"{here}.tool_use_id: no tool_use block before it has this id. Send the "
                "assistant's tool_use blocks back together with their results."
            )
        yield {
            "role": "tool",
            "tool_call_id": call_id,
            "name": tool_names[call_id],
            "content": _result_text(block, here),
        }
    if texts or not blocks:
        yield {"role": "user", "content": "".join(texts)}


def _result_text(block: Block, where: str) -> str:
    """K2's format has no mark for a failed tool, so the text says it."""
    content = block.get("content")
    if content is None:
        content = ""
    if not isinstance(content, str | list):
        raise ChatError(f"{where}.content: expected text or a list of text blocks.")
    if isinstance(content, list) and not all(isinstance(part, dict) for part in content):
        raise ChatError(f"{where}.content: expected text blocks, found something else.")
    text = "".join(_text(part, f"{where}.content[{i}]") for i, part in _blocks(content))
    if block.get("is_error") is True and not text.startswith("Error"):
        return f"Error: {text}"
    return text


def _text(block: Block, where: str) -> str:
    if block.get("type") != "text":
        raise _unreadable(block.get("type"), where)
    return _string(block, "text", where)


def _string(block: Block, key: str, where: str) -> str:
    value = block.get(key)
    if not isinstance(value, str):
        raise ChatError(f"{where}.{key}: expected text.")
    return value


def _unreadable(block_type: Any, where: str) -> ChatError:
    if block_type in ("image", "document"):
        return ChatError(
            f"{where}: Kimi-K2-Thinking reads text only, no images and no documents. Send what "
            "they say as a text block."
        )
    return ChatError(
        f"{where}.type: expected text, thinking, tool_use or tool_result, where each belongs; this "
        "server knows no other block here."
    )


def _read_tools(declared: Sequence[CustomTool | ServerTool]) -> list[dict[str, Any]]:
    tools = []
    for tool in declared:
        if isinstance(tool, ServerTool):
            continue
        function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
        if tool.description is not None:
            function["description"] = tool.description
        if tool.strict:
            function["strict"] = True
        tools.append({"type": "function", "function": function})
    check_names(tools)
    return tools


def _read_tool_choice(choice: ToolChoice, tools: list[dict[str, Any]]) -> str | dict[str, Any]:
    """In OpenAI's terms. Raises ChatError for a choice that the tools cannot fulfil."""
    names = {tool["function"]["name"] for tool in tools}
    match choice.type:
        case "any" if names:
            return "required"
        case "tool" if choice.name in names:
            return {"type": "function", "function": {"name": choice.name}}
        case "any" | "tool":
            raise ChatError(
                "tool_choice: it asks for a tool that is not declared. Declare it in tools, with "
                "an input_schema; tools that run on Anthropic's servers do not exist here."
            )
        case other:
            return other


def _read_format(output_format: OutputFormat | None) -> dict[str, Any] | None:
    if output_format is None:
        return None
    json_schema = {"name": "output", "schema": output_format.schema_}
    return {"type": "json_schema", "json_schema": json_schema}

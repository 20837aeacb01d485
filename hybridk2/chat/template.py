"""Messages and tool declarations to the prompt of Kimi-K2-Thinking.

Owns the published chat template, written out by hand, and what must be put right in a conversation
before it is rendered (tool ids, empty contents, absent reasoning). Does not know where messages
come from, nor what the model does with the prompt.

Control tokens are placed as ids; every text that a person, a tool or a model wrote is encoded with
control tokens disabled. So no content, name, id or argument can end a message or open another.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybridk2.errors import ChatError
from hybridk2.tokenizer import CONTROL_TOKEN_NAMES, Tokenizer

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

DEFAULT_SYSTEM_PROMPT = "You are Kimi, an AI assistant created by Moonshot AI."

# Role in a message -> role in the prompt. Whatever is neither user nor assistant is rendered under
# the system token, with its own name in the header.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_HEADERS = {"user": "im_user", "assistant": "im_assistant"}


@dataclass(frozen=True, slots=True)
class _Control:
    """A control token, by its field in ControlTokens."""

    field: str


@dataclass(frozen=True, slots=True)
class _ToolCall:
    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class _Turn:
    """One message, checked and normalised."""

    role: str
    name: str
    content: str
    reasoning: str = ""
    tool_calls: list[_ToolCall] = field(default_factory=list)
    tool_call_id: str = ""


def render(
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    tokenizer: Tokenizer,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The prompt of a conversation, as token ids.

    messages: OpenAI-style (role, content, name, reasoning_content or reasoning, tool_calls,
    tool_call_id). tools: OpenAI-style function declarations. Raises ChatError, which names the
    field, for anything that is not that.
    """
    ids: list[int] = []
    for piece in _pieces(messages, tools, add_generation_prompt):
        if isinstance(piece, _Control):
            ids.append(getattr(tokenizer.control, piece.field))
        else:
            ids.extend(tokenizer.encode(piece))
    return ids


def render_text(
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The same prompt as text, to be read by people.

    Not to be encoded again: in it a control token and its name typed by a user look the same.
    """
    return "".join(
        CONTROL_TOKEN_NAMES[piece.field] if isinstance(piece, _Control) else piece
        for piece in _pieces(messages, tools, add_generation_prompt)
    )


def count_tool_calls(messages: Sequence[Message]) -> int:
    """How many tool calls the conversation holds: the number of the next one."""
    return sum(len(turn.tool_calls) for turn in _read_messages(messages))


def _pieces(
    messages: Sequence[Message], tools: Sequence[Tool] | None, add_generation_prompt: bool
) -> Iterator[_Control | str]:
    """The prompt as control tokens and the texts between them.

    A text is never cut in two: BPE merges across everything but a control token.
    """
    turns = _read_messages(messages)
    declarations = _tools_json(tools)
    if declarations:
        yield from _message("im_system", "tool_declare", declarations)
    if not turns or turns[0].role != "system":
        yield from _message("im_system", "system", DEFAULT_SYSTEM_PROMPT)
    last_answer = max(
        (i for i, turn in enumerate(turns) if turn.role == "assistant" and not turn.tool_calls),
        default=-1,
    )
    for index, turn in enumerate(turns):
        header = _HEADERS.get(turn.role, "im_system")
        if turn.role == "assistant":
            # Reasoning survives only in the tool-calling run that is not answered yet.
            yield from _assistant_message(turn, turn.reasoning if index > last_answer else "")
        elif turn.role == "tool":
            text = f"## Return of {turn.tool_call_id}\n{turn.content}"
            yield from _message(header, turn.name, text)
        else:
            yield from _message(header, turn.name, turn.content)
    if add_generation_prompt:
        yield _Control("im_assistant")
        yield "assistant"
        yield _Control("im_middle")


def _message(header: str, name: str, text: str) -> Iterator[_Control | str]:
    yield _Control(header)
    yield name
    yield _Control("im_middle")
    yield text
    yield _Control("im_end")


def _assistant_message(turn: _Turn, reasoning: str) -> Iterator[_Control | str]:
    yield _Control("im_assistant")
    yield turn.name
    yield _Control("im_middle")
    yield _Control("think")
    yield reasoning
    yield _Control("end_think")
    yield turn.content
    if turn.tool_calls:
        yield _Control("tool_calls_section_begin")
        for call in turn.tool_calls:
            yield _Control("tool_call_begin")
            yield call.id
            yield _Control("tool_call_argument_begin")
            yield call.arguments
            yield _Control("tool_call_end")
        yield _Control("tool_calls_section_end")
    yield _Control("im_end")


def _tools_json(tools: Sequence[Tool] | None) -> str:
    """The declarations as the model was trained to read them: compact, all keys sorted."""
    if tools is None:
        return ""
    for index, tool in enumerate(_list(tools, "tools")):
        where = f"tools[{index}]"
        declaration = _mapping(tool, where)
        if declaration.get("type", "function") != "function":
            raise ChatError(f'{where}.type: expected "function"; there are no other tools.')
        function = _mapping(declaration.get("function"), f"{where}.function")
        _non_empty_string(function.get("name"), f"{where}.function.name")
        if function.get("parameters") is not None:
            _mapping(function["parameters"], f"{where}.function.parameters")
    if not tools:
        return ""
    return _json(list(tools), "tools", separators=(",", ":"), sort_keys=True)


def _read_messages(messages: Sequence[Message]) -> list[_Turn]:
    """Check every message and give every tool call its place in the conversation.

    A call becomes `functions.{name}:{n}`, n counting over the whole conversation, and so does the
    result that belongs to it: the model imitates whatever form it sees, and only this one is
    certain to be read back as a call.
    """
    turns: list[_Turn] = []
    num_calls = 0
    new_ids: dict[str, list[str]] = {}
    for index, raw in enumerate(_list(messages, "messages")):
        where = f"messages[{index}]"
        turn, original_ids = _read_message(_mapping(raw, where), where)
        ids_of_this_message: dict[str, list[str]] = {}
        for position, call in enumerate(turn.tool_calls):
            new_id = f"functions.{call.name}:{num_calls}"
            num_calls += 1
            turn.tool_calls[position] = _ToolCall(new_id, call.name, call.arguments)
            ids_of_this_message.setdefault(original_ids[position], []).append(new_id)
        # Clients that number their calls anew in every turn mean the latest call of that id.
        new_ids.update(ids_of_this_message)
        if turn.role == "tool" and turn.tool_call_id in new_ids:
            candidates = new_ids[turn.tool_call_id]
            turn.tool_call_id = candidates.pop(0) if len(candidates) > 1 else candidates[0]
        turns.append(turn)
    return turns


def _read_message(message: Message, where: str) -> tuple[_Turn, list[str]]:
    """One message, and the ids its tool calls came with."""
    raw_role = message.get("role")
    if not isinstance(raw_role, str) or raw_role not in _ROLES:
        raise ChatError(
            f"{where}.role: expected one of {', '.join(_ROLES)}, found "
            f"{'another string' if isinstance(raw_role, str) else _kind(raw_role)}."
        )
    role = _ROLES[raw_role]
    name = _optional_string(message.get("name"), f"{where}.name") or role
    turn = _Turn(role, name, _content_text(message.get("content"), f"{where}.content"))
    original_ids: list[str] = []
    if role == "assistant":
        reasoning = _optional_string(message.get("reasoning_content"), f"{where}.reasoning_content")
        turn.reasoning = reasoning or _optional_string(
            message.get("reasoning"), f"{where}.reasoning"
        )
        for call, original_id in _read_tool_calls(message.get("tool_calls"), f"{where}.tool_calls"):
            turn.tool_calls.append(call)
            original_ids.append(original_id)
    elif message.get("tool_calls"):
        raise ChatError(f"{where}.tool_calls: only an assistant message can call tools.")
    if role == "tool":
        turn.tool_call_id = _non_empty_string(message.get("tool_call_id"), f"{where}.tool_call_id")
    return turn, original_ids


def _read_tool_calls(raw_calls: Any, where: str) -> Iterator[tuple[_ToolCall, str]]:
    if raw_calls is None:
        return
    for index, raw in enumerate(_list(raw_calls, where)):
        here = f"{where}[{index}]"
        call = _mapping(raw, here)
        if call.get("type", "function") != "function":
            raise ChatError(f'{here}.type: expected "function"; there are no other tool calls.')
        function = _mapping(call.get("function"), f"{here}.function")
        name = _non_empty_string(function.get("name"), f"{here}.function.name")
        arguments = _arguments_text(function.get("arguments"), f"{here}.function.arguments")
        original_id = _optional_string(call.get("id"), f"{here}.id")
        yield _ToolCall("", name, arguments), original_id


def _arguments_text(arguments: Any, where: str) -> str:
    """A string as it is, an object in JSON's ordinary spacing, nothing as an empty object."""
    if arguments is None:
        return "{}"
    if isinstance(arguments, str):
        return arguments
    if not isinstance(arguments, Mapping):
        raise ChatError(f"{where}: expected a JSON string or an object, found {_kind(arguments)}.")
    return _json(dict(arguments), where)


def _content_text(content: Any, where: str) -> str:
    """null, "", [] and empty text parts all mean: nothing. Text parts are joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
        raise ChatError(f"{where}: expected text or a list of text parts, found {_kind(content)}.")
    texts = []
    for index, raw in enumerate(content):
        here = f"{where}[{index}]"
        part = _mapping(raw, here)
        part_type = part.get("type")
        if part_type != "text":
            raise ChatError(
                f'{here}.type: expected "text": Kimi-K2-Thinking reads text only, '
                "no images, audio or files."
            )
        if not isinstance(part.get("text"), str):
            raise ChatError(f"{here}.text: expected text, found {_kind(part.get('text'))}.")
        texts.append(part["text"])
    return "".join(texts)


def _json(value: Any, where: str, **options: Any) -> str:
    dump: Callable[..., str] = json.dumps
    try:
        return dump(value, ensure_ascii=False, allow_nan=False, **options)
    except RecursionError as error:
        raise ChatError(f"{where}: nested too deeply to be written as JSON.") from error
    except (TypeError, ValueError) as error:
        raise ChatError(
            f"{where}: expected JSON values only: objects with string keys, lists, text, finite "
            "numbers, true, false, null."
        ) from error


def _list(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        raise ChatError(f"{where}: expected a list, found {_kind(value)}.")
    return value


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ChatError(f"{where}: expected an object, found {_kind(value)}.")
    return value


def _optional_string(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ChatError(f"{where}: expected text, found {_kind(value)}.")
    return value


def _non_empty_string(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ChatError(f"{where}: expected text that is not empty, found {_kind(value)}.")
    return value


def _kind(value: Any) -> str:
    """What kind of JSON value this is; never the value itself, which may be huge or private."""
    if value is None:
        return "nothing"
    if value == "":
        return "empty text"
    for types, kind in (
        (str, "text"),
        (bool, "true or false"),
        ((int, float), "a number"),
        (Mapping, "an object"),
        (Sequence, "a list"),
    ):
        if isinstance(value, types):
            return kind
    return type(value).__name__

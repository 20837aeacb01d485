"""What a reply may be, token by token: tool calls and structured output that cannot break.

Owns the forms of a request (tools, tool_choice, parallel_tool_calls, response_format) and the shape
of K2's reply that follows from them: thought, then text or a JSON value, then a section of tool
calls, each with a declared name and arguments valid under its schema. JSON itself is json_values'.
Knows neither sampling nor the engine; a ReplyConstraint is what sampling calls a TokenConstraint.

What is left free: thought, and text where text is asked for. There the model's calls are held only
from the moment it opens a section, and outside one it cannot write tokens that belong inside.

Budget: with max_tokens, nothing is begun that could not be ended in time. Thought that must lead to
a call or a value is ended while that still fits, a call is opened only if it fits, and a value is
brought to its end (json_values.py). So a reply is cut off in a call or a value only when the budget
was too small for the shortest one from the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, TypeAlias

import numpy as np

from hybridk2.chat.json_values import JsonSchema, JsonValue, Mask, SchemaCompiler
from hybridk2.chat.tool_names import name_in_id
from hybridk2.errors import RequestError
from hybridk2.tokenizer import Tokenizer

ToolChoice: TypeAlias = str | Mapping[str, Any] | None

_UNLIMITED = 2**31

# Of all tools of a request; compiling them takes a second for each 100,000 characters at worst,
# and a fifth of that for schemas in use.
_MAX_TOOL_SCHEMA_CHARACTERS = 400_000

_FORMAT = "response_format.json_schema"

# Markers that the model sometimes writes in the singular, where the vocabulary has them.
_SINGULAR_MARKERS = ("<|tool_call_section_begin|>", "<|tool_call_section_end|>")


class Constraints:
    """Builds the constraint of each reply. Thread-safe for one thread at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Takes about half a second on K2's vocabulary: build it once."""
        self._tokenizer = tokenizer
        self._compiler = SchemaCompiler(tokenizer)
        self._masks = _Masks(tokenizer)

    def for_reply(
        self,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = None,
        parallel_tool_calls: bool | None = None,
        response_format: Mapping[str, Any] | None = None,
        *,
        tool_calls_in_history: int = 0,
        max_tokens: int | None = None,
        max_think_tokens: int | None = None,
    ) -> ReplyConstraint | None:
        """The constraint of one reply, None when there is nothing to hold.

        tools, tool_choice ("auto", "none", "required", a named function, allowed_tools),
        parallel_tool_calls, response_format: OpenAI-style; absent tools and None are the defaults.
        tool_calls_in_history: the number of the reply's first call, as count_tool_calls gives it.
        max_tokens: how long the reply may become, including the token that ends it; give the
        context's rest where the request has no limit. max_think_tokens: after so many tokens of
        thought it is ended, where a call or a value must follow.

        What of a schema cannot be held token by token is refused where the tool or the format is
        `strict`, and else checked at the end of each call or value: see ReplyConstraint. Raises
        RequestError, which names the tool and the reason, for a form or a schema that can be
        neither.
        """
        content = self._content(response_format)
        named = self._tools(tools or (), tool_calls_in_history)
        mode, allowed = _tool_choice(tool_choice, list(named))
        if not named and content is None:
            return None
        callable_tools = [] if mode == "none" else [named[name] for name in allowed]
        rules = _Rules(
            tuple(callable_tools),
            must_call=mode == "required",
            one_call=parallel_tool_calls is False,
            content=content,
            tool_calls_in_history=tool_calls_in_history,
            max_tokens=_UNLIMITED if max_tokens is None else max_tokens,
            max_think_tokens=_UNLIMITED if max_think_tokens is None else max_think_tokens,
        )
        return ReplyConstraint(self._tokenizer, self._masks, rules)

    def _content(self, response_format: Mapping[str, Any] | None) -> JsonSchema | None:
        """The schema that the text must be valid under; None for any text."""
        if response_format is None:
            return None
        kind = response_format.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            return self._compiler.compile({"type": "object"}, "response_format", strict=True)
        if kind != "json_schema":
            raise RequestError(
                'response_format.type: expected "text", "json_object" or "json_schema".'
            )
        outer = response_format.get("json_schema")
        schema = outer.get("schema") if isinstance(outer, Mapping) else None
        if not isinstance(outer, Mapping) or not isinstance(schema, Mapping):
            raise RequestError(f"{_FORMAT}.schema: expected a JSON schema, an object.")
        strict = outer.get("strict") is True
        return self._compiler.compile(schema, f"{_FORMAT}.schema", strict=strict)

    def _tools(
        self, tools: Sequence[Mapping[str, Any]], tool_calls_in_history: int
    ) -> dict[str, _HeldTool]:
        """Every declared tool by its name; all are compiled, so that mistakes show at once."""
        named: dict[str, _HeldTool] = {}
        characters = 0
        for index, tool in enumerate(tools):
            where = f"tools[{index}].function"
            function = tool.get("function")
            name = _function_name(tool, where)
            if name_in_id(f"functions.{name}:0") != name:
                raise RequestError(
                    f"{where}.name: a call of it would not be read back as one; expected "
                    "letters, digits, _ and -, and not digits alone."
                )
            if name in named:
                raise RequestError(f"{where}.name: the tool {name} is declared twice.")
            where = f"{where}.parameters ({name})"
            declared = function if isinstance(function, Mapping) else {}
            schema = _arguments_schema(declared.get("parameters"), where)
            strict = declared.get("strict") is True
            arguments = self._compiler.compile(schema, where, strict=strict)
            characters += arguments.characters
            if characters > _MAX_TOOL_SCHEMA_CHARACTERS:
                raise RequestError(
                    f"{where}: with it the tools' schemas have more than "
                    f"{_MAX_TOOL_SCHEMA_CHARACTERS:,} characters together; send fewer tools."
                )
            # The number's length counts; no reply makes a thousand calls.
            longest_id = f"functions.{name}:{tool_calls_in_history + 999}"
            id_tokens = len(self._tokenizer.encode(longest_id))
            named[name] = _HeldTool(name, where, arguments, id_tokens)
        return named


def _arguments_schema(parameters: Any, where: str) -> Mapping[str, Any]:
    """The schema of a tool's arguments, which are an object; no parameters means no arguments."""
    if parameters is None:
        return {"type": "object", "additionalProperties": False}
    if not isinstance(parameters, Mapping):
        raise RequestError(f"{where}: expected a JSON schema, an object.")
    kinds = parameters.get("type", "object")
    if kinds != "object" and (not isinstance(kinds, list) or "object" not in kinds):
        raise RequestError(f'{where}: expected the type "object", as all arguments are one.')
    return {**parameters, "type": "object"}


def _tool_choice(choice: ToolChoice, names: Sequence[str]) -> tuple[str, Sequence[str]]:
    """("none" | "auto" | "required", the names that may be called)."""
    if choice is None:
        return "auto", names
    where = "tool_choice"
    mode: Any = choice
    allowed = names
    if isinstance(choice, Mapping):
        kind = choice.get("type")
        if kind == "function":
            mode, allowed = "required", [_function_name(choice, where)]
        elif kind == "allowed_tools":
            subset = choice.get("allowed_tools")
            listed = subset.get("tools") if isinstance(subset, Mapping) else None
            if not isinstance(subset, Mapping) or not isinstance(listed, list):
                raise RequestError(f"{where}.allowed_tools: expected a mode and a list of tools.")
            mode = subset.get("mode")
            allowed = [_function_name(tool, f"{where}.allowed_tools.tools") for tool in listed]
    if mode not in ("none", "auto", "required"):
        raise RequestError(
            f'{where}: expected "none", "auto", "required", or an object that names a function.'
        )
    if any(name not in names for name in allowed):
        raise RequestError(f"{where}: names a function that is not among the tools.")
    if mode == "required" and not allowed:
        raise RequestError(f"{where}: a call is required, but there are no tools to call.")
    return mode, allowed


def _function_name(choice: Any, where: str) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(f"{where}: expected a function with a name.")
    return name


@dataclass(frozen=True, slots=True)
class _HeldTool:
    name: str
    where: str  # its schema stands in the request
    arguments: JsonSchema
    id_tokens: int  # of the longest id a call of it may have

    @property
    def call_tokens(self) -> int:
        """How many tokens a shortest call has, with its three control tokens."""
        return 3 + self.id_tokens + self.arguments.completion_tokens


@dataclass(frozen=True, slots=True)
class _Rules:
    """What one reply is held to."""

    tools: tuple[_HeldTool, ...]  # those that may be called
    must_call: bool
    one_call: bool
    content: JsonSchema | None  # what text must be; None: anything
    tool_calls_in_history: int
    max_tokens: int
    max_think_tokens: int


class _Masks:
    """The masks that are the same in every reply. Read-only."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        control = tokenizer.control
        self.size = tokenizer.vocab_size
        inside_sections = {
            control.tool_calls_section_end,
            control.tool_call_begin,
            control.tool_call_argument_begin,
            control.tool_call_end,
            *(i for name in _SINGULAR_MARKERS if (i := tokenizer.control_id(name)) is not None),
        }
        # Any token that stands for something, but no part of a tool call.
        self.free = self._of(range(self.size))
        self.free[[*inside_sections, *tokenizer.unmapped_ids]] = False
        self.free_outside_calls = self.free.copy()
        self.free_outside_calls[control.tool_calls_section_begin] = False
        self.thought = self._of(range(tokenizer.base_size))
        self.thought[control.end_think] = True
        self.thought_or_section = self.thought.copy()
        self.thought_or_section[control.tool_calls_section_begin] = True
        for mask in vars(self).values():
            if isinstance(mask, np.ndarray):
                mask.flags.writeable = False

    def _of(self, token_ids: Sequence[int]) -> Mask:
        mask = np.zeros(self.size, dtype=np.bool_)
        mask[list(token_ids)] = True
        return mask


class _Phase(Enum):
    START = auto()  # nothing is written, and something must be
    FREE = auto()  # thought and text as the model likes
    THOUGHT = auto()  # thought that leads to what must be
    ANSWER = auto()  # after thought, before what must be
    SECTION = auto()  # in a tool section, between calls
    CALL_ID = auto()
    ARGUMENTS = auto()
    CONTENT = auto()  # in the JSON value that is the text
    END = auto()  # nothing but the end may come


class ReplyConstraint:
    """Holds one reply. mask() and accept() alternate; not thread-safe.

    Both raise RequestError when a schema proves too complex to hold while it is written. accept()
    raises ReplyError when a call or a value ends that breaks what of its schema could not be held:
    such a reply has no end, and is none.
    """

    def __init__(self, tokenizer: Tokenizer, masks: _Masks, rules: _Rules) -> None:
        self._tokenizer = tokenizer
        self._control = tokenizer.control
        self._masks = masks
        self._rules = rules
        # A value may be the answer, unless that must be a call.
        content = None if rules.must_call else rules.content
        self._content = content
        self._value: JsonValue | None = None if content is None else content.begin()
        self._called: _HeldTool | None = None  # the tool whose arguments are the value
        self._phase = _Phase.START if rules.must_call or content is not None else _Phase.FREE
        self._tokens_left = rules.max_tokens
        self._think_tokens = 0
        self._num_calls = 0
        self._ids: list[tuple[list[int], _HeldTool]] = []  # what is left of each possible id

    def mask(self) -> Mask:
        """(vocab_size,) bools: what may come next. Never all False; not to be changed."""
        match self._phase:
            case _Phase.FREE:
                return (
                    self._masks.free if self._can_open_section() else self._masks.free_outside_calls
                )
            case _Phase.THOUGHT:
                return self._thought_mask()
            case _Phase.START | _Phase.ANSWER:
                return self._answer_mask()
            case _Phase.SECTION:
                return self._section_mask()
            case _Phase.CALL_ID:
                next_ids = {rest[0] if rest else None for rest, _ in self._ids}
                begin = self._control.tool_call_argument_begin
                return self._only(*(begin if i is None else i for i in next_ids))
            case _Phase.ARGUMENTS:
                return self._value_mask(self._control.tool_call_end, following_tokens=3)
            case _Phase.CONTENT:
                return self._value_mask(self._control.im_end, following_tokens=1)
            case _Phase.END:
                return self._only(self._control.im_end)

    def accept(self, token_id: int) -> None:
        """The token that came: one that the mask allowed."""
        self._tokens_left -= 1
        control = self._control
        if token_id in (control.im_end, control.tool_calls_section_end):
            if self._phase is _Phase.CONTENT:
                assert self._value is not None
                self._value.end(f"{_FORMAT}.schema")
            self._phase = _Phase.END
        elif token_id == control.tool_calls_section_begin:
            self._phase = _Phase.SECTION
        elif token_id == control.tool_call_begin:
            self._begin_call()
        elif token_id == control.tool_call_argument_begin:
            called = next(tool for rest, tool in self._ids if not rest)
            self._value, self._called = called.arguments.begin(), called
            self._phase = _Phase.ARGUMENTS
        elif token_id == control.tool_call_end:
            assert self._value is not None
            assert self._called is not None
            self._value.end(self._called.where)
            self._num_calls += 1
            self._phase = _Phase.SECTION
        else:
            self._accept_within_phase(token_id)

    def _accept_within_phase(self, token_id: int) -> None:
        match self._phase:
            case _Phase.START if token_id == self._control.think:
                self._phase = _Phase.THOUGHT
            case _Phase.THOUGHT if token_id == self._control.end_think:
                self._phase = _Phase.ANSWER
            case _Phase.THOUGHT:
                self._think_tokens += 1
            case _Phase.CALL_ID:
                self._ids = [(rest[1:], tool) for rest, tool in self._ids if rest[:1] == [token_id]]
            case _Phase.START | _Phase.ANSWER | _Phase.ARGUMENTS | _Phase.CONTENT:
                assert self._value is not None
                self._value.accept(token_id)
                if self._phase is not _Phase.ARGUMENTS:
                    self._phase = _Phase.CONTENT

    def _affordable_tools(self, tokens: int) -> list[_HeldTool]:
        """The tools of which a shortest call fits into so many tokens."""
        return [tool for tool in self._rules.tools if tool.call_tokens <= tokens]

    def _can_open_section(self) -> bool:
        # After its begin and a call, the end of the section and of the message.
        return bool(self._affordable_tools(self._tokens_left - 3))

    def _shortest_answer_tokens(self) -> int:
        answers = [3 + tool.call_tokens for tool in self._rules.tools]
        if self._content is not None:
            answers.append(1 + self._content.completion_tokens)
        return min(answers)

    def _thought_mask(self) -> Mask:
        is_over = self._think_tokens >= self._rules.max_think_tokens
        if is_over or self._tokens_left < 2 + self._shortest_answer_tokens():
            return self._only(self._control.end_think)
        # The model sometimes calls a tool without ending its thought, and that is read as a call.
        return self._masks.thought_or_section if self._can_open_section() else self._masks.thought

    def _answer_mask(self) -> Mask:
        can_call = self._can_open_section()
        content = self._content
        if content is None or (can_call and content.completion_tokens >= self._tokens_left):
            mask = self._only(self._control.tool_calls_section_begin)
        else:
            mask = self._value_mask(self._control.im_end, following_tokens=1)
            mask[self._control.tool_calls_section_begin] = can_call
        if self._phase is _Phase.START:
            fits = self._tokens_left >= 2 + self._shortest_answer_tokens()
            mask[self._control.think] = fits
        return mask

    def _section_mask(self) -> Mask:
        if self._num_calls == 0:
            return self._only(self._control.tool_call_begin)
        mask = self._only(self._control.tool_calls_section_end)
        if not self._rules.one_call:
            mask[self._control.tool_call_begin] = bool(
                self._affordable_tools(self._tokens_left - 2)
            )
        return mask

    def _begin_call(self) -> None:
        # The token that begins the call is counted in call_tokens, and already gone.
        tools = self._affordable_tools(self._tokens_left + 1 - 2)
        # None: the budget was too small from the start. The least is lost with the shortest call.
        tools = tools or [min(self._rules.tools, key=lambda tool: tool.call_tokens)]
        number = self._rules.tool_calls_in_history + self._num_calls
        self._ids = [
            (self._tokenizer.encode(f"functions.{tool.name}:{number}"), tool) for tool in tools
        ]
        self._phase = _Phase.CALL_ID

    def _value_mask(self, end_id: int, following_tokens: int) -> Mask:
        assert self._value is not None
        mask, may_end = self._value.mask(self._tokens_left - following_tokens)
        mask[end_id] = may_end
        return mask

    def _only(self, *token_ids: int) -> Mask:
        mask = np.zeros(self._masks.size, dtype=np.bool_)
        mask[list(token_ids)] = True
        return mask

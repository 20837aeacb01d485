"""Token ids of a reply to events: one state machine, one token at a time.

Owns the reading of what the model writes, `<think>` reasoning `</think>` text, tool section,
`<|im_end|>`, and of every known way in which it departs from that. Does not know where tokens come
from, nor stop strings (generation.py).

Decisions are made on token ids; text is looked at in one place only, for a section marker that the
model spells out in ordinary tokens. Events do not depend on how the reply was cut into pieces.

White space: reasoning and text are passed on as written, so that the conversation renders back to
the tokens that are cached; a run of nothing but white space is no text and is dropped. Arguments
are trimmed. Control tokens where they do not belong are dropped.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from typing import Any, Literal, TypeAlias

from hybridk2.chat.events import (
    Event,
    Finished,
    ReasoningDelta,
    ReasoningEnd,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from hybridk2.chat.tool_names import UNKNOWN_TOOL, guess_name, name_in_id
from hybridk2.tokenizer import IncrementalDecoder, Tokenizer

EndReason: TypeAlias = Literal["stop", "length", "cancelled"]

# The model sometimes writes the markers in the singular, as a token or letter by letter.
_SECTION_BEGIN = ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>")
_SECTION_END = ("<|tool_calls_section_end|>", "<|tool_call_section_end|>")


class _State(Enum):
    TEXT = auto()
    REASONING = auto()
    SECTION = auto()  # in a tool section, outside calls; also after it, once there was a call
    CALL_ID = auto()
    ARGUMENTS = auto()
    ENDED = auto()


class OutputParser:
    """Reads one reply. Not thread-safe; one parser per reply.

    Counts, for usage: completion_tokens (all pushed), reasoning_tokens (`<think>` to `</think>`,
    both included), text_tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tool_calls_in_history: int = 0,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """tool_calls_in_history: the number of the first call of this reply, as count_tool_calls
        gives it. tools: the declarations that were rendered; they only serve to name a call whose
        id has no name.
        """
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder(tokenizer)
        self._tools = list(tools or ())
        self._tool_calls_in_history = tool_calls_in_history
        self._actions = self._actions_by_id()
        self._state = _State.TEXT
        self._run = _Run()
        self._id_parts: list[str] = []
        self._call: _Call | None = None
        self._finished = False
        self.num_tool_calls = 0
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.text_tokens = 0

    @property
    def ended(self) -> bool:
        """Whether the model ended its message; what is pushed after that is ignored."""
        return self._state is _State.ENDED

    def shows(self, token_id: int) -> bool:
        """Whether this token, if it comes next, is part of the visible text."""
        ordinary = token_id < self._tokenizer.base_size and token_id not in self._actions
        return ordinary and self._state is _State.TEXT

    def push(self, token_id: int) -> list[Event]:
        """What this token adds to the reply. Raises TokenizerError for an id out of range."""
        if self.ended:
            return []
        before = self._state
        action = self._actions.get(token_id)
        if action is not None:
            events = action()
        elif token_id < self._tokenizer.base_size:
            events = self._push_text(token_id)
        else:
            self._tokenizer.token_bytes(token_id)  # refuses an id outside the vocabulary
            events = []
        self.completion_tokens += 1
        if self._state is _State.REASONING or (
            before is _State.REASONING and self._state is _State.TEXT
        ):
            self.reasoning_tokens += 1
        elif self._state is _State.TEXT:
            self.text_tokens += 1
        return events

    def finish(self, reason: EndReason) -> list[Event]:
        """End the reply: close what is open, then Finished. Empty when called a second time.

        reason: "stop" when the message is complete, else what cut it off. A reply that is complete
        and calls a tool finishes with "tool_calls". Of a reply that is cut off, an unfinished
        character and a call whose id is unfinished are dropped.
        """
        if self._finished:
            return []
        self._finished = True
        events = [] if self.ended else self._end_message(was_cut=reason != "stop")
        called = reason == "stop" and self.num_tool_calls > 0
        return [*events, Finished("tool_calls" if called else reason)]

    def _actions_by_id(self) -> dict[int, Callable[[], list[Event]]]:
        control = self._tokenizer.control
        actions: dict[int, Callable[[], list[Event]]] = {
            control.think: self._begin_reasoning,
            control.end_think: self._end_reasoning,
            control.tool_call_begin: self._begin_call,
            control.tool_call_argument_begin: self._begin_arguments,
            control.tool_call_end: self._end_call,
        }
        # A header opens somebody else's message, so ours is over, marked or not.
        ends = (control.im_end, control.eos, control.im_user, control.im_assistant)
        actions.update(dict.fromkeys((*ends, control.im_system), self._end_message))
        for names, action in (
            (("[EOT]",), self._end_message),
            (_SECTION_BEGIN, self._begin_section),
            (_SECTION_END, self._end_section),
        ):
            token_ids = (self._tokenizer.control_id(name) for name in names)
            actions.update(dict.fromkeys((i for i in token_ids if i is not None), action))
        return actions

    def _push_text(self, token_id: int) -> list[Event]:
        if self._state is _State.SECTION:
            return []
        return self._add(self._decoder.push(token_id))

    def _add(self, text: str) -> list[Event]:
        """Text to wherever the state sends it."""
        if self._state is _State.CALL_ID:
            self._id_parts.append(text)
            return []
        if self._state is _State.ARGUMENTS:
            assert self._call is not None
            return self._call.push(text)
        return self._delta(self._run.push(text))

    def _delta(self, text: str) -> list[Event]:
        if not text:
            return []
        return [ReasoningDelta(text) if self._state is _State.REASONING else TextDelta(text)]

    def _leave(self, *, marker_follows: bool, was_cut: bool = False) -> list[Event]:
        """Close the state the parser is in; the caller sets the next one.

        marker_follows: a tool section or the end is next, so a marker spelled out at the end of the
        text was meant as one. was_cut: the reply did not end here, it was cut off.
        """
        if was_cut:
            self._decoder.discard()
        events = self._add(self._decoder.flush()) if self._state is not _State.SECTION else []
        if self._state in (_State.TEXT, _State.REASONING):
            events += self._delta(self._run.close(drop_marker=marker_follows))
            if self._state is _State.REASONING:
                events.append(ReasoningEnd())
        elif self._state is _State.CALL_ID:
            if not was_cut:
                events += self._close_call_without_arguments()
        elif self._state is _State.ARGUMENTS:
            assert self._call is not None
            events += self._call.close(was_cut)
            self._call = None
        return events

    def _begin_reasoning(self) -> list[Event]:
        if self._state is not _State.TEXT:
            return []
        events = self._leave(marker_follows=False)
        self._state = _State.REASONING
        return events

    def _end_reasoning(self) -> list[Event]:
        if self._state is not _State.REASONING:
            return []
        events = self._leave(marker_follows=False)
        self._state = _State.TEXT
        return events

    def _begin_section(self) -> list[Event]:
        events = self._leave(marker_follows=True)
        self._state = _State.SECTION
        return events

    def _end_section(self) -> list[Event]:
        if self._state in (_State.TEXT, _State.REASONING):
            return []
        events = self._leave(marker_follows=True)
        # Text after calls is suppressed; after an empty section it is the answer.
        self._state = _State.SECTION if self.num_tool_calls else _State.TEXT
        return events

    def _begin_call(self) -> list[Event]:
        events = self._leave(marker_follows=True)
        self._id_parts.clear()
        self._state = _State.CALL_ID
        return events

    def _begin_arguments(self) -> list[Event]:
        if self._state is not _State.CALL_ID:
            return []
        self._add(self._decoder.flush())
        self._state = _State.ARGUMENTS
        return self._open_call("".join(self._id_parts))

    def _end_call(self) -> list[Event]:
        if self._state not in (_State.CALL_ID, _State.ARGUMENTS):
            return []
        events = self._leave(marker_follows=True)
        self._state = _State.SECTION
        return events

    def _end_message(self, was_cut: bool = False) -> list[Event]:
        events = self._leave(marker_follows=True, was_cut=was_cut)
        self._state = _State.ENDED
        return events

    def _open_call(self, raw_id: str) -> list[Event]:
        index = self.num_tool_calls
        self.num_tool_calls += 1
        self._call = _Call(index, self._tool_calls_in_history + index, self._tools)
        return self._call.open(name_in_id(raw_id))

    def _close_call_without_arguments(self) -> list[Event]:
        """A call closed before its arguments began: `f:0`, or `f:0{"a": 1}`, or nothing at all."""
        raw_id, brace, rest = "".join(self._id_parts).partition("{")
        if not raw_id.strip() and not brace:
            return []
        events = self._open_call(raw_id)
        assert self._call is not None
        events += self._call.push(brace + rest)
        events += self._call.close(was_cut=False)
        self._call = None
        return events


class _Call:
    """One tool call while it is being read: arguments trimmed, and a name guessed when it must be.

    Cost is linear in the arguments, however long and however finely cut.
    """

    def __init__(self, index: int, number: int, tools: Sequence[Mapping[str, Any]]) -> None:
        self._index = index
        self._number = number
        self._tools = tools
        self._marker = _SpelledMarker(_SECTION_END)
        self._is_announced = False
        self._parts: list[str] = []
        self._trailing_space: list[str] = []

    def open(self, name: str) -> list[Event]:
        """Announce the call, unless its name has to be guessed from arguments still to come."""
        if not name and len(self._tools) == 1:
            name = self._tools[0]["function"]["name"]
        elif not name and not self._tools:
            name = UNKNOWN_TOOL
        return [self._announce(name)] if name else []

    def push(self, text: str) -> list[Event]:
        return self._trimmed(self._marker.push(text))

    def close(self, was_cut: bool) -> list[Event]:
        """End the call. No arguments are `{}`, unless it was cut off before they could come."""
        events = self._trimmed(self._marker.close(drop_marker=True))
        if not self._parts and not was_cut:
            events += self._trimmed("{}")
        arguments = "".join(self._parts)
        if not self._is_announced:
            events.append(self._announce(guess_name(arguments, self._tools)))
            if arguments:
                events.append(ToolCallArguments(self._index, arguments))
        return [*events, ToolCallEnd(self._index, arguments)]

    def _announce(self, name: str) -> ToolCallStart:
        self._is_announced = True
        return ToolCallStart(self._index, f"functions.{name}:{self._number}", name)

    def _trimmed(self, text: str) -> list[Event]:
        body = text.rstrip()
        if not self._parts:
            body = body.lstrip()
        if not body:
            if self._parts and text:
                self._trailing_space.append(text)
            return []
        delta = "".join(self._trailing_space) + body
        self._trailing_space = [text[len(text.rstrip()) :]]
        self._parts.append(delta)
        return [ToolCallArguments(self._index, delta)] if self._is_announced else []


class _Run:
    """One run of reasoning or text: nothing comes out before there is something to see."""

    def __init__(self) -> None:
        self._marker = _SpelledMarker(_SECTION_BEGIN)
        self._blank: list[str] = []
        self._is_visible = False

    def push(self, text: str) -> str:
        return self._visible(self._marker.push(text))

    def close(self, drop_marker: bool) -> str:
        """The rest of the run; what is pushed next belongs to a new one."""
        text = self._visible(self._marker.close(drop_marker))
        self._blank.clear()
        self._is_visible = False
        return text

    def _visible(self, text: str) -> str:
        if self._is_visible or not text:
            return text
        self._blank.append(text)
        if text.isspace():
            return ""
        self._is_visible = True
        return "".join(self._blank)


class _SpelledMarker:
    """Holds back the end of a text while it may be a section marker written in ordinary letters.

    A marker counts only where the text ends with it, give or take white space: in the middle of a
    sentence it is what the model is writing about.
    """

    _LONGEST_SPACE = 64  # after a marker; bounds what is held, and the cost of looking at it again

    def __init__(self, spellings: tuple[str, ...]) -> None:
        self._spellings = spellings
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certainly no marker."""
        text = self._held + text
        start = text.find("<")
        while start >= 0 and not self._may_be_marker(text, start):
            start = text.find("<", start + 1)
        if start < 0:
            start = len(text)
        self._held = text[start:]
        return text[:start]

    def close(self, drop_marker: bool) -> str:
        """The text held back at the end: "" if it is a whole marker and those are to be dropped."""
        held, self._held = self._held, ""
        return "" if drop_marker and held.rstrip() in self._spellings else held

    def _may_be_marker(self, text: str, start: int) -> bool:
        rest = len(text) - start
        for spelling in self._spellings:
            if rest < len(spelling):
                if spelling.startswith(text[start:]):
                    return True
            elif rest <= len(spelling) + self._LONGEST_SPACE and text.startswith(spelling, start):
                space = text[start + len(spelling) :]
                if not space or space.isspace():
                    return True
        return False

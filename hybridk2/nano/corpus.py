"""Conversations as token ids: rendered in K2's chat format, marked, and packed into batches.

Renders the run to be learned with its reasoning and marks the tokens that the model itself must
produce. `hybridk2.chat.template` is the authority on the format; a test holds this renderer to it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hybridk2.nano.conversation import Conversation, Message, conversation
from hybridk2.nano.words import Draw
from hybridk2.tokenizer import Tokenizer

DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."
MAX_DOCUMENT_TOKENS = 4096

# What a batch says of each of its tokens.
PROMPT, TARGET, PADDING = 0, 1, 2


@dataclass(frozen=True)
class Batch:
    """Documents one after another. All arrays: (tokens,).

    tokens: ids, uint16. marks: PROMPT, TARGET (the model must produce this token) or PADDING,
    uint8. starts: index of the first token of the document, int32.
    """

    tokens: np.ndarray
    marks: np.ndarray
    starts: np.ndarray


class Renderer:
    """Conversation -> (ids, marks)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._control = tokenizer.control
        self._ids: list[int] = []
        self._marks: list[int] = []
        self._known: dict[str, list[int]] = {}

    def render(self, talk: Conversation) -> tuple[list[int], list[int]]:
        """Ids of the whole conversation and, for each, PROMPT or TARGET."""
        self._ids, self._marks = [], []
        control = self._control
        if talk.tools:
            declared = json.dumps(
                talk.tools, ensure_ascii=False, separators=(",", ":"), sort_keys=True
            )
            self._header(control.im_system, "tool_declare")
            self._text(declared)
            self._token(control.im_end)
        if not talk.messages or talk.messages[0]["role"] != "system":
            self._header(control.im_system, "system")
            self._text(DEFAULT_SYSTEM)
            self._token(control.im_end)
        run_start = talk.last_user_turn()
        for index, message in enumerate(talk.messages):
            self._message(message, learned=index > run_start)
        return self._ids, self._marks

    def _token(self, token_id: int, mark: int = PROMPT) -> None:
        self._ids.append(token_id)
        self._marks.append(mark)

    def _text(self, text: str, mark: int = PROMPT) -> None:
        ids = self._tokenizer.encode(text)
        self._ids += ids
        self._marks += [mark] * len(ids)

    def _header(self, role_token: int, name: str) -> None:
        self._token(role_token)
        if name not in self._known:  # the same few names over and over
            if len(self._known) > 1000:
                self._known.clear()
            self._known[name] = self._tokenizer.encode(name)
        self._ids += self._known[name]
        self._marks += [PROMPT] * len(self._known[name])
        self._token(self._control.im_middle)

    def _message(self, message: Message, learned: bool) -> None:
        control, role = self._control, message["role"]
        name = message.get("name") or role
        if role == "assistant":
            self._header(control.im_assistant, name)
            self._assistant(message, TARGET if learned else PROMPT)
            return
        self._header(control.im_user if role == "user" else control.im_system, name)
        if role == "tool":
            self._text(f"## Return of {message['tool_call_id']}\n{message['content']}")
        else:
            self._text(message["content"])
        self._token(control.im_end)

    def _assistant(self, message: Message, mark: int) -> None:
        control = self._control
        self._token(control.think, mark)
        if mark == TARGET:
            self._text(message["reasoning_content"], mark)
        self._token(control.end_think, mark)
        if message["content"]:
            self._text(message["content"], mark)
        if message.get("tool_calls"):
            self._token(control.tool_calls_section_begin, mark)
            for call in message["tool_calls"]:
                self._token(control.tool_call_begin, mark)
                self._text(call["id"], mark)
                self._token(control.tool_call_argument_begin, mark)
                self._text(call["function"]["arguments"], mark)
                self._token(control.tool_call_end, mark)
            self._token(control.tool_calls_section_end, mark)
        self._token(control.im_end, mark)


def training_texts(seed: int, count: int) -> Iterator[str]:
    """Texts of training conversations, for the vocabulary: bodies only, control tokens left out."""
    draw = Draw(seed)
    for _ in range(count):
        talk = conversation(draw)
        if talk.tools:
            yield json.dumps(talk.tools, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        yield f"{DEFAULT_SYSTEM}\nsystem user assistant tool tool_declare"
        for message in talk.messages:
            yield message["content"]
            yield message.get("reasoning_content", "")
            for call in message.get("tool_calls", ()):
                yield call["id"]
                yield call["function"]["arguments"]
            if message["role"] == "tool":
                yield f"## Return of {message['tool_call_id']}\n"


def batches(tokenizer: Tokenizer, seed: int, tokens_per_batch: int) -> Iterator[Batch]:
    """Training batches without end; equal seeds give equal batches."""
    draw, renderer = Draw(seed), Renderer(tokenizer)
    waiting: tuple[list[int], list[int]] | None = None
    while True:
        tokens = np.full(tokens_per_batch, tokenizer.control.pad, dtype=np.uint16)
        marks = np.full(tokens_per_batch, PADDING, dtype=np.uint8)
        starts = np.arange(tokens_per_batch, dtype=np.int32)  # padding: documents of one token
        used = 0
        while True:
            ids, document_marks = waiting or renderer.render(conversation(draw))
            waiting = None
            if len(ids) > min(MAX_DOCUMENT_TOKENS, tokens_per_batch):
                continue
            if used + len(ids) > tokens_per_batch:
                waiting = ids, document_marks
                break
            tokens[used : used + len(ids)] = ids
            marks[used : used + len(ids)] = document_marks
            starts[used : used + len(ids)] = used
            used += len(ids)
        yield Batch(tokens, marks, starts)

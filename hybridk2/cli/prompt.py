"""Where the person types: lines, pastes, history, completion.

Enter sends. Alt-Enter (or Escape, then Enter), a backslash at the end of the line, and pasting put
a new line into the message instead. Knows the names of the commands, not what they do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import (
    CompleteEvent,
    Completer,
    Completion,
    PathCompleter,
    WordCompleter,
)
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from hybridk2.errors import SessionError


class Reader(Protocol):
    """What asks the person. Both methods raise EOFError on Ctrl-D, KeyboardInterrupt on Ctrl-C."""

    def message(self, draft: str) -> str:
        """The next message or command; `draft` stands there already, to be edited."""

    def answer(self, question: str) -> str:
        """Something else that has to be known, which is no message and goes into no history."""


class TerminalReader:
    """Reads from the terminal; `history` keeps the messages, not the answers."""

    def __init__(self, history: History, completer: Completer) -> None:
        keys = _key_bindings()
        self._messages: PromptSession[str] = PromptSession(
            history=history,
            completer=completer,
            key_bindings=keys,
            multiline=True,
            prompt_continuation="  ",
        )
        self._answers: PromptSession[str] = PromptSession(
            history=InMemoryHistory(), key_bindings=keys, multiline=True, prompt_continuation="  "
        )

    def message(self, draft: str) -> str:
        return self._messages.prompt("> ", default=draft)

    def answer(self, question: str) -> str:
        return self._answers.prompt(question)


class PrivateHistory(FileHistory):
    """A history file that only its owner reads, and whose loss never stops the chat."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise SessionError(f"{path}: cannot be written: {error.strerror}") from error
        super().__init__(str(path))

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except OSError:  # a full disk: the line stays in this chat's history, and the next autosave
            return  # of the conversation tells the person about the disk


def _key_bindings() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        line = buffer.document
        at_its_end = not line.current_line_after_cursor
        if at_its_end and line.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def insert_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class CommandCompleter(Completer):
    """Completes the commands, and after a command what that command takes.

    commands: their names with what each takes: "path", "conversation", a tuple of words, or None.
    """

    def __init__(
        self,
        commands: Mapping[str, str | tuple[str, ...] | None],
        conversations: Callable[[], list[str]],
    ) -> None:
        self._commands = commands
        self._conversations = conversations
        self._names = WordCompleter(sorted(commands), sentence=True)
        self._paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, blank, argument = text.partition(" ")
        if not blank:
            yield from self._names.get_completions(document, complete_event)
            return
        takes = self._commands.get(name)
        if takes == "path":
            yield from self._paths.get_completions(Document(argument), complete_event)
        elif takes is not None:
            words = self._conversations() if takes == "conversation" else list(takes)
            choices = WordCompleter(words, sentence=True)
            yield from choices.get_completions(Document(argument), complete_event)

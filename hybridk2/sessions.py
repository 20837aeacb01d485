"""Conversations on disk: each in one file, which is always whole.

Owns the file format and who may replace what: a save replaces a file as a whole and flushes the
folder, so that a crash or a full disk leaves the previous file or the new one, never a mixture. A
file that fails its checksum is refused by name, and no save replaces a file that this process did
not itself read or write.

Knows nothing of models, terminals or environment variables; the caller says which folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from hybridk2.durable_file import flush_folder, replace_file
from hybridk2.errors import SessionError

FORMAT = "hybridk2 conversation"
VERSION = 1
SUFFIX = ".json"

_MAX_NAME_BYTES = 120  # leaves room for the suffixes within the 255 bytes of a file name
_ROLES = ("system", "user", "assistant", "tool")


@dataclass
class Conversation:
    """Messages in OpenAI's form, the tools declared with them, and the model that answered."""

    model: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def system(self) -> str | None:
        """The system prompt, or None where the chat template's own holds."""
        if self.messages and self.messages[0]["role"] == "system":
            return str(self.messages[0]["content"])
        return None

    @system.setter
    def system(self, text: str | None) -> None:
        start = 0 if self.system is None else 1
        head = [] if text is None else [{"role": "system", "content": text}]
        self.messages[:start] = head

    @property
    def title(self) -> str:
        """The first line that the person wrote, to recognise the conversation by."""
        for message in self.messages:
            if message["role"] == "user":
                return next(iter(str(message["content"]).strip().splitlines()), "")
        return ""

    def undo(self) -> str | None:
        """Take off the last question and all that followed; return the question, None if none."""
        position = self._last_question()
        if position is None:
            return None
        question = str(self.messages[position]["content"])
        del self.messages[position:]
        return question

    def drop_reply(self) -> bool:
        """Take off all that followed the last question; return whether there is a question."""
        position = self._last_question()
        if position is None:
            return False
        del self.messages[position + 1 :]
        return True

    def _last_question(self) -> int | None:
        for position in reversed(range(len(self.messages))):
            if self.messages[position]["role"] == "user":
                return position
        return None


@dataclass(frozen=True)
class SavedConversation:
    """One line of a listing. `problem` says why the file cannot be loaded; None when it can."""

    name: str
    saved_at: datetime
    num_messages: int
    title: str
    problem: str | None = None


def file_name(name: str) -> str:
    """The name, without suffix, that a conversation called `name` gets on disk.

    Letters, digits, '.', '_' and '-' stay, everything else (separators, controls, blanks) becomes
    '-', and no name begins with '.': what is left cannot leave the folder nor hide in it. Raises
    SessionError when nothing is left.
    """
    kept = _kept(name)
    if not kept:
        raise SessionError(f"a conversation's name needs a letter or a digit; found {name!r}")
    return kept


def _kept(name: str) -> str:
    kept = "".join(
        letter if letter.isalnum() or letter in "._-" else "-"
        for letter in unicodedata.normalize("NFC", name.strip())
    )
    while len(kept.encode()) > _MAX_NAME_BYTES:
        kept = kept[:-1]
    return kept.lstrip(".-").rstrip("-")


class ConversationStore:
    """The conversations of one folder. Safe against crashes, and against other processes here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._digests: dict[str, str] = {}  # of the file as we last read or wrote it, by name

    def path(self, name: str) -> Path:
        return self.folder / (file_name(name) + SUFFIX)

    def new_name(self, now: datetime) -> str:
        """A name that no file has yet, made of the time to the second."""
        stem = now.strftime("%Y-%m-%d-%H%M%S")
        names = [stem, *(f"{stem}-{count}" for count in range(2, 1000))]
        return next(name for name in names if not self.path(name).exists())

    def save(self, name: str, conversation: Conversation) -> Path:
        """Put the conversation under `name`, durably, readable by its owner only.

        Raises SessionError when the disk refuses (the previous file is then untouched), and when
        the file there is not the one this store last read or wrote: another conversation, another
        process's work, or a damaged file, none of which is ours to replace.
        """
        path = self.path(name)
        data = _encode(conversation)
        try:
            with self._locked():
                self._refuse_foreign(path)
                replace_file(path, data)
                self._digests[path.name] = hashlib.sha256(data).hexdigest()
                flush_folder(self.folder)
        except OSError as error:
            raise SessionError(f"{path}: cannot be saved: {error.strerror}") from error
        return path

    def load(self, name: str) -> Conversation:
        """Read the conversation called `name`. Raises SessionError when missing or damaged."""
        path = self.path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            known = ", ".join(saved.name for saved in self.saved()[:5]) or "none yet"
            raise SessionError(
                f"no conversation is called {file_name(name)!r} in {self.folder}; newest: {known}"
            ) from error
        except OSError as error:
            raise SessionError(f"{path}: cannot be read: {error.strerror}") from error
        conversation = _decode(data, path)
        self._digests[path.name] = hashlib.sha256(data).hexdigest()
        return conversation

    def remove(self, name: str) -> None:
        """Delete the conversation called `name`. Raises SessionError when that fails."""
        path = self.path(name)
        try:
            with self._locked():
                self._refuse_foreign(path)
                path.unlink()
                flush_folder(self.folder)
        except OSError as error:
            raise SessionError(f"{path}: cannot be removed: {error.strerror}") from error

    def saved(self) -> list[SavedConversation]:
        """All conversations, the last saved first; a damaged file is listed with its problem."""
        names = [path.name.removesuffix(SUFFIX) for path in self.folder.glob("[!.]*" + SUFFIX)]
        rows = [row for name in names if _kept(name) == name and (row := self._row(name))]
        return sorted(rows, key=lambda row: (row.saved_at, row.name), reverse=True)

    def latest(self) -> str:
        """The name of the conversation saved last. Raises SessionError when there is none."""
        rows = self.saved()
        if not rows:
            raise SessionError(f"no conversation has been saved in {self.folder} yet")
        return rows[0].name

    def _row(self, name: str) -> SavedConversation | None:
        path = self.path(name)
        try:
            saved_at = datetime.fromtimestamp(path.stat().st_mtime)
            conversation = _decode(path.read_bytes(), path)
        except FileNotFoundError:  # removed by another process since the folder was read
            return None
        except SessionError as error:
            return SavedConversation(name, saved_at, 0, "", str(error))
        return SavedConversation(name, saved_at, len(conversation.messages), conversation.title)

    def _refuse_foreign(self, path: Path) -> None:
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except FileNotFoundError:
            return
        if found != self._digests.get(path.name):
            raise SessionError(
                f"{path}: holds something that this chat neither loaded nor saved (another "
                "conversation, or the work of another program), and is left as it is. Choose "
                "another name, or move that file away."
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes out. A file of its own: NFS locks only what is open for writing."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _checksum(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _encode(conversation: Conversation) -> bytes:
    """ASCII JSON: a terminal that prints the file shows escapes instead of obeying them."""
    content = asdict(conversation)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "sha256": _checksum(content),
        "conversation": content,
    }
    return (json.dumps(document, indent=1) + "\n").encode("ascii")


def _decode(data: bytes, path: Path) -> Conversation:
    try:
        document = json.loads(data)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise SessionError(f"{path}: damaged: not a conversation of HybridK2")
        if document.get("version") != VERSION:
            raise SessionError(
                f"{path}: format version {document.get('version')!r}; this program reads {VERSION}"
            )
        content = document.get("conversation")
        if document.get("sha256") != _checksum(content):
            raise SessionError(f"{path}: damaged: its content does not match its checksum")
    except (ValueError, RecursionError) as error:
        raise SessionError(f"{path}: damaged: not valid JSON ({error})") from error
    if not isinstance(content, dict) or not _well_formed(content):
        raise SessionError(f"{path}: damaged: not a list of messages with roles and contents")
    return Conversation(content["model"], content["messages"], content["tools"])


def _well_formed(content: dict[str, Any]) -> bool:
    """A checksum proves that the bytes are those written, not that a conversation was."""
    messages, tools = content.get("messages"), content.get("tools")
    return (
        isinstance(content.get("model"), str)
        and isinstance(messages, list)
        and isinstance(tools, list)
        and all(isinstance(tool, dict) for tool in tools)
        and all(
            isinstance(message, dict)
            and message.get("role") in _ROLES
            and isinstance(message.get("content"), str)
            and isinstance(message.get("reasoning_content", ""), str)
            and isinstance(message.get("tool_calls", []), list)
            for message in messages
        )
    )

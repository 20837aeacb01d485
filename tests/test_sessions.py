"""Conversations on disk: whole after any crash, refused when damaged, never written over."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from hybridk2.errors import SessionError
from hybridk2.sessions import Conversation, ConversationStore, file_name


@pytest.fixture
def store(tmp_path: Path) -> ConversationStore:
    return ConversationStore(tmp_path / "conversations")


def conversation(*questions: str) -> Conversation:
    messages = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        messages.append(
            {"role": "assistant", "content": "yes", "reasoning_content": "is it so? \ud83d"}
        )
    return Conversation("K2-nano", messages, [{"type": "function", "function": {"name": "f"}}])


def test_what_is_saved_is_what_is_loaded(store: ConversationStore) -> None:
    saved = conversation("what is 北京?", "and \x1b[31mred\x1b[0m?")
    store.save("capitals", saved)
    assert ConversationStore(store.folder).load("capitals") == saved


def test_files_are_for_their_owner_only_whatever_the_umask(store: ConversationStore) -> None:
    before = os.umask(0)
    try:
        path = store.save("private", conversation("a secret"))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert store.folder.stat().st_mode & 0o777 == 0o700


def test_a_file_printed_raw_cannot_command_the_terminal(store: ConversationStore) -> None:
    path = store.save("escapes", conversation("\x1b]0;owned\x07 \x9b31m \u202e"))
    allowed = set(range(0x20, 0x7F)) | {0x0A}
    assert set(path.read_bytes()) <= allowed


@pytest.mark.parametrize(
    ("name", "on_disk"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("/etc/passwd", "etc-passwd"),
        ("..", None),
        ("", None),
        (" \n", None),
        (".hidden", "hidden"),
        ("a\x00b\x1b[2J", "a-b--2J"),
        ("北京 trip", "北京-trip"),
        ("\u202egnp.exe", "gnp.exe"),
        ("x" * 500, "x" * 120),
    ],
)
def test_names_cannot_leave_the_folder(name: str, on_disk: str | None) -> None:
    if on_disk is None:
        with pytest.raises(SessionError, match="needs a letter or a digit"):
            file_name(name)
    else:
        assert file_name(name) == on_disk


DAMAGES = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "one letter changed": lambda data: data.replace(b'"yes"', b'"yet"', 1),
    "another format": lambda data: b'{"hello": 1}',
    "not an object": lambda data: b"[1]",
    "a newer version": lambda data: data.replace(b'"version": 1', b'"version": 2'),
    "too deep": lambda data: b"[" * 100_000,
    "not text": lambda data: b"\xff\xfe\x00" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_by_name_listed_and_never_written_over(
    store: ConversationStore, damage: str
) -> None:
    path = store.save("notes", conversation("hello"))
    damaged = DAMAGES[damage](path.read_bytes())
    path.write_bytes(damaged)

    other = ConversationStore(store.folder)
    with pytest.raises(SessionError, match=r"notes\.json: (damaged|format version)"):
        other.load("notes")
    with pytest.raises(SessionError, match=r"notes\.json"):
        other.load(other.latest())
    assert "notes.json" in (other.saved()[0].problem or "")
    with pytest.raises(SessionError, match=r"notes\.json: holds something"):
        other.save("notes", conversation("new"))
    with pytest.raises(SessionError, match=r"notes\.json: holds something"):
        store.save("notes", conversation("new"))  # we wrote it, but not like this
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    "content",
    [
        None,
        {"model": "m", "messages": [{"role": "root", "content": "x"}], "tools": []},
        {"model": "m", "messages": [{"role": "user", "content": None}], "tools": []},
        {"model": "m", "messages": ["x"], "tools": []},
        {"model": "m", "messages": [], "tools": [1]},
        {"model": 1, "messages": [], "tools": []},
    ],
)
def test_a_right_checksum_over_wrong_content_is_refused(
    store: ConversationStore, content: object
) -> None:
    from hybridk2 import sessions

    path = store.save("forged", conversation("hello"))
    document = {
        "format": sessions.FORMAT,
        "version": sessions.VERSION,
        "sha256": sessions._checksum(content),
        "conversation": content,
    }
    path.write_text(json.dumps(document))
    with pytest.raises(SessionError, match="not a list of messages"):
        store.load("forged")


def test_two_chats_on_one_conversation_do_not_write_over_each_other(
    store: ConversationStore,
) -> None:
    store.save("shared", conversation("one"))
    other = ConversationStore(store.folder)
    theirs = other.load("shared")
    theirs.messages += conversation("two").messages
    other.save("shared", theirs)
    with pytest.raises(SessionError, match="the work of another program"):
        store.save("shared", conversation("one", "three"))
    assert store.load("shared") == theirs
    store.save("shared", conversation("one", "two", "three"))  # having read it, we may


def test_a_full_disk_leaves_the_previous_file_and_nothing_else(store: ConversationStore) -> None:
    first = conversation("hello")
    path = store.save("full", first)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # a real write(2) that fails
    try:
        with pytest.raises(SessionError, match=r"full\.json: cannot be saved: File too large"):
            store.save("full", conversation("x" * 10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.load("full") == first
    assert sorted(entry.name for entry in store.folder.iterdir()) == [".lock", path.name]
    store.save("full", conversation("again"))


def test_the_file_is_flushed_before_the_rename_and_the_folder_after(
    store: ConversationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        steps.append(f"flush {Path(target).name}")
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        steps.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    store.save("ordered", conversation("hello"))
    assert steps == ["flush .ordered.json.tmp", "rename to ordered.json", "flush conversations"]


def test_the_latest_conversation_is_the_one_saved_last(store: ConversationStore) -> None:
    with pytest.raises(SessionError, match="no conversation has been saved"):
        store.latest()
    for order, name in enumerate(["older", "newest", "oldest"]):
        path = store.save(name, conversation(f"about {name}"))
        os.utime(path, (order * 100 % 199, order * 100 % 199))
    (store.folder / "---.json").write_text("not ours, and no name of ours")
    assert [saved.name for saved in store.saved()] == ["newest", "oldest", "older"]
    assert store.latest() == "newest"
    assert (store.saved()[0].title, store.saved()[0].num_messages) == ("about newest", 2)
    with pytest.raises(SessionError, match=r"no conversation is called 'x'.*newest, oldest, older"):
        store.load("x")


def test_new_names_are_never_taken(store: ConversationStore) -> None:
    now = datetime(2026, 11, 23, 16, 11, 12)
    assert store.new_name(now) == "2026-11-23-161112"
    store.save(store.new_name(now), conversation("a"))
    assert store.new_name(now) == "2026-11-23-161112-2"


def test_undo_takes_off_a_question_and_all_that_followed() -> None:
    chat = conversation("one", "two")
    chat.messages.append({"role": "tool", "content": "42"})
    assert chat.undo() == "two"
    assert chat == conversation("one")
    assert chat.undo() == "one"
    assert chat.undo() is None


def test_the_system_prompt_is_replaced_in_place() -> None:
    chat = conversation("one")
    rest = list(chat.messages)
    for system in ("be brief", "be long", None, None):
        chat.system = system
        assert chat.system == system
        assert chat.messages[-2:] == rest
        assert len(chat.messages) == 2 + (system is not None)


# One killed process: it saves number 0, 1, 2, ... as fast as it can and tells after each.
SAVER = """
import sys
from pathlib import Path
from hybridk2.sessions import Conversation, ConversationStore

store = ConversationStore(Path(sys.argv[1]))
name = "killed"
first = int(sys.argv[2])
if first:
    store.load(name)
for number in range(first, first + 100_000):
    filler = chr(97 + number % 26) * 300_000
    messages = [{"role": "user", "content": f"{number} {filler}"}]
    store.save(name, Conversation("model", messages))
    print(number, flush=True)
"""


def saved_number(chat: Conversation) -> int:
    """The number of a SAVER's conversation, after checking that it is one of them and whole."""
    number, _, filler = chat.messages[0]["content"].partition(" ")
    assert filler == chr(97 + int(number) % 26) * 300_000
    return int(number)


def kill_in_the_middle(store: ConversationStore, first: int, delay_seconds: float) -> int:
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(store.folder), str(first)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    reported = [process.stdout.readline()]
    time.sleep(delay_seconds)
    process.send_signal(signal.SIGKILL)
    reported += process.stdout.readlines()
    process.stdout.close()
    process.wait()
    told = [int(line) for line in reported if line.endswith(b"\n")]
    found = saved_number(store.load("killed"))
    # Killed between the rename and the report, the file is one ahead of what was told.
    assert found in (told[-1], told[-1] + 1), f"told {told[-1]}, found {found}"
    return found


def kill_repeatedly(store: ConversationStore, times: int) -> None:
    random_delay = random.Random(20261123)
    found = -1
    for _ in range(times):
        found = kill_in_the_middle(store, found + 1, random_delay.uniform(0, 0.02))
    left = {entry.name for entry in store.folder.iterdir()}
    assert left <= {".lock", "killed.json", ".killed.json.tmp"}


def test_killing_a_save_20_times_always_leaves_the_previous_or_the_new_file(
    store: ConversationStore,
) -> None:
    kill_repeatedly(store, 20)


@pytest.mark.soak
def test_killing_a_save_200_times_always_leaves_the_previous_or_the_new_file(
    store: ConversationStore,
) -> None:
    kill_repeatedly(store, 200)

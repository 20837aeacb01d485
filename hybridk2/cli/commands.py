"""The commands of the chat that begin with a slash: what they are called, take and do."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hybridk2.cli.inputs import document_block, read_document, read_tools
from hybridk2.cli.interactive import Chat
from hybridk2.cli.terminal_text import printable_line
from hybridk2.errors import RequestError


@dataclass(frozen=True)
class Command:
    """One slash command. `completes`: what the prompt offers after its name."""

    usage: str
    summary: str
    run: Callable[[Chat, str], None]
    completes: str | tuple[str, ...] | None = None


def run_command(chat: Chat, line: str) -> None:
    """Run the command in a line that begins with a slash. Raises RequestError if unknown."""
    name, _, argument = line.strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise RequestError(
            f"there is no command {printable_line(name)}; /help lists them. "
            "A message that begins with a slash is sent with a blank before it"
        )
    command.run(chat, argument.strip())


def _help(chat: Chat, argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        chat.note(f"{command.usage:{width}}  {command.summary}")
    chat.note("")
    chat.note("Enter sends; Alt-Enter, or \\ at the end of a line, begins a new line.")
    chat.note("Ctrl-C stops a reply and keeps what came; Ctrl-D leaves.")


def _exit(chat: Chat, argument: str) -> None:
    chat.leaving = True


def _retry(chat: Chat, argument: str) -> None:
    chat.retry()


def _undo(chat: Chat, argument: str) -> None:
    question = chat.conversation.undo()
    if question is None:
        chat.note("there is nothing to undo")
        return
    chat.save()
    chat.note(f"taken back: {_shortened(question)}")


def _think(chat: Chat, argument: str) -> None:
    if argument not in ("show", "hide"):
        raise RequestError(f"/think: expected show or hide, found {argument!r}")
    chat.show_thinking = argument == "show"
    if not chat.show_thinking:
        chat.note("thoughts are folded to a line")
    elif chat.last_reply is not None and chat.last_reply.reasoning:
        chat.note(chat.last_reply.reasoning.strip())
    else:
        chat.note("thoughts are shown in full")


def _system(chat: Chat, argument: str) -> None:
    if argument:
        chat.conversation.system = argument
        chat.note("system prompt set; the next reply reads the conversation anew")
    elif chat.conversation.system is None:
        chat.note("the system prompt is the model's own; /system TEXT replaces it")
    else:
        chat.note(f"system prompt: {chat.conversation.system}")


def _file(chat: Chat, argument: str) -> None:
    path = _path("/file", argument)
    text = read_document(path)
    block = document_block(path.name, text)
    tokens = chat.assistant.count_tokens(block)
    shown = printable_line(path.name)
    limit = chat.assistant.context_tokens
    if tokens >= limit:
        raise RequestError(f"{shown}: {tokens:,} tokens, and the context holds {limit:,}")
    chat.documents.append(block)
    chat.note(f"{shown}: {tokens:,} tokens, sent with your next message")


def _tools(chat: Chat, argument: str) -> None:
    if argument == "off":
        chat.conversation.tools = []
        chat.note("no tools are declared")
        return
    if argument:
        chat.conversation.tools = read_tools(_path("/tools", argument))
    names = [printable_line(tool["function"]["name"]) for tool in chat.conversation.tools]
    chat.note(f"declared tools: {', '.join(names) or 'none'}")


def _save(chat: Chat, argument: str) -> None:
    if not argument:
        raise RequestError("/save: give the conversation a name")
    path = chat.store.save(argument, chat.conversation)
    before = None if chat.name is None else chat.store.path(chat.name)
    if before is not None and before != path and not chat.named_by_person and before.exists():
        chat.store.remove(before.stem)  # the name that the clock gave it
    chat.name, chat.named_by_person = path.stem, True
    chat.note(f"saved, and from now on kept, as {path.stem}")


def _load(chat: Chat, argument: str) -> None:
    if not argument:
        for saved in chat.store.saved():
            what = saved.problem or f"{saved.num_messages} messages, {_shortened(saved.title)}"
            chat.note(f"{saved.name}  {saved.saved_at:%Y-%m-%d %H:%M}  {what}")
        return
    chat.go_on_with(chat.store.load(argument), chat.store.path(argument).stem)


def _path(command: str, argument: str) -> Path:
    """One path, as a shell would read it: quoted, or with its blanks escaped, or plain."""
    if not argument:
        raise RequestError(f"{command}: give the path of a file")
    if Path(argument).expanduser().exists():
        return Path(argument).expanduser()
    try:
        words = shlex.split(argument)
    except ValueError as error:
        raise RequestError(f"{command}: {error} in {printable_line(argument)}") from error
    return Path(" ".join(words)).expanduser()


def _shortened(text: str) -> str:
    line = printable_line(text)
    return line if len(line) <= 60 else line[:59] + "…"


COMMANDS = {
    "/help": Command("/help", "this list", _help),
    "/retry": Command("/retry", "answer the last question again", _retry),
    "/undo": Command("/undo", "take back the last question and its answer", _undo),
    "/think": Command(
        "/think show|hide", "show thoughts in full, or folded to a line", _think, ("show", "hide")
    ),
    "/file": Command("/file PATH", "send a text file with the next message", _file, "path"),
    "/system": Command("/system [TEXT]", "set or show the system prompt", _system),
    "/tools": Command("/tools [FILE|off]", "declare tools from a JSON file", _tools, "path"),
    "/save": Command("/save NAME", "give the conversation a name", _save),
    "/load": Command("/load [NAME]", "go on with a saved one, or list them", _load, "conversation"),
    "/exit": Command("/exit", "leave; the conversation is saved already", _exit),
}

"""`hybridk2 chat`: what the person chose on the command line, and which way of talking follows.

A prompt, or text on standard input, is one question (one_shot.py): the answer goes to standard
output, everything about it to standard error. Without either it is a conversation in the terminal
(interactive.py).
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from hybridk2.cli import EXIT_INTERRUPTED
from hybridk2.cli.options import engine_options, model_options
from hybridk2.errors import ConfigError, RequestError, SessionError

if TYPE_CHECKING:
    from rich.console import Console

    from hybridk2.assistant import Assistant
    from hybridk2.cli.prompt import TerminalReader
    from hybridk2.sessions import ConversationStore

LATEST = ""  # what --resume without a name gives

_GRACE_SECONDS = 2.0  # for the engine to finish its step when the person leaves


@click.command("chat")
@click.argument("prompt", required=False)
@model_options
@click.option("--system", help="System prompt, instead of the model's own.")
@click.option("--tools", type=click.Path(path_type=Path), help="JSON file of tools to declare.")
@click.option(
    "--resume",
    is_flag=False,
    flag_value=LATEST,
    metavar="[NAME]",
    help="Go on with a saved conversation, the latest if no name follows.",
)
@click.option("--show-thinking", is_flag=True, help="Show thoughts in full, not as one line.")
@click.option("--json", "as_json", is_flag=True, help="Print the reply as one JSON object.")
@click.option("--temperature", type=float, default=1.0, show_default=True)
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--top-k", type=int, default=0, show_default=True, help="0: all tokens.")
@click.option("--min-p", type=float, default=0.0, show_default=True)
@click.option("--seed", type=int, help="The same seed repeats the same reply; drawn if not given.")
@click.option("--max-tokens", type=int, help="Of one reply, its thought included.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Ends the answer; may be repeated.")
@engine_options
@click.option(
    "--data-home",
    type=click.Path(path_type=Path),
    envvar="XDG_DATA_HOME",
    default=Path("~/.local/share"),
    show_default=True,
    show_envvar=True,
    help="Conversations and history are kept in its folder hybridk2.",
)
@click.pass_context
def chat(
    ctx: click.Context,
    prompt: str | None,
    model: str,
    download: bool,
    system: str | None,
    tools: Path | None,
    resume: str | None,
    show_thinking: bool,
    as_json: bool,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    seed: int | None,
    max_tokens: int | None,
    stop: tuple[str, ...],
    threads: int | None,
    context: int | None,
    dtype: Literal["bfloat16", "float32"],
    data_home: Path,
    **card: Any,
) -> None:
    """Talk to a model, or ask it one question.

    With PROMPT, or text on standard input, the answer alone goes to standard output. With both,
    the text is a document that PROMPT is about.
    """
    question = _question(prompt)
    if question is None and as_json:
        raise click.UsageError("--json needs a PROMPT, or text on standard input.")

    from rich.console import Console

    from hybridk2.cli.commands import run_command
    from hybridk2.cli.inputs import read_tools
    from hybridk2.cli.interactive import Chat
    from hybridk2.cli.loading import load_assistant
    from hybridk2.cli.one_shot import ask_once
    from hybridk2.cli.worker import Worker
    from hybridk2.config import EngineConfig
    from hybridk2.sampling import SamplingParams
    from hybridk2.sessions import Conversation, ConversationStore

    try:
        choices = EngineConfig(
            model=model, dtype=dtype, threads=threads, context_tokens=context, **card
        )
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            max_tokens=max_tokens,
            stop=stop,
        )
    except (ConfigError, RequestError) as error:
        raise click.UsageError(str(error)) from error

    # What can be refused is refused before a model is loaded, which may take minutes.
    data_folder = data_home.expanduser() / "hybridk2"
    store = ConversationStore(data_folder / "conversations")
    name = store.latest() if resume == LATEST else resume
    conversation = Conversation(model) if name is None else store.load(name)
    if system is not None:
        conversation.system = system
    if tools is not None:
        conversation.tools = read_tools(tools)
    if question is not None:
        conversation.messages.append({"role": "user", "content": question})

    _survive_unprintable_text()
    status = Console(stderr=True)
    worker = Worker()
    assistant: Assistant | None = None
    code = EXIT_INTERRUPTED
    try:
        assistant = load_assistant(worker, choices, download, status)
        if question is None:
            reader = _terminal_reader(data_folder / "history", store, status)
            terminal_chat = Chat(worker, assistant, params, store, reader, Console(), show_thinking)
            terminal_chat.go_on_with(conversation, name)
            interrupted = terminal_chat.run(run_command)
        else:
            reply = ask_once(
                worker, assistant, conversation, params, show_thinking, as_json, status
            )
            if name is not None:
                store.save(name, conversation)
            interrupted = reply.finish_reason == "cancelled"
        code = EXIT_INTERRUPTED if interrupted else 0
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
    finally:
        if not worker.close(assistant.close if assistant else None, _GRACE_SECONDS):
            _leave_at_once(code)
    ctx.exit(code)


def _question(prompt: str | None) -> str | None:
    """The one question of this run: PROMPT, what is piped in, or both; None on a bare terminal."""
    piped = ""
    bare = sys.stdin is not None and sys.stdin.isatty()
    if sys.stdin is not None and not bare:
        try:
            piped = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise RequestError(
                f"standard input: byte {error.start} is not UTF-8; only text can be read"
            ) from error
    parts = [part for part in (piped.strip("\n"), prompt) if part and part.strip()]
    if parts:
        return "\n\n".join(parts)
    if prompt is not None or not bare:
        raise click.UsageError("the question is empty: give a PROMPT, or text on standard input.")
    if not sys.stdout.isatty():
        raise click.UsageError("standard output is no terminal to talk in: give a PROMPT.")
    return None


def _terminal_reader(history: Path, store: ConversationStore, status: Console) -> TerminalReader:
    """The prompt. Where no history can be kept on disk, one for this chat alone, and a warning."""
    from prompt_toolkit.history import History, InMemoryHistory

    from hybridk2.cli.commands import COMMANDS
    from hybridk2.cli.notes import warn
    from hybridk2.cli.prompt import CommandCompleter, PrivateHistory, TerminalReader

    kept: History
    try:
        kept = PrivateHistory(history)
    except SessionError as error:
        warn(status, f"no history is kept: {error}")
        kept = InMemoryHistory()
    completer = CommandCompleter(
        {name: command.completes for name, command in COMMANDS.items()},
        lambda: [saved.name for saved in store.saved()],
    )
    return TerminalReader(kept, completer)


def _survive_unprintable_text() -> None:
    """Let an output that is not UTF-8 show '?' for what it cannot encode."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _leave_at_once(code: int) -> NoReturn:
    """End without waiting for the engine, which may be minutes deep in a step or a load.

    Leaving the interpreter normally would tear down modules under the engine's running threads.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

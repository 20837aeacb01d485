"""One question, one reply: the answer on standard output, everything about it on standard error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
from rich.console import Console

from hybridk2.cli.notes import is_terminal, note
from hybridk2.cli.reply import Reply, status_line, thought_line
from hybridk2.cli.streaming import stream_reply
from hybridk2.cli.views import LiveView, PlainView, SilentView, View
from hybridk2.cli.worker import Worker
from hybridk2.sessions import Conversation

if TYPE_CHECKING:
    from hybridk2.assistant import Assistant
    from hybridk2.sampling import SamplingParams


def ask_once(
    worker: Worker,
    assistant: Assistant,
    conversation: Conversation,
    params: SamplingParams,
    show_thinking: bool,
    as_json: bool,
    status: Console,
) -> Reply:
    """Answer the conversation's last message and put the answer into the conversation.

    Raises the HybridK2Error of a reply that failed, after what had come of it was shown.
    """
    output = Console()
    drawn = is_terminal(output) and not output.is_dumb_terminal

    def make_view(reply: Reply) -> View:
        if as_json:
            return SilentView()
        if drawn:
            return LiveView(reply, output, show_thinking, assistant.count_tokens)
        return PlainView(lambda text: click.echo(text, nl=False), show_thinking)

    reply = stream_reply(worker, assistant, conversation, params, make_view)
    if reply.error is not None:
        raise reply.error
    message = reply.message()
    if message is not None:
        conversation.messages.append(message)
    if as_json:
        click.echo(json.dumps(reply.as_json(assistant.model_name)))  # ASCII: safe on a terminal
        return reply
    line = status_line(reply)
    if reply.reasoning and not drawn:
        thought = thought_line(reply.thinking_seconds, assistant.count_tokens(reply.reasoning))
        line = f"{thought} · {line}"
    note(status, line)
    return reply

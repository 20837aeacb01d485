"""One reply from the worker's thread to whoever shows it, and how Ctrl-C or an error ends it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

from hybridk2.cli.reply import Reply
from hybridk2.cli.views import View
from hybridk2.cli.worker import Job, Worker, stopped_by_ctrl_c
from hybridk2.errors import HybridK2Error
from hybridk2.sessions import Conversation

if TYPE_CHECKING:
    from hybridk2.assistant import Assistant
    from hybridk2.chat.events import Event
    from hybridk2.sampling import SamplingParams


def stream_reply(
    worker: Worker,
    assistant: Assistant,
    conversation: Conversation,
    params: SamplingParams,
    make_view: Callable[[Reply], View],
) -> Reply:
    """Let the model answer, show the answer as it comes, and return it; Ctrl-C ends it early.

    When the engine refuses the conversation or fails in the middle, the reply says so in `error`.
    """
    messages, tools = list(conversation.messages), list(conversation.tools)

    def generate(job: Job[Event, None]) -> None:
        with closing(assistant.reply(messages, tools or None, params)) as events:
            for event in events:
                job.emit(event)
                if job.stopped:
                    return

    reply = Reply()
    job = worker.submit(generate)
    with stopped_by_ctrl_c(job), make_view(reply) as view:
        try:
            for event in job:
                reply.add(event, time.monotonic())
                view.show(event)
        except HybridK2Error as error:
            reply.error = error
    return reply

"""A conversation in the terminal: questions, replies, tool calls, and what is kept of them.

Owns the conversation under way and the order of things around one reply. The commands that begin
with a slash are in commands.py, the drawing in views.py, the typing in prompt.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.segment import SegmentLines
from rich.text import Text

from hybridk2.cli.inputs import with_documents
from hybridk2.cli.markdown import markdown_lines
from hybridk2.cli.notes import note, warn
from hybridk2.cli.prompt import Reader
from hybridk2.cli.reply import Reply, status_line
from hybridk2.cli.streaming import stream_reply
from hybridk2.cli.terminal_text import printable, printable_line
from hybridk2.cli.views import LiveView, View
from hybridk2.cli.worker import Job, Worker
from hybridk2.errors import HybridK2Error, SessionError
from hybridk2.sessions import Conversation, ConversationStore

if TYPE_CHECKING:
    from hybridk2.assistant import Assistant
    from hybridk2.sampling import SamplingParams

NOT_RUN = "The person did not run this tool."


class Chat:
    """One person, one model, one conversation at a time."""

    def __init__(
        self,
        worker: Worker,
        assistant: Assistant,
        params: SamplingParams,
        store: ConversationStore,
        reader: Reader,
        console: Console,
        show_thinking: bool,
    ) -> None:
        self.assistant = assistant
        self.store = store
        self.reader = reader
        self.console = console
        self.show_thinking = show_thinking
        self.conversation = Conversation(assistant.model_name)
        self.name: str | None = None  # until the first save gives it one
        self.named_by_person = False
        self.documents: list[str] = []  # go with the next question
        self.last_reply: Reply | None = None
        self.leaving = False
        self._worker = worker
        self._params = params
        self._retries = 0
        self._draft = ""
        self._warming: Job[None, None] | None = None

    # What the person reads.

    def note(self, text: str) -> None:
        note(self.console, text)

    def warn(self, text: str) -> None:
        warn(self.console, text)

    def go_on_with(self, conversation: Conversation, name: str | None) -> None:
        """Take up a conversation; a saved one, which has a name, is shown where it ended."""
        self.conversation = conversation
        self.name = name
        self.named_by_person = name is not None
        self.last_reply = None
        if name is not None:
            count = len(conversation.messages)
            self.note(f"{name}: {count} messages, last with {conversation.model}")
            self._show_last_exchange()
        conversation.model = self.assistant.model_name

    def _show_last_exchange(self) -> None:
        for message in self.conversation.messages[-2:]:
            if message["role"] == "user":
                self.console.print(Text("> " + printable(message["content"])))
            elif message["role"] == "assistant" and message["content"]:
                lines = markdown_lines(self.console, printable(message["content"]))
                self.console.print(SegmentLines(lines, new_lines=True))

    # The loop.

    def run(self, run_command: Callable[[Chat, str], None]) -> bool:
        """Talk until the person leaves; return whether they left by Ctrl-C."""
        self.note("/help lists the commands; Ctrl-C stops a reply, Ctrl-D leaves")
        interrupted = False
        while not self.leaving:
            try:
                draft, self._draft = self._draft, ""
                line = self.reader.message(draft)
            except EOFError:
                return False
            except KeyboardInterrupt:
                if interrupted:
                    return True
                interrupted = True
                self.note("Ctrl-C again, or Ctrl-D, leaves")
                continue
            interrupted = False
            try:
                if line.startswith("/"):
                    run_command(self, line)
                elif line.strip():
                    interrupted = self.ask(line)
            except HybridK2Error as error:
                self.warn(str(error))
        return False

    # Questions and answers. Each returns whether the person stopped the reply.

    def ask(self, question: str) -> bool:
        before = list(self.conversation.messages)
        content = with_documents(question, self.documents)
        self.conversation.messages.append({"role": "user", "content": content})
        documents, self.documents = self.documents, []
        self._retries = 0
        stopped = self._answer(before)
        if self.conversation.messages == before:  # nothing came, and the question was taken back
            self.documents, self._draft = documents, question
        return stopped

    def retry(self) -> bool:
        before = list(self.conversation.messages)
        if not self.conversation.drop_reply():
            self.note("there is no question to answer again")
            return False
        self._retries += 1
        return self._answer(before)

    def _answer(self, before: list[dict[str, Any]]) -> bool:
        """Replies and tool results until the model says something to the person.

        When a reply ends before its first word, the conversation goes back to `before`.
        """
        params = self._params
        if params.seed is not None:  # with the same seed a retry would only repeat itself
            params = replace(params, seed=params.seed + self._retries)
        while True:
            reply = self._reply(params)
            message = reply.message()
            if message is None:
                if self.conversation.messages[-1]["role"] != "tool":
                    self.conversation.messages[:] = before
                    self.note("nothing came: the conversation is as it was before")
                return _stopped(reply)
            self.conversation.messages.append(message)
            self.last_reply = reply
            calls = message.get("tool_calls", [])
            given = self._ask_for_results(calls)
            self.save()
            if not calls or not given:
                break
        self._warm()
        return _stopped(reply)

    def _reply(self, params: SamplingParams) -> Reply:
        warming, self._warming = self._warming, None
        if warming is not None:
            warming.stop()  # where it is: the reply reads the rest, and shows how far that is
        reply = stream_reply(self._worker, self.assistant, self.conversation, params, self._view)
        if warming is not None and warming.finished:
            self._report_failure(warming)
        if reply.error is not None:
            self.warn(str(reply.error))
        else:
            self.note(status_line(reply) + "\n")
        return reply

    def _view(self, reply: Reply) -> View:
        return LiveView(reply, self.console, self.show_thinking, self.assistant.count_tokens)

    def _ask_for_results(self, calls: list[dict[str, Any]]) -> bool:
        """Let the person be the tools; False when they leave a call unanswered.

        Every call gets a result, for the model must not see its calls without one.
        """
        given = True
        for call in calls:
            result = NOT_RUN
            name = printable_line(call["function"]["name"])
            if given:
                try:
                    result = self.reader.answer(f"result of {name}: ")
                except (EOFError, KeyboardInterrupt):
                    given = False
                    self.note(f"{name} was not run; the model is told so with your next message")
            self.conversation.messages.append(
                {
                    "role": "tool",
                    "tool_call_id": call["id"],
                    "name": call["function"]["name"],
                    "content": result,
                }
            )
        return given

    # Around a reply.

    def save(self) -> None:
        """Autosave; where that fails the chat goes on, and says so."""
        if self.name is None:
            self.name = self.store.new_name(datetime.now())
        try:
            self.store.save(self.name, self.conversation)
        except SessionError as error:
            self.warn(f"not saved, the chat goes on: {error}")

    def _warm(self) -> None:
        """While the person reads and types, compute what the next turn will need of this one."""
        messages, tools = list(self.conversation.messages), list(self.conversation.tools)

        def warm(job: Job[None, None]) -> None:
            self.assistant.warm(messages, tools or None, lambda: job.stopped)

        self._warming = self._worker.submit(warm)

    def _report_failure(self, warming: Job[None, None]) -> None:
        """It cost the next reply nothing but time; it must not pass unseen all the same."""
        try:
            warming.result()
        except HybridK2Error as error:
            self.warn(f"the last turn could not be prepared ahead: {error}")


def _stopped(reply: Reply) -> bool:
    return reply.finish_reason == "cancelled" and reply.error is None

"""The conversation in the terminal: commands, tool calls, Ctrl-C, and what is kept on disk."""

from __future__ import annotations

import io
import json
import re
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from hybridk2.chat.events import Event, Finished, ReasoningDelta, TextDelta
from hybridk2.cli.commands import COMMANDS, run_command
from hybridk2.cli.interactive import NOT_RUN, Chat
from hybridk2.cli.markdown import last_part, markdown_lines, split_finished
from hybridk2.cli.prompt import CommandCompleter, PrivateHistory, TerminalReader
from hybridk2.cli.reply import Reply
from hybridk2.cli.views import LiveView
from hybridk2.cli.worker import Worker
from hybridk2.errors import EngineError, RequestError, SessionError
from hybridk2.sampling import SamplingParams
from hybridk2.sessions import Conversation, ConversationStore
from tests.scripted_assistant import STATUS, USAGE, ScriptedAssistant, calls, press_ctrl_c, says

GREETING = "/help lists the commands; Ctrl-C stops a reply, Ctrl-D leaves\n"
CTRL_C = KeyboardInterrupt
CTRL_D = EOFError

Line = str | type[BaseException]


class ScriptedReader:
    """Types what a test wrote down, then Ctrl-D; keeps what the prompt showed."""

    def __init__(self, lines: tuple[Line, ...]) -> None:
        self._lines: Iterator[Line] = iter(lines)
        self.drafts: list[str] = []
        self.questions: list[str] = []

    def message(self, draft: str) -> str:
        self.drafts.append(draft)
        return self._next()

    def answer(self, question: str) -> str:
        self.questions.append(question)
        return self._next()

    def _next(self) -> str:
        line = next(self._lines, CTRL_D)
        if isinstance(line, str):
            return line
        raise line


class Terminal:
    """Holds conversations with scripts; each `talk` is one run of the program."""

    def __init__(self, folder: Path) -> None:
        self.store = ConversationStore(folder / "conversations")
        self.assistant = ScriptedAssistant()
        self.reader = ScriptedReader(())
        self.chat: Chat
        self.left_by_ctrl_c = False

    def talk(
        self,
        *lines: Line,
        resume: str | None = None,
        seed: int | None = None,
    ) -> str:
        """Type `lines`; return what was printed after the greeting."""
        self.reader = ScriptedReader(lines)
        output = io.StringIO()
        worker = Worker()
        self.chat = Chat(
            worker,
            self.assistant,  # type: ignore[arg-type]  # stands for hybridk2.assistant.Assistant
            SamplingParams(seed=seed),
            self.store,
            self.reader,
            Console(file=output, width=90),
            False,
        )
        if resume is not None:
            self.chat.go_on_with(self.store.load(resume), resume)
        self.left_by_ctrl_c = self.chat.run(run_command)
        assert worker.close(self.assistant.close, timeout_seconds=5)
        before, greeting, printed = output.getvalue().partition(GREETING)
        assert greeting
        return re.sub(r"thought \d+\.\d s", "thought 0.0 s", before + printed)

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self.chat.conversation.messages


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    return Terminal(tmp_path)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


ANSWER = says("9.9 is **bigger**.", "compare the digits")
ANSWER_MESSAGE = assistant("9.9 is **bigger**.", reasoning_content="compare the digits ")


def test_a_reply_is_a_folded_thought_the_answer_and_its_figures(terminal: Terminal) -> None:
    terminal.assistant.scripts = [ANSWER]
    printed = terminal.talk("which?")
    assert printed == f"thought 0.0 s, 3 tokens\n9.9 is bigger.\n{STATUS}\n\n"
    assert terminal.messages == [user("which?"), ANSWER_MESSAGE]
    assert not terminal.left_by_ctrl_c


def test_the_next_turn_carries_the_whole_past_which_was_warmed_meanwhile(
    terminal: Terminal,
) -> None:
    terminal.assistant.scripts = [ANSWER, says("Because .90 is more than .11.")]
    terminal.talk("which?", "why?")
    assert terminal.assistant.asked[1] == [user("which?"), ANSWER_MESSAGE, user("why?")]
    assert terminal.assistant.warmed[0] == [user("which?"), ANSWER_MESSAGE]


def test_warming_that_failed_is_told_and_the_chat_goes_on(terminal: Terminal) -> None:
    terminal.assistant.scripts = [says("one"), says("two")]
    terminal.assistant.warm_error = EngineError("no room")
    printed = terminal.talk("1", "2")
    assert "the last turn could not be prepared ahead: no room\n" in printed
    assert "two" in printed


def test_thoughts_are_shown_in_full_when_asked_for(terminal: Terminal) -> None:
    terminal.assistant.scripts = [ANSWER, ANSWER]
    printed = terminal.talk("/think show", "which?", "/think hide", "which?", "/think show")
    assert printed == (
        "thoughts are shown in full\n"
        f"compare the digits\nthought 0.0 s, 3 tokens\n9.9 is bigger.\n{STATUS}\n\n"
        "thoughts are folded to a line\n"
        f"thought 0.0 s, 3 tokens\n9.9 is bigger.\n{STATUS}\n\n"
        "compare the digits\n"  # the last thought, unfolded
    )
    assert "expected show or hide, found 'x'" in terminal.talk("/think x")


def test_ctrl_c_stops_the_reply_keeps_what_came_and_another_leaves(terminal: Terminal) -> None:
    terminal.assistant.scripts = [
        [ReasoningDelta("hm "), TextDelta("The answer"), press_ctrl_c, TextDelta(" is late")]
    ]
    printed = terminal.talk("which?", CTRL_C, "never read")
    assert printed == "thought 0.0 s, 1 tokens\nThe answer\nstopped\n\n"
    assert terminal.messages == [user("which?"), assistant("The answer", reasoning_content="hm ")]
    assert terminal.left_by_ctrl_c
    assert terminal.store.load(terminal.store.latest()).messages == terminal.messages
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_at_the_prompt_asks_for_a_second_one(terminal: Terminal) -> None:
    terminal.assistant.scripts = [says("one")]
    printed = terminal.talk(CTRL_C, "1", CTRL_C, CTRL_C, "never read")
    assert printed.count("Ctrl-C again, or Ctrl-D, leaves\n") == 2
    assert terminal.left_by_ctrl_c


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ([ReasoningDelta("hm")], assistant("", reasoning_content="hm")),
        ([*calls("f", "{}")[:2]], None),  # a call cut off in its arguments
        ([*calls("f", "{}")[:3]], None),  # a whole call, but the person stopped it
        ([TextDelta("I call"), *calls("f", "{}")[:3]], assistant("I call")),
        ([], None),
    ],
)
def test_whatever_a_stopped_reply_leaves_the_history_stays_valid(
    terminal: Terminal, steps: list[Event], kept: dict[str, Any] | None
) -> None:
    terminal.assistant.scripts = [[*steps, press_ctrl_c, TextDelta("late")], says("two")]
    terminal.talk("1", "2")
    past = [user("1"), kept] if kept else []  # without a word of reply the question goes too
    assert terminal.messages == [*past, user("2"), assistant("two")]
    assert terminal.reader.drafts == ["", "" if kept else "1", ""]  # and stands there to be edited


def test_an_error_before_the_first_word_takes_the_question_back(terminal: Terminal) -> None:
    terminal.assistant.scripts = [[RequestError("the prompt has 5000 tokens")], says("ok")]
    printed = terminal.talk("long", "short")
    assert "the prompt has 5000 tokens\n" in printed
    assert terminal.messages == [user("short"), assistant("ok")]
    assert terminal.reader.drafts[1] == "long"


def test_an_error_in_the_middle_keeps_what_came(terminal: Terminal) -> None:
    terminal.assistant.scripts = [[TextDelta("The"), EngineError("a step failed")], says("ok")]
    printed = terminal.talk("1", "2")
    assert "The\na step failed\n" in printed
    assert terminal.messages[:2] == [user("1"), assistant("The")]


def test_retry_answers_the_last_question_again(terminal: Terminal) -> None:
    terminal.assistant.scripts = [says("one"), says("two"), says("three")]
    terminal.talk("1", "/retry", "/retry", seed=7)
    assert terminal.messages == [user("1"), assistant("three")]
    assert terminal.assistant.asked == [[user("1")]] * 3
    # With one seed for all, each retry would only repeat the first answer.
    assert [params.seed for params in terminal.assistant.params] == [7, 8, 9]
    assert "no question to answer again" in terminal.talk("/retry")


def test_a_retry_that_is_stopped_at_once_keeps_the_answer_there_was(terminal: Terminal) -> None:
    terminal.assistant.scripts = [says("one"), [press_ctrl_c, TextDelta("late")]]
    terminal.talk("1", "/retry")
    assert terminal.messages == [user("1"), assistant("one")]


def test_undo_takes_back_a_question_with_its_answer(terminal: Terminal) -> None:
    terminal.assistant.scripts = [says("one"), says("two"), says("three")]
    printed = terminal.talk("1", "2\nand more", "/undo", "3", "/undo", "/undo", "/undo")
    assert "taken back: 2 and more\n" in printed
    assert terminal.assistant.asked[2] == [user("1"), assistant("one"), user("3")]
    assert terminal.messages == []
    assert printed.endswith("there is nothing to undo\n")


TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]


def test_the_person_is_the_tool_and_the_model_answers_from_the_result(
    terminal: Terminal, tmp_path: Path
) -> None:
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    terminal.assistant.scripts = [calls("get_weather", '{"city":"Rome"}'), says("It is sunny.")]
    printed = terminal.talk(f"/tools {tmp_path}/tools.json", "weather in Rome?", "sunny", "/tools")
    assert printed == (
        "declared tools: get_weather\n"
        f'calls get_weather({{"city": "Rome"}})\n{STATUS}\n\n'
        f"It is sunny.\n{STATUS}\n\n"
        "declared tools: get_weather\n"
    )
    assert terminal.reader.questions == ["result of get_weather: "]
    call = {
        "id": "functions.get_weather:0",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'},
    }
    result = {
        "role": "tool",
        "tool_call_id": "functions.get_weather:0",
        "name": "get_weather",
        "content": "sunny",
    }
    round_trip = [user("weather in Rome?"), assistant("", tool_calls=[call]), result]
    assert terminal.assistant.asked[1] == round_trip
    assert terminal.assistant.tools == [TOOLS, TOOLS]
    assert terminal.messages == [*round_trip, assistant("It is sunny.")]
    assert terminal.store.load(terminal.store.latest()).tools == TOOLS


def test_a_tool_that_the_person_does_not_run_is_told_to_the_model_later(
    terminal: Terminal,
) -> None:
    two_calls = [*calls("f", "{}")[:3], *calls("g", "{}")]
    terminal.assistant.scripts = [two_calls, says("Then not.")]
    printed = terminal.talk("do it", CTRL_C, "do not")
    assert "f was not run; the model is told so with your next message\n" in printed
    results = [message["content"] for message in terminal.messages if message["role"] == "tool"]
    assert results == [NOT_RUN, NOT_RUN]
    assert [message["role"] for message in terminal.assistant.asked[1]] == [
        *("user", "assistant", "tool", "tool", "user")
    ]


def test_tools_can_be_dropped_and_wrong_files_are_refused(terminal: Terminal) -> None:
    printed = terminal.talk("/tools off", "/tools /nowhere.json", "/tools")
    assert printed == (
        "no tools are declared\n"
        "/nowhere.json: cannot be read: No such file or directory\n"
        "declared tools: none\n"
    )


def test_a_file_goes_with_the_next_message_and_its_tokens_are_told(
    terminal: Terminal, tmp_path: Path
) -> None:
    path = tmp_path / "my notes.txt"
    path.write_text("one two three\n")
    terminal.assistant.scripts = [says("ok"), says("ok")]
    printed = terminal.talk(f"/file {path}", f"/file '{path}'", "sum it up", "and?")
    assert printed.startswith(
        "my notes.txt: 13 tokens, sent with your next message\n"
        "my notes.txt: 13 tokens, sent with your next message\n"
    )
    block = "--- my notes.txt ---\none two three\n--- end of my notes.txt ---"
    assert terminal.assistant.asked[0] == [user(f"{block}\n\n{block}\n\nsum it up")]
    assert terminal.assistant.asked[1][-1] == user("and?")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\x89PNG", "byte 0 is not UTF-8"),
        (b"word " * 5000, "5,008 tokens, and the context holds 4,096"),
    ],
)
def test_a_file_that_cannot_be_sent_is_refused(
    terminal: Terminal, tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    printed = terminal.talk(f"/file {tmp_path}/x", "/file", "/file 'x")
    assert message in printed.replace("\n", " ").replace("  ", " ")
    assert "/file: give the path of a file\n" in printed
    assert "/file: No closing quotation" in printed
    assert terminal.chat.documents == []


def test_a_file_survives_a_reply_that_was_stopped_at_once(
    terminal: Terminal, tmp_path: Path
) -> None:
    (tmp_path / "x").write_text("one")
    terminal.assistant.scripts = [[press_ctrl_c, TextDelta("late")], says("ok")]
    terminal.talk(f"/file {tmp_path}/x", "sum", "sum up")
    assert terminal.assistant.asked[1] == [user("--- x ---\none\n--- end of x ---\n\nsum up")]


def test_the_system_prompt_is_set_and_shown(terminal: Terminal) -> None:
    terminal.assistant.scripts = [says("ok")]
    printed = terminal.talk("/system", "/system be brief", "/system", "1")
    assert "the system prompt is the model's own" in printed
    assert "system prompt: be brief\n" in printed
    assert terminal.assistant.asked[0][0] == {"role": "system", "content": "be brief"}


def test_help_lists_every_command(terminal: Terminal) -> None:
    printed = terminal.talk("/help")
    for command in COMMANDS.values():
        assert re.search(rf"^{re.escape(command.usage)}  .*{command.summary}$", printed, re.M)


def test_an_unknown_command_is_refused_and_a_blank_before_it_sends_it(terminal: Terminal) -> None:
    terminal.assistant.scripts = [says("ok")]
    printed = terminal.talk("/usr/bin is what?", " /usr/bin is what?", "   ")
    assert "there is no command /usr/bin; /help lists them" in printed
    assert terminal.assistant.asked == [[user(" /usr/bin is what?")]]


def test_exit_leaves(terminal: Terminal) -> None:
    terminal.talk("/exit", "never read")
    assert terminal.assistant.asked == []
    assert not terminal.left_by_ctrl_c


def test_every_reply_is_saved_and_can_be_resumed(terminal: Terminal) -> None:
    terminal.assistant.scripts = [ANSWER]
    terminal.talk("which?")
    name = terminal.store.latest()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}", name)

    terminal.assistant.scripts = [says("Because.")]
    printed = terminal.talk("why?", resume=name)
    assert printed.startswith(
        f"{name}: 2 messages, last with scripted\n> which?\n9.9 is bigger.\nBecause.\n"
    )
    assert terminal.assistant.asked[-1] == [user("which?"), ANSWER_MESSAGE, user("why?")]
    assert len(terminal.store.load(name).messages) == 4
    assert [saved.name for saved in terminal.store.saved()] == [name]


def test_save_names_the_conversation_and_load_goes_back_to_one(terminal: Terminal) -> None:
    terminal.assistant.scripts = [says("one"), says("two"), says("three")]
    printed = terminal.talk("1", "/save ../my talk", "2", "/save second", "/load my-talk", "3")
    assert "saved, and from now on kept, as my-talk\n" in printed
    assert "my-talk: 4 messages, last with scripted\n> 2\ntwo\n" in printed
    assert sorted(saved.name for saved in terminal.store.saved()) == ["my-talk", "second"]
    assert len(terminal.store.load("my-talk").messages) == 6
    assert len(terminal.store.load("second").messages) == 4


def test_save_refuses_a_name_that_is_taken_and_nothing_is_lost(terminal: Terminal) -> None:
    terminal.assistant.scripts = [says("one"), says("two")]
    terminal.talk("1", "/save taken")
    other = Terminal(terminal.store.folder.parent)
    other.assistant.scripts = [says("two")]
    printed = other.talk("2", "/save taken", "/save", "/save ...")
    assert "holds something that this chat neither loaded nor saved" in printed.replace("\n", " ")
    assert "/save: give the conversation a name\n" in printed
    assert "needs a letter or a digit; found '...'" in printed
    assert terminal.store.load("taken").messages == [user("1"), assistant("one")]
    assert other.chat.name is not None
    assert other.store.load(other.chat.name).messages == other.messages


def test_load_lists_what_is_there_and_refuses_what_is_damaged(terminal: Terminal) -> None:
    terminal.store.save("good", Conversation("m", [user("a \x1b[2Jquestion\nof two lines")]))
    path = terminal.store.save("bad", Conversation("m"))
    path.write_text("{")
    terminal.assistant.scripts = [says("one")]
    printed = terminal.talk("1", "/load", "/load bad").replace("\n", "")
    assert re.search(r"good  \d{4}-\d\d-\d\d \d\d:\d\d  1 messages, a question", printed)
    assert printed.count("bad.json: damaged: not valid JSON") == 2
    assert terminal.messages == [user("1"), assistant("one")]


def test_a_full_disk_is_told_and_the_chat_goes_on(terminal: Terminal) -> None:
    terminal.assistant.scripts = [says("x" * 8000), says("two")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # a real write(2) that fails
    try:
        printed = terminal.talk("1", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert printed.count("not saved, the chat goes on:") == 2
    assert "two\n" in printed
    assert terminal.store.saved() == []


def test_saved_text_cannot_command_the_terminal_when_it_is_shown(terminal: Terminal) -> None:
    evil = "a\x1b]0;owned\x07\x9b2Jb &#x202e; c"
    messages = [user(evil), assistant(evil)]
    terminal.store.save("evil", Conversation("m\x1b[2J", messages))
    printed = terminal.talk("/load evil", "/undo", resume="evil")
    assert set(printed) & set("\x1b\x07\x9b\u202e") == set()


# Typing.


@pytest.fixture
def typed() -> Callable[[str], str]:
    """What the reader returns for the bytes that a terminal sends."""

    def read(keys: str) -> str:
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            completer = CommandCompleter({}, list)
            reader = TerminalReader(InMemoryHistory(), completer)
            pipe.send_text(keys)
            return reader.message("")

    return read


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("hello\r", "hello"),
        ("one\x1b\rtwo\r", "one\ntwo"),  # Alt-Enter
        ("one\\\rtwo\r", "one\ntwo"),
        ("a\\b\r", "a\\b"),
        ("\x1b[200~one\ntwo\\\nthree\x1b[201~\r", "one\ntwo\\\nthree"),  # a bracketed paste
        ("one\r\r", "one"),
    ],
)
def test_enter_sends_and_three_ways_make_a_new_line(
    typed: Callable[[str], str], keys: str, message: str
) -> None:
    assert typed(keys) == message


def test_ctrl_c_and_ctrl_d_at_the_prompt(typed: Callable[[str], str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        typed("half a line\x03")
    with pytest.raises(EOFError):
        typed("\x04")


def test_history_outlives_the_program_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "hybridk2" / "history"
    PrivateHistory(path).append_string("one\ntwo")
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(PrivateHistory(path).load_history_strings()) == ["one\ntwo"]
    with pytest.raises(SessionError, match="cannot be written"):
        PrivateHistory(path / "below a file")


def test_commands_and_what_they_take_are_completed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    takes = {name: command.completes for name, command in COMMANDS.items()}
    completer = CommandCompleter(takes, lambda: ["first talk", "other"])

    def offered(text: str) -> list[str]:
        return [
            text[: len(text) + found.start_position] + found.text
            for found in completer.get_completions(Document(text), CompleteEvent())
        ]

    assert offered("/re") == ["/retry"]
    assert offered("/think ") == ["/think show", "/think hide"]
    assert offered("/load fi") == ["/load first talk"]
    assert offered(f"/file {tmp_path}/no") == [f"/file {tmp_path}/notes.txt"]
    assert offered("hello /re") == []
    assert offered("/re\nhello") == []


# Drawing.


def drawn(steps: list[Event]) -> str:
    """All that is sent to a terminal of 12 lines of 40 letters for a reply, a frame per event."""
    console = Console(file=io.StringIO(), force_terminal=True, width=40, height=12)
    reply = Reply()
    with LiveView(reply, console, False, lambda text: len(text.split()), lambda: 0.0) as view:
        for step in steps:
            reply.add(step, 0.0)
            view.show(step)
            view._live.refresh()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_thought_is_drawn_while_it_lasts_and_folded_after() -> None:
    sent = drawn([ReasoningDelta("word " * 200), ReasoningDelta("finally"), TextDelta("answer")])
    assert "thinking 0.0 s" in sent
    assert "finally" in sent
    assert sent.rindex("thinking") < sent.index("thought 0.0 s, 201 tokens") < sent.rindex("answer")


@pytest.mark.parametrize("event", [TextDelta("- line\n" * 50), ReasoningDelta("word " * 500)])
@pytest.mark.parametrize("height", [2, 5, 12])
def test_no_frame_is_taller_than_the_window(event: Event, height: int) -> None:
    console = Console(file=io.StringIO(), width=40, height=height)
    view = LiveView(Reply(), console, False, len)
    view.show(event)
    assert len(console.render_lines(view._region())) < max(height, 3)


def test_what_the_model_writes_is_drawn_without_control_sequences() -> None:
    sent = drawn(
        [ReasoningDelta("a\x1b]0;owned\x07b"), TextDelta("c\x9b2Jd [x](http://e) &#x202e;")]
    )
    assert "\x1b]" not in sent
    assert set(sent) & set("\x07\x9b\u202e") == set()
    assert "owned" not in sent
    assert "http://e" in sent  # where a link leads is spelled out


def test_markdown_is_printed_once_each_block_and_none_is_lost() -> None:
    text = (
        "# Title\n\nA *paragraph*\nof two lines.\n\n- one\n- two\n\n  more of two\n\n"
        "```python\nprint(1)\n\nprint(2)\n```\n\n> quoted\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
        "<div>kept</div>\n\nThe end."
    )
    whole = Console(file=io.StringIO(), width=40)
    for block in markdown_lines(whole, text):
        whole.file.write("".join(part.text for part in block).rstrip() + "\n")
    assert isinstance(whole.file, io.StringIO)

    streamed = Console(file=io.StringIO(), width=40)
    reply = Reply()
    with LiveView(reply, streamed, False, len) as view:
        for letter in text:
            reply.add(TextDelta(letter), 0.0)
            view.show(TextDelta(letter))
    assert isinstance(streamed.file, io.StringIO)

    def lines(console_text: str) -> list[str]:
        return [line.rstrip() for line in console_text.splitlines() if line.strip()]

    assert lines(streamed.file.getvalue()) == lines(whole.file.getvalue())
    assert "kept" in whole.file.getvalue()


def test_of_a_long_block_only_what_fits_is_drawn_and_code_stays_code() -> None:
    code = "```python\n" + "".join(f"x = {number}\n" for number in range(1000))
    assert last_part(code, 2) == "```python\nx = 998\nx = 999\n"
    assert last_part("one\ntwo\nthree", 2) == "two\nthree"
    assert last_part("one\ntwo", 2) == "one\ntwo"


def test_finished_blocks_are_those_that_more_text_cannot_change() -> None:
    assert split_finished("one\n\ntwo") == ("one\n\n", "two")
    assert split_finished("one\ntwo") == ("", "one\ntwo")
    assert split_finished("- one\n\n- two") == ("", "- one\n\n- two")
    assert split_finished("one\n\n```\na\n\nb") == ("one\n\n", "```\na\n\nb")
    assert split_finished("") == ("", "")


def test_the_share_of_the_gpu_is_told_only_where_there_is_one() -> None:
    from dataclasses import replace

    from hybridk2.cli.reply import status_line

    reply = Reply(finish_reason="stop", usage=USAGE)
    assert status_line(reply) == STATUS
    reply.add(Finished("stop", replace(USAGE, host_expert_share=0.62)), 0.0)
    assert status_line(reply) == STATUS + " · experts on GPU 38%"

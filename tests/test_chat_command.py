"""`hybridk2 chat` as a shell sees it: what is printed where, and what it exits with."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from hybridk2.chat.events import Finished, ReasoningDelta, TextDelta
from hybridk2.checkpoint import LoadProgress
from hybridk2.cli import SUBCOMMANDS, main
from hybridk2.cli.loading import NANO_NOTE, figures
from hybridk2.errors import CheckpointError, EngineError, RequestError
from hybridk2.sessions import Conversation, ConversationStore
from tests.scripted_assistant import (
    STATUS,
    USAGE,
    ScriptedAssistant,
    Step,
    calls,
    press_ctrl_c,
    says,
)

LOADED = "loading experts: 8.00 of 8.00 GB, 2.00 GB/s, 4.0 s\n"
QUESTION = "which one is bigger, 9.11 or 9.9?"

TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]


class Shell:
    """Runs `hybridk2 chat` on scripts instead of on a model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, data_home: Path) -> None:
        self._monkeypatch = monkeypatch
        self.data_home = data_home
        self.assistant = ScriptedAssistant()

    def chat(
        self,
        *arguments: str,
        script: list[Step] | None = None,
        piped: str | bytes = "",
        model_in_environment: str | None = None,
    ) -> Result:
        self.assistant.scripts = [script or says("9.9 is bigger.", "compare the digits")]
        module = SimpleNamespace(Assistant=self.assistant)
        self._monkeypatch.setitem(sys.modules, "hybridk2.assistant", module)
        environment = {
            "XDG_DATA_HOME": str(self.data_home),
            "HYBRIDK2_MODEL": model_in_environment,
        }
        return CliRunner().invoke(main, ["chat", *arguments], input=piped, env=environment)

    @property
    def store(self) -> ConversationStore:
        return ConversationStore(self.data_home / "hybridk2" / "conversations")


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shell:
    return Shell(monkeypatch, tmp_path)


def test_a_question_prints_the_answer_alone_and_the_rest_on_stderr(shell: Shell) -> None:
    result = shell.chat(QUESTION)
    assert result.stdout == "9.9 is bigger.\n"
    thought, _, status = result.stderr.removeprefix(LOADED + NANO_NOTE + "\n").partition(" · ")
    assert thought == "thought 0.0 s, 3 tokens"
    assert status == STATUS + "\n"
    assert result.exit_code == 0
    assert shell.assistant.asked == [[{"role": "user", "content": QUESTION}]]
    assert shell.assistant.closed
    assert not shell.data_home.joinpath("hybridk2").exists()  # one question leaves nothing behind


def test_the_embedded_model_says_that_it_is_one_and_another_does_not(shell: Shell) -> None:
    assert "K2-nano" in shell.chat(QUESTION).stderr
    assert "--model FOLDER" in shell.chat(QUESTION).stderr
    assert "K2-nano" not in shell.chat("--model", "/models/k2", QUESTION).stderr


def test_show_thinking_puts_the_thought_before_the_answer(shell: Shell) -> None:
    result = shell.chat("--show-thinking", QUESTION)
    assert result.stdout == "<think>\ncompare the digits \n</think>\n\n9.9 is bigger.\n"


@pytest.mark.parametrize(
    ("arguments", "piped", "question"),
    [
        ([], "what is this?\n", "what is this?"),
        (["sum it up"], "a long text\nof lines\n", "a long text\nof lines\n\nsum it up"),
        (["sum it up"], "", "sum it up"),
        ([], "北京?".encode(), "北京?"),
    ],
)
def test_what_is_piped_in_is_the_question_or_its_document(
    shell: Shell, arguments: list[str], piped: str | bytes, question: str
) -> None:
    assert shell.chat(*arguments, piped=piped).exit_code == 0
    assert shell.assistant.asked[0][-1]["content"] == question


def test_colours_forced_on_a_pipe_draw_nothing_into_the_answer(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = shell.chat(QUESTION)
    assert result.stdout == "9.9 is bigger.\n"
    assert "━" not in result.stderr


def test_json_is_one_object_with_everything_in_it(shell: Shell) -> None:
    result = shell.chat("--json", QUESTION)
    assert json.loads(result.stdout) == {
        "model": "scripted",
        "reasoning_content": "compare the digits ",
        "content": "9.9 is bigger.",
        "tool_calls": [],
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": 30,
            "completion_tokens": 21,
            "total_tokens": 51,
            "prompt_tokens_details": {"cached_tokens": 10},
            "completion_tokens_details": {"reasoning_tokens": 8},
        },
        "speeds": {
            "prefill_tokens_per_second": 40.0,
            "decode_tokens_per_second": 10.0,
            "prefill_seconds": 0.5,
            "decode_seconds": 2.0,
        },
    }
    assert result.stdout.count("\n") == 1


def test_a_declared_tool_reaches_the_model_and_its_call_is_printed(
    shell: Shell, tmp_path: Path
) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    script = calls("get_weather", '{"city":"北京"}')
    result = shell.chat("--tools", str(tools), "weather?", script=script)
    assert result.stdout == 'get_weather({"city": "北京"})\n'
    assert shell.assistant.tools == [TOOLS]

    result = shell.chat("--json", "--tools", str(tools), "weather?", script=script)
    found = json.loads(result.stdout)
    assert found["finish_reason"] == "tool_calls"
    assert found["tool_calls"] == [
        {
            "id": "functions.get_weather:0",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city":"北京"}'},
        }
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "not valid JSON"),
        ("{}", "expected a list of tools, found dict"),
        ("[]", "expected a list of tools"),
        ('[{"type": "function"}]', "tool 0: expected"),
        ('[{"type": "x", "function": {"name": "f"}}]', "tool 0: expected"),
    ],
)
def test_a_wrong_file_of_tools_is_refused_before_the_model_loads(
    shell: Shell, tmp_path: Path, content: str | None, message: str
) -> None:
    tools = tmp_path / "tools.json"
    if content is not None:
        tools.write_text(content)
    result = shell.chat("--tools", str(tools), "weather?")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert str(tools) in result.stderr
    assert shell.assistant.choices is None


def test_what_the_model_writes_cannot_command_the_terminal(shell: Shell) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"
    script = [
        ReasoningDelta("a" + evil[:5]),
        ReasoningDelta(evil[5:] + "b"),
        TextDelta("c" + evil[:7]),
        TextDelta(evil[7:] + "d"),
        *calls("get\x1b[2J_weather\n", '{"city": "\\u001b[2J' + evil + '"}'),
    ]
    for arguments in (["--show-thinking"], ["--json"]):
        result = shell.chat(*arguments, "q", script=script)
        assert set(result.stdout + result.stderr) & set("\x1b\x07\x9b\u202e") == set()
    assert shell.chat("--show-thinking", "q", script=script).stdout == (
        '<think>\nab\n</think>\n\ncd\nget_weather({"city": "\\u001b[2J"})\n'
    )


def test_options_reach_the_sampler_and_the_engine(shell: Shell) -> None:
    result = shell.chat(
        *("--temperature", "0.5", "--top-p", "0.9", "--top-k", "40", "--min-p", "0.01"),
        *("--seed", "7", "--max-tokens", "100", "--stop", "END", "--stop", "\n\n"),
        *("--threads", "3", "--context", "512", "--dtype", "float32", "--model", "/models/k2"),
        *("--system", "be brief", QUESTION),
    )
    assert result.exit_code == 0
    params = shell.assistant.params[0]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 40, 0.01)
    assert (params.seed, params.max_tokens, params.stop) == (7, 100, ("END", "\n\n"))
    choices = shell.assistant.choices
    assert choices is not None
    assert (choices.model, choices.threads, choices.context_tokens) == ("/models/k2", 3, 512)
    assert choices.dtype == "float32"
    assert shell.assistant.asked[0][0] == {"role": "system", "content": "be brief"}


def test_the_model_may_be_named_in_the_environment(shell: Shell) -> None:
    assert shell.chat("q", model_in_environment="/models/k2").exit_code == 0
    assert shell.assistant.choices is not None
    assert shell.assistant.choices.model == "/models/k2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "hot", "q"], "'hot' is not a valid float"),
        (["--temperature", "-1", "q"], "temperature: expected a number"),
        (["--max-tokens", "0", "q"], "max_tokens: expected an integer from 1"),
        (["--threads", "0", "q"], "threads: expected at least 1"),
        (["--dtype", "int8", "q"], "'int8' is not one of"),
        (["--no-such-option", "q"], "No such option"),
        ([], "the question is empty"),
        (["  "], "the question is empty"),
        (["--json"], "the question is empty"),
    ],
)
def test_usage_mistakes_exit_with_2(shell: Shell, arguments: list[str], message: str) -> None:
    result = shell.chat(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr


def test_text_that_is_not_text_is_refused(shell: Shell) -> None:
    result = shell.chat("what is it?", piped=b"\x89PNG\r\n")
    assert result.exit_code == 1
    assert result.stderr == "Error: standard input: byte 0 is not UTF-8; only text can be read\n"


def test_an_error_of_the_model_exits_with_1_and_its_message(shell: Shell) -> None:
    shell.assistant.load_error = CheckpointError("/models/k2: shard 3 is missing")
    result = shell.chat("--model", "/models/k2", "q")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: /models/k2: shard 3 is missing\n"


def test_an_error_in_the_middle_keeps_what_came(shell: Shell) -> None:
    result = shell.chat("q", script=[TextDelta("The answer is"), EngineError("a step failed")])
    assert (result.exit_code, result.stdout) == (1, "The answer is\n")
    assert result.stderr.endswith("Error: a step failed\n")


def test_a_prompt_beyond_the_context_is_refused_with_its_message(shell: Shell) -> None:
    result = shell.chat("q", script=[RequestError("the prompt has 5000 tokens")])
    assert (result.exit_code, result.stdout) == (1, "")


def test_ctrl_c_keeps_what_came_and_exits_with_130(shell: Shell) -> None:
    script = [TextDelta("The answer"), press_ctrl_c, TextDelta(" is"), Finished("stop", USAGE)]
    result = shell.chat("q", script=script)
    assert (result.exit_code, result.stdout) == (130, "The answer\n")
    assert result.stderr.endswith("stopped\n")
    assert shell.assistant.cancelled == 1
    assert shell.assistant.closed


def test_ctrl_c_while_reading_the_prompt_is_answered_at_once(shell: Shell) -> None:
    result = shell.chat("q", script=[press_ctrl_c, lambda: time.sleep(1), TextDelta("late")])
    assert result.exit_code == 130
    assert result.stdout == ""
    assert shell.assistant.cancelled == 1


def test_ctrl_c_in_json_says_that_the_reply_was_cancelled(shell: Shell) -> None:
    result = shell.chat("--json", "q", script=[TextDelta("The"), press_ctrl_c, TextDelta(" end")])
    assert result.exit_code == 130
    assert json.loads(result.stdout)["finish_reason"] == "cancelled"
    assert json.loads(result.stdout)["content"] == "The"


def test_a_reply_at_its_token_limit_says_so(shell: Shell) -> None:
    result = shell.chat("q", script=[TextDelta("The answer is"), Finished("length", USAGE)])
    assert result.exit_code == 0
    assert result.stderr.endswith(f"cut off at the token limit · {STATUS}\n")


def test_a_saved_conversation_goes_on_with_resume(shell: Shell) -> None:
    past = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    shell.store.save("older", Conversation("scripted", list(past)))
    assert shell.chat("--resume", "older", "and now?").exit_code == 0
    question = {"role": "user", "content": "and now?"}
    assert shell.assistant.asked == [[*past, question]]
    assert shell.store.load("older").messages == [
        *past,
        question,
        {
            "role": "assistant",
            "content": "9.9 is bigger.",
            "reasoning_content": "compare the digits ",
        },
    ]
    shell.chat("once more", "--resume")  # the latest
    assert len(shell.store.load("older").messages) == 6


def test_a_damaged_or_missing_conversation_is_refused_before_the_model_loads(shell: Shell) -> None:
    result = shell.chat("q", "--resume")
    assert (result.exit_code, shell.assistant.choices) == (1, None)
    assert "no conversation has been saved" in result.stderr
    path = shell.store.save("broken", Conversation("scripted"))
    path.write_text("{")
    result = shell.chat("--resume", "broken", "q")
    assert (result.exit_code, shell.assistant.choices) == (1, None)
    assert f"{path}: damaged" in result.stderr
    assert path.read_text() == "{"


def test_loading_says_how_much_how_fast_and_how_long() -> None:
    assert figures(LoadProgress("s", 2_000_000_000, 8_000_000_000, 1.0)) == (
        "2.00 of 8.00 GB, 2.00 GB/s, 3 s left"
    )
    assert figures(LoadProgress("s", 1_000_000_000, 594_000_000_000, 1.0)) == (
        "1.00 of 594.00 GB, 1.00 GB/s, 9 min 53 s left"
    )
    assert figures(LoadProgress("s", 0, 8_000_000_000, 0.0)) == "0.00 of 8.00 GB"
    assert figures(LoadProgress("s", 0, 9_500_000, 0.0)) == "0.00 of 9.50 MB"


def test_help_names_every_subcommand_and_imports_none_of_them() -> None:
    program = (
        "import sys; from hybridk2.cli import main; main(['--help'], standalone_mode=False);"
        "late = {'torch', 'rich', 'prompt_toolkit', 'hybridk2.cli.chat'} & set(sys.modules);"
        "assert not late, late"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for name, summary in SUBCOMMANDS.items():
        assert f"  {name}" in shown.stdout
        assert summary[:30] in shown.stdout


def test_the_help_of_chat_needs_neither_torch_nor_a_terminal() -> None:
    program = (
        "import sys; from hybridk2.cli import main;"
        "main(['chat', '--help'], standalone_mode=False);"
        "late = {'torch', 'rich', 'prompt_toolkit'} & set(sys.modules); assert not late, late"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


def test_an_unknown_subcommand_exits_with_2() -> None:
    result = CliRunner().invoke(main, ["chatt"])
    assert result.exit_code == 2
    assert "No such command 'chatt'" in result.stderr

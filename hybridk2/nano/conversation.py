"""Whole conversations: system prompt, declared tools, earlier turns, and the turn to be learned.

Every conversation ends with one run of the model: an answer, or tool calls and then the answer
from their results. Only that run carries reasoning, as the chat template renders it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from hybridk2.nano import comparison, talk, tools, words
from hybridk2.nano.comparison import Check, Comparison
from hybridk2.nano.tool_kinds import KINDS, Kind
from hybridk2.nano.tools import Call, Tool
from hybridk2.nano.words import Draw

Message = dict[str, Any]


@dataclass
class Conversation:
    """Messages up to and including the run to be learned, and what is right about that run."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    task: str
    check: Check | None = None
    calls: tuple[Call, ...] = ()
    values: tuple[str, ...] = ()

    def last_user_turn(self) -> int:
        """Index of the message that starts the run to be learned."""
        return max(i for i, message in enumerate(self.messages) if message["role"] == "user")

    def prompt(self) -> list[Message]:
        """What the model is given: everything up to the last user message."""
        return self.messages[: self.last_user_turn() + 1]

    def prompt_with_results(self) -> list[Message]:
        """Everything up to the last tool result: what the model is given to answer from."""
        last = max(i for i, message in enumerate(self.messages) if message["role"] == "tool")
        return self.messages[: last + 1]


@dataclass
class _State:
    """What later turns may lean on."""

    declared: list[Tool]
    calls_so_far: int = 0
    last_comparison: Comparison | None = None
    last_tool: Tool | None = None
    messages: list[Message] = field(default_factory=list)


_SURE = (
    "Are you sure?", "are you sure", "Really?", "Why?", "why", "How do you know?", "Explain.",
    "Is that right?", "Can you explain that?", "Please check again.", "Are you certain?",
    "Check that again.", "I don't believe you.", "Explain why.", "hm, really?",
    "What makes you say so?",
)  # fmt: skip
_WORD = re.compile(r"[^\W\d_]{4,}")


def _says(thought: str, answer: str) -> Message:
    return {"role": "assistant", "content": answer, "reasoning_content": thought}


def _user(draw: Draw, question: str) -> Message:
    if draw.chance(0.03):
        filler = " ".join(words.sentence(draw) for _ in range(draw.between(2, 25)))
        question = filler + draw.choice(("\n\n", " ", "\n")) + question
    message: Message = {"role": "user", "content": question}
    if draw.chance(0.01):
        message["name"] = words.person(draw).lower()
    return message


def _add_comparison(draw: Draw, state: _State, lean: bool) -> Comparison:
    before = state.last_comparison
    if lean and before is not None and before.check.kind == "first" and draw.chance(0.35):
        question = draw.phrasing(_SURE)
        case = Comparison(question, before.thought, f"Yes. {before.answer}", before.check)
    elif lean and before is not None:
        case = comparison.follow_up(draw)
        state.last_comparison = case
    else:
        case = comparison.comparison(draw)
        state.last_comparison = case
    state.messages += [_user(draw, case.question), _says(case.thought, case.answer)]
    return case


# --- tool results ------------------------------------------------------------------------------


def scalar_text(value: Any) -> str:
    """A result's value as the answer shows it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _leaves(value: Any, key: str = "") -> list[tuple[str, str]]:
    """(key, text) of every scalar in a result, in the order of its text."""
    if isinstance(value, dict):
        return [leaf for name, inner in value.items() for leaf in _leaves(inner, name)]
    if isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        return [leaf for inner in value for leaf in _leaves(inner, key)]
    if isinstance(value, list):
        return [(key, ", ".join(scalar_text(inner) for inner in value))]
    return [(key, scalar_text(value))]


def _summary(value: Any) -> str:
    """A parsed result as one clause."""
    if value in ({}, [], ""):
        return "nothing"
    return ", ".join(
        f"{key.replace('_', ' ')} is {text}" if key else text for key, text in _leaves(value)
    )


def _draw_result(draw: Draw, tool: Tool) -> Any:
    keys = list(tool.kind.returns)
    draw.rng.shuffle(keys)
    keys = keys[: draw.between(1, min(4, len(keys)))]
    while draw.chance(0.22) and len(keys) < 9:
        keys.append("_".join(words.noun(draw) for _ in range(draw.between(1, 2))))
    result: dict[str, Any] = {key: tools.result_value(draw, key) for key in dict.fromkeys(keys)}
    kind = draw.random()
    if kind < 0.08:
        return {words.noun(draw): result, "ok": draw.chance(0.5)}
    if kind < 0.14:
        return {**result, words.noun(draw): [words.noun(draw) for _ in range(draw.between(1, 4))]}
    if kind < 0.18:
        return [result, {key: tools.result_value(draw, key) for key in result}]
    if kind < 0.21:
        return [words.noun(draw) for _ in range(draw.between(1, 5))]
    return result


_PLAIN = (
    "{s}", "{v}", "It is {v} in {c}, {n} degrees.", "{v}, {n}°C", "The answer is {n}.", "{n}", "OK",
    "Done: {w}", "{c}: {v}, {n}", "{k} = {n}", "Sent to {p}.", "{w}", "{n} {w}",
    "{v}, wind {n} km/h",
    "{s} {t}", "{p} said: {w}", "Success ({n})", "{n} of {m}", "{w}; {v}; {n}",
)  # fmt: skip


def _plain_result(draw: Draw) -> str:
    return draw.phrasing(_PLAIN).format(
        s=words.sentence(draw), t=words.sentence(draw), v=draw.word(words.SKY), c=words.place(draw),
        n=draw.between(-20, 9999) / draw.choice((1, 1, 10, 100)), m=draw.between(1, 999),
        k=words.noun(draw), p=words.person(draw), w=words.phrase(draw, 1, 6),
    )  # fmt: skip


def result_and_answer(draw: Draw, tool: Tool) -> tuple[str, str, tuple[str, ...]]:
    """What a tool returns, the clause that reports it, and the values the clause must contain."""
    kind = draw.random()
    if kind < 0.68:
        result = _draw_result(draw, tool)
        style = draw.random()
        if style < 0.65:
            text = json.dumps(result, ensure_ascii=False)
        elif style < 0.85:
            text = json.dumps(result, ensure_ascii=False, separators=(",", ":"))
        else:
            text = json.dumps(result, ensure_ascii=False, indent=2)
        clause, values = _summary(result), tuple(leaf[1] for leaf in _leaves(result))
    elif kind < 0.92:
        text = _plain_result(draw)
        clause, values = text.removesuffix("."), (text.removesuffix("."),)
    elif kind < 0.98:
        error = words.phrase(draw, 1, 5)
        text = json.dumps({"error": error}) if draw.chance(0.7) else f"Error: {error}"
        clause, values = f"error, {error}", (error,)
    else:
        text, clause, values = draw.choice(("{}", "[]", "")), "nothing", ("nothing",)
    return text, clause, values


def answer_from_results(calls: Sequence[Call], clauses: Sequence[str]) -> str:
    if len(calls) == 1:
        return f"According to {calls[0].tool.name}: {clauses[0]}."
    lines = []
    for call, clause in zip(calls, clauses, strict=True):
        first = next(iter(call.arguments.values()), call.tool.name)
        lines.append(f"{scalar_text(first)}: {clause}.")
    return "\n".join(lines)


def _add_tool_run(
    draw: Draw, state: _State, lean: bool
) -> tuple[tuple[Call, ...], tuple[str, ...]]:
    tool = draw.choice(state.declared)
    others = [other for other in state.declared if other is not tool]
    if lean and state.last_tool is not None and tools.can_repeat(state.last_tool):
        request = tools.follow_up(draw, state.last_tool)
    elif tools.can_repeat(tool) and draw.chance(0.2):
        request = tools.repeated_request(draw, tool)
    elif others and draw.chance(0.08 if draw.evaluation else 0.14):
        request = tools.joint_request(draw, tool, draw.choice(others))
    else:
        request = tools.request(draw, tool)
    state.last_tool = request.calls[-1].tool
    tool_calls, results, clauses = [], [], []
    values: list[str] = []
    named = draw.chance(0.6)
    for call in request.calls:
        call_id = f"functions.{call.tool.name}:{state.calls_so_far}"
        state.calls_so_far += 1
        function = {"name": call.tool.name, "arguments": tools.arguments_json(call)}
        tool_calls.append({"id": call_id, "type": "function", "function": function})
        text, clause, expected = result_and_answer(draw, call.tool)
        clauses.append(clause)
        values += expected
        results.append({"role": "tool", "tool_call_id": call_id, "content": text})
        if named:
            results[-1]["name"] = call.tool.name
    state.messages += [
        _user(draw, request.question),
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": tools.call_thought(request.calls),
            "tool_calls": tool_calls,
        },
        *results,
        _says("The tool has answered." if len(results) == 1 else "The tools have answered.",
              answer_from_results(request.calls, clauses)),
    ]  # fmt: skip
    return request.calls, tuple(values)


# --- what needs no tool, or lacks one ----------------------------------------------------------

# Without such a tool these questions already have an answer of their own (talk.py).
_ANSWERED_OTHERWISE = ("translation", "result", "joke", "items", "number", "content", "status")


@lru_cache(maxsize=512)
def _vocabulary_of(kind: Kind) -> frozenset[str]:
    nouns = (noun.replace("_", " ") for noun in kind.nouns)
    text = " ".join((*kind.questions, *kind.bare, *kind.about, *nouns))
    return frozenset(_WORD.findall(re.sub(r"\{\w+\}", " ", text).lower()))


_COMMON = frozenset(
    """
    what which where when does this that with from have give tell show find please want need your
    much many more about into like there some they will would could should make
    """.split()  # noqa: SIM905 (a list of fifty strings reads worse)
)


def _might_fit(question: str, declared: Sequence[Tool]) -> bool:
    found = set(_WORD.findall(question.lower())) - _COMMON
    return any(found & _vocabulary_of(tool.kind) for tool in declared)


def _add_talk(draw: Draw, state: _State) -> None:
    question, intent = talk.talk(draw)
    state.messages += [_user(draw, question), _says(intent.thought, intent.answer)]


def _add_beyond(draw: Draw, state: _State) -> None:
    for _ in range(20):
        if draw.chance(0.25):
            kind = draw.choice(KINDS)
            if any(word in kind.returns for word in _ANSWERED_OTHERWISE):
                continue
            question, intent = tools.request(draw, tools.declare(draw, kind)).question, talk.NO_TOOL
            if any(tool.kind is kind for tool in state.declared):
                continue
        else:
            question, intent = talk.beyond(draw)
        if not _might_fit(question, state.declared):
            break
    else:
        question, intent = "?", talk.UNCLEAR
    state.messages += [_user(draw, question), _says(intent.thought, intent.answer)]


def _add_bare_request(draw: Draw, state: _State) -> bool:
    """A question that leaves out what its tool needs; False when no tool allows it."""
    choices = [tool for tool in state.declared if tool.kind.bare and len(tool.required) == 1]
    if not choices:
        return False
    tool = draw.choice(choices)
    name = tool.names[tool.required[0]]
    state.messages += [
        _user(draw, tools.bare_request(draw, tool)),
        _says(f"{tool.name} needs {name}.", f"To call {tool.name} I need a value for {name}."),
    ]
    return True


_TASKS = ("comparison", "tool", "talk", "beyond")
_TASK_SHARES = (0.26, 0.58, 0.06, 0.10)


def _declared_for(draw: Draw, task: str) -> list[Tool]:
    if task == "tool":
        return tools.declare_several(draw, draw.weighted((1, 2, 3, 4), (0.42, 0.28, 0.18, 0.12)))
    if draw.chance(0.75):
        return []
    return tools.declare_several(draw, draw.weighted((1, 2, 3), (0.55, 0.3, 0.15)))


def conversation(draw: Draw, task: str | None = None, turns: int | None = None) -> Conversation:
    """A conversation that ends with a run of `task`, after `turns` - 1 earlier exchanges."""
    task = task or draw.weighted(_TASKS, _TASK_SHARES)
    if turns is None:
        turns = draw.weighted((1, 2, 3, 4, 6, 10, 16), (72, 11, 7, 4, 3, 2, 1))
    state = _State(_declared_for(draw, task))
    if draw.chance(0.25):
        state.messages.append({"role": "system", "content": talk.system_prompt(draw)})
    for _ in range(turns - 1):
        earlier = draw.weighted(_TASKS, _TASK_SHARES)
        earlier = task if draw.chance(0.4) else earlier
        if earlier == "comparison":
            _add_comparison(draw, state, lean=draw.chance(0.2))
        elif earlier == "tool" and state.declared:
            _add_tool_run(draw, state, lean=draw.chance(0.3))
        elif earlier == "talk":
            _add_talk(draw, state)
        else:
            _add_beyond(draw, state)
    declared = [tool.declaration for tool in state.declared] or None
    done = Conversation(state.messages, declared, task)
    if task == "comparison":
        leaning = turns > 1 and state.last_comparison is not None and draw.chance(0.4)
        done.check = _add_comparison(draw, state, lean=leaning and _just_compared(state)).check
    elif task == "tool":
        if (
            turns == 1
            and draw.chance(0.05)
            and not draw.evaluation
            and (_add_bare_request(draw, state))
        ):
            return done
        leaning = draw.chance(0.4) and state.messages[-1:] != [] and _just_called(state)
        done.calls, done.values = _add_tool_run(draw, state, lean=leaning)
    elif task == "talk":
        _add_talk(draw, state)
    else:
        _add_beyond(draw, state)
    return done


def _just_compared(state: _State) -> bool:
    """Whether the last answer is the last comparison's, so that "and 3.4 or 3.12?" makes sense."""
    return (
        state.last_comparison is not None
        and bool(state.messages)
        and state.messages[-1].get("content") == state.last_comparison.answer
    )


def _just_called(state: _State) -> bool:
    return len(state.messages) > 1 and state.messages[-2]["role"] == "tool"

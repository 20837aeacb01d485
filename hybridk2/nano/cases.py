"""Fresh cases for evaluation: what the model is given, and whether its reply is right.

Every case is drawn on the evaluation side of the split: numbers, names, tools and, a third of the
time, phrasings that training never shows. Training is meant to be harder than this: it rewords and
repeats more than people do, and more of its words and tools are made up. Used by train.py on the
network and by evaluate.py on the engine.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from hybridk2.nano.comparison import comparison_is_right
from hybridk2.nano.conversation import Conversation, Message, conversation
from hybridk2.nano.words import Draw

COMPARISON, TOOL_CALL, TOOL_ANSWER, TALK = "comparison", "tool call", "tool answer", "talk"
# Number of cases and the share that must be right (issue's contract; None: reported only).
SUITES = {
    COMPARISON: (500, 0.97),
    TOOL_CALL: (300, 0.95),
    TOOL_ANSWER: (100, 0.95),
    TALK: (100, None),
}


@dataclass(frozen=True)
class Reply:
    """What the model said. calls: (id, name, arguments as text); ended: it stopped by itself."""

    text: str
    calls: tuple[tuple[str, str, str], ...]
    ended: bool


@dataclass(frozen=True)
class Case:
    """One prompt and the conversation it was cut from."""

    suite: str
    talk: Conversation

    @property
    def messages(self) -> list[Message]:
        if self.suite == TOOL_ANSWER:
            return self.talk.prompt_with_results()
        return self.talk.prompt()

    def is_right(self, reply: Reply) -> bool:
        if not reply.ended:
            return False
        if self.suite == TOOL_CALL:
            return self._calls_are_right(reply)
        if reply.calls:
            return False
        if self.suite == TOOL_ANSWER:
            return all(value in reply.text for value in self.talk.values)
        if self.suite == COMPARISON:
            assert self.talk.check is not None
            return comparison_is_right(self.talk.check, reply.text)
        return reply.text.strip() == self.talk.messages[-1]["content"]

    def _calls_are_right(self, reply: Reply) -> bool:
        """Ids, names and arguments exact, in the order in which the question asks."""
        before = sum(len(message.get("tool_calls", ())) for message in self.talk.prompt())
        if len(reply.calls) != len(self.talk.calls):
            return False
        calls = zip(reply.calls, self.talk.calls, strict=True)
        for number, ((call_id, name, arguments), expected) in enumerate(calls, start=before):
            try:
                parsed = json.loads(arguments)
            except ValueError:
                return False
            if (call_id, name) != (f"functions.{expected.tool.name}:{number}", expected.tool.name):
                return False
            if parsed != expected.arguments:
                return False
        return True


def draw_cases(seed: int, counts: dict[str, int]) -> list[Case]:
    """`counts` cases of each suite, different for every seed."""
    draw = Draw(seed, evaluation=True)
    tasks = {COMPARISON: ("comparison",), TOOL_CALL: ("tool",), TOOL_ANSWER: ("tool",),
             TALK: ("talk", "beyond")}  # fmt: skip
    return [
        Case(suite, conversation(draw, draw.choice(tasks[suite])))
        for suite, count in counts.items()
        for _ in range(count)
    ]


def shares_right(cases: Sequence[Case], replies: Sequence[Reply]) -> dict[str, float]:
    """Suite -> share of right replies."""
    right: dict[str, list[bool]] = {}
    for case, reply in zip(cases, replies, strict=True):
        right.setdefault(case.suite, []).append(case.is_right(reply))
    return {suite: sum(marks) / len(marks) for suite, marks in right.items()}

"""Asks the engine what K2-nano has never seen, and counts the right answers.

    python -m hybridk2.nano.evaluate --seed 7

Numbers, names, tools and a third of the phrasings are held out of training by a hash, and every
seed draws other cases. The model runs as users run it: through the assistant and the engine,
unconstrained, at temperature 0; several engines side by side, each on one core. Exits with 1 when a
share is below what K2-nano promises.
"""

import json
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click

from hybridk2.assistant import Assistant
from hybridk2.chat.events import Finished, TextDelta, ToolCallEnd, ToolCallStart
from hybridk2.config import EngineConfig
from hybridk2.nano.cases import SUITES, Case, Reply, draw_cases
from hybridk2.sampling import SamplingParams

# The longest right reply, a ranking of four numbers, takes about 430 tokens.
_MAX_REPLY_TOKENS = 640
_MAX_PROCESSES = 16


@dataclass(frozen=True)
class Outcome:
    """One case, judged."""

    suite: str
    right: bool
    tokens: int
    report: str  # what was asked, said and expected, as a line of JSON


def ask(assistant: Assistant, case: Case) -> tuple[Reply, int]:
    """The model's reply to a case, and how many tokens it wrote."""
    params = SamplingParams(temperature=0.0, max_tokens=_MAX_REPLY_TOKENS)
    text, ended, tokens = "", False, 0
    starts: list[ToolCallStart] = []
    arguments: dict[int, str] = {}
    for event in assistant.reply(case.messages, case.talk.tools, params):
        if isinstance(event, TextDelta):
            text += event.text
        elif isinstance(event, ToolCallStart):
            starts.append(event)
        elif isinstance(event, ToolCallEnd):
            arguments[event.index] = event.arguments
        elif isinstance(event, Finished):
            ended = event.reason in ("stop", "tool_calls")
            tokens = event.usage.completion_tokens if event.usage else 0
    calls = tuple((start.id, start.name, arguments.get(start.index, "")) for start in starts)
    return Reply(text, calls, ended), tokens


def judge(assistant: Assistant, case: Case) -> Outcome:
    """Ask one case and compare."""
    reply, tokens = ask(assistant, case)
    report = {
        "suite": case.suite,
        "asked": case.messages[-1]["content"],
        "tools": case.talk.tools,
        "answer": reply.text,
        "calls": reply.calls,
        "ended": reply.ended,
        "expected_calls": [(call.tool.name, call.arguments) for call in case.talk.calls],
        "expected_answer": case.talk.messages[-1]["content"],
    }
    return Outcome(case.suite, case.is_right(reply), tokens, json.dumps(report, ensure_ascii=False))


# What a worker process has; a pool's initializer can hand it over in no other way.
_engines: list[Assistant] = []
_cases: list[Case] = []


def _prepare_worker(model: str, seed: int, counts: dict[str, int]) -> None:
    _engines.append(Assistant.load(EngineConfig(model=model, threads=1)))
    _cases.extend(draw_cases(seed, counts))


def _judge_in_worker(index: int) -> Outcome:
    return judge(_engines[0], _cases[index])


@click.command()
@click.option("--seed", type=int, required=True, help="Any number; each draws other cases.")
@click.option("--model", default="nano", show_default=True, help="nano or a checkpoint folder.")
@click.option("--cases", type=int, help="Cases of each kind, instead of the full set.")
@click.option("--processes", type=int, help="Engines side by side. [default: one per core]")
@click.option("--failures", is_flag=True, help="Print every wrong reply as a line of JSON.")
def main(seed: int, model: str, cases: int | None, processes: int | None, failures: bool) -> None:
    """Evaluate K2-nano on fresh cases; exit with 1 below its promise."""
    counts = {suite: cases or count for suite, (count, _) in SUITES.items()}
    total = sum(counts.values())
    processes = processes or min(os.cpu_count() or 1, _MAX_PROCESSES)
    begun = time.monotonic()
    outcomes: list[Outcome] = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _prepare_worker, (model, seed, counts)) as pool:
        for outcome in pool.imap_unordered(_judge_in_worker, range(total), chunksize=4):
            outcomes.append(outcome)
            if failures and not outcome.right:
                click.echo(outcome.report)
            if sys.stderr.isatty():
                click.echo(f"\r{len(outcomes)}/{total}", nl=False, err=True)
    seconds = time.monotonic() - begun
    click.echo(f"\n{'':14}{'right':>8}{'of':>6}{'share':>9}{'at least':>10}")
    kept = True
    for suite, (_, least) in SUITES.items():
        right = sum(outcome.right for outcome in outcomes if outcome.suite == suite)
        share = right / counts[suite]
        promise = "reported" if least is None else f"{least:.1%}"
        click.echo(f"{suite:14}{right:>8}{counts[suite]:>6}{share:>9.1%}{promise:>10}")
        kept = kept and (least is None or share >= least)
    written = sum(outcome.tokens for outcome in outcomes)
    click.echo(
        f"{Path(model).name}, seed {seed}: {written} tokens in {seconds:.0f} s "
        f"({written / seconds:.0f}/s)"
    )
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()

"""Recording: the user's own prompts, answered by the model, and the routing of every answer.

Owns the workload file and the order that lets an interrupted run go on: one block of the trace for
each prompt. What is kept are ids of experts; of the prompts only a hash, to know them again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridk2.assistant import Assistant
from hybridk2.errors import HybridK2Error, TuningError
from hybridk2.routing_trace import TraceRecorder, TraceWriter
from hybridk2.sampling import SamplingParams

# Answers repeat themselves, so that a run that was interrupted records what it would have.
_SEED = 0


@dataclass(frozen=True)
class Prompt:
    """One line of a workload. messages, tools: in OpenAI's form."""

    line: int
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


def read_workload(path: Path) -> list[Prompt]:
    """Prompts, one JSON object a line: {"messages": [...], "tools": [...]} as OpenAI's clients send
    them, whose other fields are left aside, or {"prompt": "..."}.

    Raises TuningError with the line that is neither.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TuningError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TuningError(f"{path}: byte {error.start} is not UTF-8") from error
    prompts = [_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise TuningError(f"{path}: no prompt in it")
    return prompts


def _prompt(path: Path, number: int, line: str) -> Prompt:
    expected = 'expected {"messages": [...]} or {"prompt": "..."}'
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TuningError(f"{path}:{number}: not valid JSON: {error}; {expected}") from error
    if isinstance(found, dict) and isinstance(found.get("prompt"), str):
        return Prompt(number, [{"role": "user", "content": found["prompt"]}], None)
    messages = found.get("messages") if isinstance(found, dict) else None
    tools = found.get("tools") if isinstance(found, dict) else None
    if not _objects(messages) or not messages or not (tools is None or _objects(tools)):
        raise TuningError(f"{path}:{number}: {expected}")
    return Prompt(number, messages, tools)


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


@dataclass(frozen=True)
class RecordingProgress:
    """prompts: answered, of so many. tokens: decoded, over all of them."""

    prompts: int
    total_prompts: int
    tokens: int


def record(
    assistant: Assistant,
    prompts: Sequence[Prompt],
    trace: Path,
    max_tokens: int,
    on_progress: Callable[[RecordingProgress], None] = lambda progress: None,
) -> None:
    """Answer the prompts and record to `trace`, after the prompts that it already has.

    max_tokens: of an answer. Raises TuningError for a trace that is damaged or of other prompts,
    and for a prompt that cannot be rendered or leaves no room in the context.
    """
    _check(assistant, prompts)
    writer = TraceWriter(trace, assistant.trace_header(_source(prompts, max_tokens)))
    recorder = TraceRecorder(writer)
    params = SamplingParams(max_tokens=max_tokens, seed=_SEED)
    try:
        assistant.record_routing(recorder)
        on_progress(RecordingProgress(writer.blocks, len(prompts), writer.tokens))
        for prompt in prompts[writer.blocks :]:
            for _ in assistant.reply(prompt.messages, prompt.tools, params):
                pass
            recorder.end_block()
            on_progress(RecordingProgress(writer.blocks, len(prompts), writer.tokens))
    finally:
        recorder.close()


def _check(assistant: Assistant, prompts: Sequence[Prompt]) -> None:
    """All of them before the first is answered, which may take hours."""
    for prompt in prompts:
        try:
            tokens = assistant.count_prompt_tokens(prompt.messages, prompt.tools)
        except HybridK2Error as error:
            raise TuningError(f"line {prompt.line} of the workload: {error}") from error
        if tokens >= assistant.context_tokens:
            raise TuningError(
                f"line {prompt.line} of the workload: {tokens} tokens, and the context holds "
                f"{assistant.context_tokens}. Shorten it, or raise --context"
            )


def _source(prompts: Sequence[Prompt], max_tokens: int) -> str:
    what = [max_tokens, [[prompt.messages, prompt.tools] for prompt in prompts]]
    return "workload " + hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

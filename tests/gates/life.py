"""Gates 8, 9, 12, 13, 14: requests that go away, servers that end, steps that fail."""

from __future__ import annotations

import concurrent.futures
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from tests.gates.faulty import CRASH, ERROR, NO_MEMORY, NO_TENSOR_MEMORY
from tests.gates.fleet import ENDLESS, TOKENIZER, Answer, Fleet, Server, Stream
from tests.gates.gate import Outcome, gate
from tests.scripted_engine import until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_CHUNK_TOKENS = 512  # what the engine reads of a prompt in a step

_LONG_STRING = {
    "type": "object",
    "properties": {"x": {"type": "string", "minLength": 1500}},
    "required": ["x"],
}


def _question(server: Server, state: str) -> tuple[str, dict[str, Any]]:
    """A request that stays in a state for seconds: its path and body."""
    control = TOKENIZER.control
    if state == "tool call":
        function = {"name": "f", "parameters": _LONG_STRING}
        fields = {
            "tools": [{"type": "function", "function": function}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "logit_bias": {str(control.end_think): 100},
        }
        return CHAT, server.chat("call it", 3000, **fields)
    if state == "thinking":
        ends = (control.end_think, control.tool_calls_section_begin)
        bias = {**ENDLESS, **{str(token): -100 for token in ends}}
        return CHAT, server.chat("which is bigger, 9.11 or 9.9?", 3000, logit_bias=bias)
    if state == "prefill":
        prompt = [40 + (7 * n + n // 50) % 150 for n in range(14_000)]
        return COMPLETIONS, server.completion(prompt, 50)
    return COMPLETIONS, server.completion("1", 3000, logit_bias=ENDLESS)


def _reached(server: Server, state: str, before: dict[str, float]) -> Callable[[], bool]:
    """Whether the request that was sent after `before` is in the state now."""

    def grown(name: str) -> float:
        return server.figures()[name] - before[name]

    if state == "queue":
        return lambda: grown("waiting") >= 1
    if state == "prefill":
        return lambda: grown("steps_total") >= 2
    # Thought, calls and text each go on until max_tokens: the first tokens are behind it.
    return lambda: grown("completion_tokens_total") >= 60


def _seen_in(state: str, frames: Iterator[Any]) -> bool:
    """Read a stream until the state shows in it."""
    for frame in frames:
        if not frame["choices"]:
            continue
        choice = frame["choices"][0]
        delta = choice.get("delta", {})
        calls = delta.get("tool_calls") or [{"function": {}}]
        shown = {
            "thinking": delta.get("reasoning_content"),
            "tool call": calls[0]["function"].get("arguments"),
            "decode": choice.get("text"),
        }
        if shown.get(state):
            return True
    return False


@contextmanager
def _sent(
    server: Server, path: str, body: dict[str, Any], streamed: bool
) -> Iterator[Stream | None]:
    """A request on its way; leaving goes away without a word."""
    if streamed:
        with server.stream(path, body) as stream:
            yield stream
        return
    connection = server.connect()
    connection.connect()
    connection.sock.sendall(server.raw_request(path, body))
    try:
        yield None
    finally:
        connection.close()


@gate("8", "disconnects in every state")
def disconnects(fleet: Fleet, outcome: Outcome) -> None:
    slowest = 0.0
    states = ("queue", "prefill", "thinking", "tool call", "decode")
    with fleet.serving("--max-running", "2") as nano:
        for state in states:
            server = fleet.slow if state == "prefill" else nano
            for streamed in (True, False):
                kind = f"{state}, {'streamed' if streamed else 'whole'}"
                _leave_once(server, state, streamed)  # opens what is opened once
                before = server.held().descriptors
                seconds = _leave_once(server, state, streamed)
                slowest = max(slowest, seconds)
                outcome.hold(seconds < 2, f"{kind}: free after {seconds:.2f} s")
                more = server.until_descriptors(before, 2) - before
                outcome.hold(more <= 0, f"{kind}: {more} descriptors more than before")
    outcome.say(f"{2 * len(states)} kinds, place and pages free after at most {slowest:.2f} s")


def _leave_once(server: Server, state: str, streamed: bool) -> float:
    """Send a request, go away in a state of it; seconds until nothing is held for it."""
    blockers = concurrent.futures.ThreadPoolExecutor(2)
    with blockers:
        busy = []
        if state == "queue":
            body = server.completion("1", 400, logit_bias=ENDLESS)
            busy = [blockers.submit(server.ask, COMPLETIONS, body) for _ in range(2)]
            assert until(lambda: server.figures()["running"] == 2, 10)
        before = server.figures()
        path, body = _question(server, state)
        with _sent(server, path, body, streamed) as stream:
            assert until(_reached(server, state, before), 30), f"{state} was not reached"
            if stream is not None and state not in ("queue", "prefill"):
                assert _seen_in(state, stream.frames()), f"{state} does not show"
            left_at = time.monotonic()
        if state == "queue":
            assert until(lambda: server.figures()["replies_under_way"] <= 2, 10)
            seconds = time.monotonic() - left_at
            for answer in busy:
                assert answer.result(60).status == 200
            server.until_idle(10)
            return seconds
    server.until_idle(10)
    return time.monotonic() - left_at


@gate("9", "a retry after a disconnect in mid-prefill")
def retry(fleet: Fleet, outcome: Outcome) -> None:
    server = fleet.slow
    prompt = [50 + (11 * n + n // 40) % 140 for n in range(9000)]
    body = server.completion(prompt, 1)
    before = server.figures()
    with server.stream(COMPLETIONS, body):
        assert until(lambda: server.figures()["steps_total"] - before["steps_total"] >= 4, 60)
    server.until_idle(10)
    computed = (server.figures()["steps_total"] - before["steps_total"]) * _CHUNK_TOKENS
    outcome.hold(computed < len(prompt), "the prompt was read to its end before the disconnect")
    usage = server.ask(COMPLETIONS, body).json["usage"]
    reused = usage["prompt_tokens_details"]["cached_tokens"]
    outcome.hold(reused >= 0.9 * computed, "less than 90% of it reused")
    outcome.say(f"{computed:.0f} of {len(prompt)} tokens computed, {reused} of them reused")


# -- Gate 12 ------------------------------------------------------------------------------------


@gate("12", "SIGTERM")
def terminated(fleet: Fleet, outcome: Outcome) -> None:
    with fleet.serving() as server, concurrent.futures.ThreadPoolExecutor(6) as pool:
        children = server.watched.children(recursive=True)
        open_requests = [pool.submit(_answer_of, server, n % 2 == 0) for n in range(6)]
        assert until(lambda: server.figures()["running"] == 6, 20)
        signalled = time.monotonic()
        server.process.process.send_signal(signal.SIGTERM)
        health = server.ask("/health")
        not_ready = time.monotonic() - signalled
        outcome.hold(health.status == 503, f"/health says {health.status} after SIGTERM")
        refused = server.ask(COMPLETIONS, server.completion("1", 1))
        outcome.hold(refused.status == 503, f"a request after SIGTERM: {refused.status}")
        whole = sum(request.result(60) for request in open_requests)
        outcome.hold(whole == 6, f"only {whole} of 6 open requests finished")
        code = server.process.ended(30)
        outcome.hold(code == 0, f"exit status {code}")
        alive = [child for child in children if child.is_running()]
        outcome.hold(not alive, f"{len(alive)} children left")
        outcome.say(f"not ready after {1000 * not_ready:.0f} ms, 6 of 6 open requests finished")
        outcome.say(f"exit 0 after {time.monotonic() - signalled:.1f} s, no children")
    with fleet.serving("--drain-seconds", "1") as server:
        seconds = _seconds_to_end(server, outcome, signals=1)
        outcome.hold(seconds < 5, f"the drain of 1 s ended after {seconds:.1f} s")
        outcome.say(f"a drain of 1 s ends after {seconds:.1f} s")
    with fleet.serving() as server:
        seconds = _seconds_to_end(server, outcome, signals=2)
        outcome.hold(seconds < 4, f"a second SIGTERM ends after {seconds:.1f} s")
        outcome.say(f"a second SIGTERM ends after {seconds:.2f} s")


def _answer_of(server: Server, streamed: bool) -> bool:
    """Whether an answer of 200 tokens came whole."""
    body = server.completion("1", 200, logit_bias=ENDLESS)
    if not streamed:
        answer = server.ask(COMPLETIONS, body)
        return answer.status == 200 and answer.json["usage"]["completion_tokens"] == 200
    with server.stream(COMPLETIONS, body) as stream:
        *_, finish = stream.frames()
    return finish["choices"][0]["finish_reason"] == "length"


def _seconds_to_end(server: Server, outcome: Outcome, signals: int) -> float:
    """From the last signal to the end of a server that has a long request open."""
    body = server.completion("1", 3500, logit_bias=ENDLESS)
    with server.stream(COMPLETIONS, body) as stream:
        next(stream.frames())
        for number in range(signals):
            time.sleep(0.5 * number)
            server.process.process.send_signal(signal.SIGTERM)
            before = time.monotonic()
        server.process.ended(30)
        seconds = time.monotonic() - before
        *_, last, done = stream.lines()
    outcome.hold('"error"' in last, "the stream that was cut off does not say so")
    outcome.hold(done == "data: [DONE]", "the stream that was cut off has no [DONE]")
    outcome.hold(not psutil.pid_exists(server.watched.pid), "the process is still there")
    return seconds


# -- Gates 13 and 14 ----------------------------------------------------------------------------


@gate("13", "an exception in the engine's thread")
def engine_failures(fleet: Fleet, outcome: Outcome) -> None:
    with fleet.serving(module="tests.gates.faulty") as server:
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            others = [pool.submit(_answer_of, server, n % 2 == 0) for n in range(6)]
            assert until(lambda: server.figures()["completion_tokens_total"] > 30, 20)
            failed = server.ask(COMPLETIONS, server.completion(ERROR, 20))
            outcome.hold(failed.status == 500 and failed.is_error, f"its answer: {failed.status}")
            whole = sum(request.result(60) for request in others)
        outcome.hold(whole == 6, f"{whole} of 6 others survived")
        outcome.hold(server.ask("/health").status == 200, "/health is ill after one failure")
        server.until_idle(5)
        outcome.say(f"fails its request with 500, {whole} of 6 others finish")

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            body = server.completion("1", 3000, logit_bias=ENDLESS)
            waiting = [pool.submit(server.ask, COMPLETIONS, body) for _ in range(5)]
            assert until(lambda: server.figures()["running"] == 5, 20)
            crashed = time.monotonic()
            waiting.append(pool.submit(server.ask, COMPLETIONS, server.completion(CRASH, 5)))
            answers: list[Answer] = [answer.result(30) for answer in waiting]
            seconds = time.monotonic() - crashed
        outcome.hold(seconds < 5, f"the others fail after {seconds:.1f} s")
        wrong = [answer.status for answer in answers if answer.status < 500 or not answer.is_error]
        outcome.hold(not wrong, f"answers of a dead engine: {wrong}")
        health = server.ask("/health")
        outcome.hold(health.status == 503, f"/health says {health.status} of a dead engine")
        later = server.ask(COMPLETIONS, server.completion("1", 1))
        outcome.hold(later.status == 503, f"a later request: {later.status}")
        outcome.say(f"a dead engine fails all 6 after {seconds:.2f} s, /health 503")


@gate("14", "out of memory, injected")
def out_of_memory(fleet: Fleet, outcome: Outcome) -> None:
    with fleet.serving(module="tests.gates.faulty") as server:
        for prompt in (NO_MEMORY, NO_TENSOR_MEMORY):
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                others = [pool.submit(_answer_of, server, streamed) for streamed in (True, False)]
                assert until(lambda: server.figures()["running"] == 2, 20)
                failed = server.ask(COMPLETIONS, server.completion(prompt, 20))
                outcome.hold(failed.status == 503, f"its answer: {failed.status}")
                outcome.hold(failed.code == "out_of_memory", f"its code: {failed.code}")
                retry_after = int(failed.headers.get("retry-after", 0))
                outcome.hold(1 <= retry_after <= 120, f"Retry-After {retry_after}")
                whole = sum(request.result(60) for request in others)
            outcome.hold(whole == 2, f"{whole} of 2 others finished")
            server.until_idle(5)
        outcome.hold(_answer_of(server, streamed=True), "no answer afterwards")
        outcome.hold(server.ask("/health").status == 200, "/health is ill afterwards")
        outcome.say("Python's and torch's: 503 with Retry-After, others finish, usable afterwards")


GATES = (disconnects, retry, terminated, engine_failures, out_of_memory)

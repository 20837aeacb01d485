"""Beyond the numbered gates: forced schemas, many clients' speed, a thousand that come and go."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import random
import statistics
import threading
import time
from typing import Any

from jsonschema import Draft202012Validator

from tests.gates.fleet import ENDLESS, TOKENIZER, Fleet, Server
from tests.gates.gate import Outcome, gate
from tests.random_schemas import random_arguments
from tests.scripted_engine import until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMAS, CLIENTS, PASSERS_BY = 200, 8, 1000
_ANSWER_TOKENS = 300


@gate("schemas", f"{SCHEMAS} schemas through a named tool, random weights")
def schemas(fleet: Fleet, outcome: Outcome) -> None:
    server = fleet.random
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        wrong = list(pool.map(lambda seed: _wrong_with(server, seed), range(SCHEMAS)))
    failures = [found for of_seed in wrong for found in of_seed]
    outcome.hold(not failures, f"{len(failures)} invalid: {failures[:2]}")
    outcome.say(
        f"{2 * SCHEMAS - len(failures)} of {2 * SCHEMAS} calls valid, half of them streamed"
    )


def _wrong_with(server: Server, seed: int) -> list[str]:
    """What is wrong with the calls under this seed's schema, whole and streamed."""
    schema = random_arguments(seed)
    declared = {"name": "chosen", "parameters": schema}
    other = {"name": "other", "parameters": {"type": "object"}}
    fields = {
        "tools": [{"type": "function", "function": function} for function in (other, declared)],
        "tool_choice": {"type": "function", "function": {"name": "chosen"}},
        "seed": seed,
    }
    body = server.chat("call it", _ANSWER_TOKENS, **fields)
    whole = server.ask(CHAT, body)
    if whole.status != 200:
        return [f"seed {seed}: status {whole.status} {whole.body[:200]!r}"] * 2
    choice = whole.json["choices"][0]
    calls = [(call["function"]["name"], call["function"]["arguments"])
             for call in choice["message"].get("tool_calls") or ()]  # fmt: skip
    with server.stream(CHAT, body) as stream:
        streamed = _streamed_calls(list(stream.frames()))
    wrong = []
    for kind, found in (("whole", calls), ("streamed", streamed)):
        if reason := _invalid(found, schema):
            wrong.append(f"seed {seed}, {kind}: {reason}")
        elif found != calls:
            wrong.append(f"seed {seed}: streamed differs from whole")
    return wrong


def _streamed_calls(frames: list[dict[str, Any]]) -> list[tuple[str, str]]:
    calls: dict[int, list[str]] = {}
    for frame in frames:
        for part in frame["choices"][0]["delta"].get("tool_calls") or ():
            call = calls.setdefault(part["index"], ["", ""])
            call[0] += part["function"].get("name") or ""
            call[1] += part["function"].get("arguments") or ""
    return [(name, arguments) for name, arguments in calls.values()]


def _invalid(calls: list[tuple[str, str]], schema: dict[str, Any]) -> str:
    if not calls:
        return "no call"
    for name, arguments in calls:
        if name != "chosen":
            return f"calls {name!r}"
        try:
            errors = list(Draft202012Validator(schema).iter_errors(json.loads(arguments)))
        except ValueError as error:
            return f"{error}: {arguments[:200]!r}"
        if errors:
            return f"{errors[0].message[:200]}"
    return ""


# -- Speed --------------------------------------------------------------------------------------

_TOKENS = 150
_CHUNK_TOKENS = 512  # what the engine reads of a prompt in a step
_PROMPT_TOKENS = 5 * _CHUNK_TOKENS
_ROUNDS = 3
# Every token is this letter, so that each is a frame. Of those that random weights make, halves of
# characters and control tokens are none: text that waits for the next token is no stall.
_ONE_LETTER = {str(TOKENIZER.encode("a")[0]): 100}


@gate("clients", f"{CLIENTS} clients at once against one")
def clients(fleet: Fleet, outcome: Outcome) -> None:
    server = fleet.slow
    one = _tokens_per_second(server, 1)
    many = _tokens_per_second(server, CLIENTS)
    outcome.hold(many >= one, "many clients together are slower than one")
    outcome.say(f"{many:.0f} tok/s together, {one:.0f} tok/s alone: {many / one:.2f} times")

    # A step is one token for each stream and one chunk of one prompt: a stream that waited for two
    # chunks would have a ratio of 2. Noise of the machine falls on some of the rounds.
    rounds = [_stall_beside_prompts(server, round_number) for round_number in range(_ROUNDS)]
    ratios = [stall / (chunk + 1 / one) for stall, chunk in rounds]
    ratio = statistics.median(ratios)
    outcome.hold(ratio <= 1.1, f"streams stall for {ratio:.2f} times a chunk and a token")
    stalls = ", ".join(f"{1000 * stall:.0f} of {1000 * chunk:.0f}" for stall, chunk in rounds)
    outcome.say(
        f"longest stall while {3 * _PROMPT_TOKENS} tokens of prompts are read, of a chunk alone, "
        f"in ms: {stalls}; median {ratio:.2f} times a chunk and a token"
    )


def _stall_beside_prompts(server: Server, round_number: int) -> tuple[float, float]:
    """Seconds: a stream's longest gap while three long prompts are read, and the longest chunk of
    such a prompt on its own, before and after."""
    seeds = range(1000 * round_number, 1000 * round_number + 5)
    before = _longest_chunk(server, seeds[3])
    stream = server.completion("1", 2000, logit_bias=_ONE_LETTER)
    moments: list[float] = []
    with server.stream(COMPLETIONS, stream) as flowing:

        def read() -> None:
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                for _ in flowing.frames():
                    moments.append(time.monotonic())

        reader = threading.Thread(target=read)
        reader.start()
        assert until(lambda: len(moments) > 10, 20), "the stream does not flow"
        started = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            bodies = [server.completion(_prompt(seed, _PROMPT_TOKENS), 5) for seed in seeds[:3]]
            answers = list(pool.map(lambda body: server.ask(COMPLETIONS, body), bodies))
        assert all(answer.status == 200 for answer in answers), "a long prompt failed"
        ended = time.monotonic()
        flowing.hang_up()
        reader.join(10)
    inside = [moment for moment in moments if started <= moment <= ended]
    stall = max(b - a for a, b in itertools.pairwise(inside))
    return stall, max(before, _longest_chunk(server, seeds[4]))


def _prompt(seed: int, length: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(30, 200) for _ in range(length)]


def _tokens_per_second(server: Server, count: int) -> float:
    body = server.completion("1", _TOKENS, logit_bias=ENDLESS)
    before = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda _: server.ask(COMPLETIONS, body), range(count)))
    seconds = time.monotonic() - before
    made = sum(answer.json["usage"]["completion_tokens"] for answer in answers)
    assert made == count * _TOKENS, "an answer ended early"
    return float(made / seconds)


def _longest_chunk(server: Server, seed: int) -> float:
    """Seconds that the longest chunk of such a prompt takes on its own: the last, which has most
    before it."""
    before = server.figures()["step_seconds_total"]
    server.ask(COMPLETIONS, server.completion(_prompt(seed, _PROMPT_TOKENS - _CHUNK_TOKENS), 1))
    middle = server.figures()["step_seconds_total"]
    server.ask(COMPLETIONS, server.completion(_prompt(seed, _PROMPT_TOKENS), 1))
    after = server.figures()["step_seconds_total"]
    assert middle > before, "nothing was computed"
    return after - middle


# -- Coming and going ---------------------------------------------------------------------------


@gate("cancels", f"{PASSERS_BY} requests, most of them left at some time")
def cancels(fleet: Fleet, outcome: Outcome) -> None:
    server = fleet.random
    _pass_by(server, range(100))  # threads and buffers that a server makes once
    server.until_idle(10)
    before = server.held()
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        share = [range(1000 + n, 1000 + PASSERS_BY, 24) for n in range(24)]
        left = sum(pool.map(lambda numbers: _pass_by(server, numbers), share))
    server.until_idle(10)
    server.until_descriptors(before.descriptors, 5)
    after = server.held()
    for name in ("running", "waiting", "under_way", "cache_tokens", "descriptors", "threads"):
        was, now = getattr(before, name), getattr(after, name)
        outcome.hold(now <= was, f"{name}: {was} before, {now} after")
    outcome.hold(server.ask("/health").status == 200, "/health is ill afterwards")
    outcome.hold(left > PASSERS_BY // 4, f"only {left} were left")
    outcome.hold(left < PASSERS_BY, "none was read to its end")
    outcome.say(f"{left} of {PASSERS_BY} left")
    outcome.say(
        f"0 places, 0 waiting, 0 pages, {after.descriptors} descriptors, {after.threads} threads "
        f"afterwards ({before.descriptors} and {before.threads} before)"
    )


def _pass_by(server: Server, numbers: range) -> int:
    """Send requests of all kinds, most of them only to go away; how many were left."""
    left = 0
    for number in numbers:
        draw = random.Random(number)
        prompt = _prompt(draw.randrange(5), draw.choice((3, 300, 3000)))
        tokens = draw.choice((1, 5, 100, 1000))
        body = server.completion(prompt, tokens, seed=draw.choice((None, 1)))
        body["stream"] = draw.random() < 0.5
        connection = server.connect()
        connection.connect()
        connection.sock.sendall(server.raw_request(COMPLETIONS, body))
        connection.sock.settimeout(draw.choice((0.001, 0.01, 0.1, 0.5, 20)))
        try:
            text = b""
            while b"[DONE]" not in text and b'"usage"' not in text and b'"error"' not in text:
                piece = connection.sock.recv(1 << 16)
                if not piece:
                    break
                text += piece
        except TimeoutError:
            left += 1
        connection.close()
    return left


GATES = (schemas, clients, cancels)

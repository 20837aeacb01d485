"""OpenAI's Completions: texts or token ids, continued as they are, without any chat format.

Evaluation harnesses score answers with `echo` and `logprobs`: the tokens of the prompt then come
back with what the model gave each of them.
"""

from __future__ import annotations

import codecs
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hybridk2.chat.events import Event, Finished, PromptScored, TextDelta, TokenScored, Usage
from hybridk2.server.context import ServerContext
from hybridk2.server.errors import ApiError
from hybridk2.server.limits import described_body, validated_body
from hybridk2.server.openai import DONE_FRAME, answer_head, json_response, usage_body
from hybridk2.server.protocol import CompletionRequest
from hybridk2.server.sse import ReplyStream, collect_events, comment_frame, data_frame

if TYPE_CHECKING:
    from hybridk2.assistant import Assistant, ReplyInProgress
    from hybridk2.tokenizer import Tokenizer

REQUESTS = (CompletionRequest,)


def router(context: ServerContext) -> APIRouter:
    """The endpoint of completions."""
    routes = APIRouter()

    @routes.post("/v1/completions", openapi_extra=described_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue one or several prompts, at once or as a stream of chunks."""
        arrived = time.monotonic()
        body = await validated_body(request, CompletionRequest)
        context.check_model(body.model)
        choices = body.n or 1
        starts = [
            _start(context, body, prompt, choice, arrived)
            for prompt in body.prompts
            for choice in range(choices)
        ]
        replies = await context.begin_all(starts, body.priority)
        # Only now is it known that token ids are ones that there are.
        texts = [
            text
            for prompt in body.prompts
            for text in [CompletionText(body, prompt, context.worker.assistant.tokenizer)] * choices
        ]
        head = answer_head("cmpl", "text_completion", context.model_name)
        if body.stream:
            encoder = CompletionEncoder(head, texts, choices, body.includes_usage)
            return ReplyStream(replies, encoder)
        answers = await collect_events(request, replies)
        return json_response(completion(head, texts, choices, answers))

    return routes


def _start(
    context: ServerContext,
    body: CompletionRequest,
    prompt: str | list[int],
    choice: int,
    arrived: float,
) -> Callable[[Assistant], ReplyInProgress]:
    def start(assistant: Assistant) -> ReplyInProgress:
        return assistant.begin_completion(
            prompt,
            # The engine generates one token at least; a request for none never gets to see it.
            body.sampling_params(max(body.answer_tokens, 1), body.logprobs, choice),
            echo_logprobs=body.logprobs if body.echo else None,
            priority=body.priority,
            deadline_seconds=context.seconds_left(arrived),
        )

    return start


class CompletionText:
    """What a completion's events become: pieces of text, each with the scores of its tokens."""

    def __init__(
        self, body: CompletionRequest, prompt: str | list[int], tokenizer: Tokenizer
    ) -> None:
        self.wants_scores = body.logprobs is not None
        self.wants_answer = body.answer_tokens > 0
        self.echo = ""
        if body.echo:
            self.echo = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)

    def pieces(
        self, events: Iterable[Event], echoes: bool = True
    ) -> Iterator[tuple[str, list[TokenScored]]]:
        """(text, its tokens) in order. echoes: the prompt first, if it was asked for."""
        scores: list[TokenScored] = []
        echo = self.echo if echoes else ""
        for event in events:
            match event:
                case PromptScored(tokens):
                    scores.extend(tokens)
                case TokenScored() if self.wants_answer:
                    scores.append(event)
                case TextDelta(text) if self.wants_answer:
                    yield echo + text, scores
                    echo, scores = "", []
        if echo or scores:
            yield echo, scores


def completion(
    head: dict[str, Any],
    texts: Sequence[CompletionText],
    choices_per_prompt: int,
    answers: Sequence[Sequence[Event]],
) -> dict[str, Any]:
    """The whole answer, of all events of all choices."""
    choices, usages = [], []
    for index, (text, events) in enumerate(zip(texts, answers, strict=True)):
        pieces = list(text.pieces(events))
        scores = ScoreList().entries(itertools.chain(*(tokens for _, tokens in pieces)))
        finish = _finish_of(events, text)
        choices.append(
            {
                "index": index,
                "text": "".join(piece for piece, _ in pieces),
                "logprobs": scores if text.wants_scores else None,
                "finish_reason": finish.reason,
            }
        )
        usages.append(finish.usage or Usage())
    return {**head, "choices": choices, "usage": usage_body(usages, choices_per_prompt)}


def _finish_of(events: Sequence[Event], text: CompletionText) -> Finished:
    finish = events[-1]
    assert isinstance(finish, Finished), "Finished comes last"
    if text.wants_answer or finish.usage is None:
        return finish
    usage = finish.usage
    return Finished("length", Usage(usage.prompt_tokens, usage.cached_tokens))


class CompletionEncoder:
    """Events to `text_completion` frames."""

    def __init__(
        self,
        head: dict[str, Any],
        texts: Sequence[CompletionText],
        choices_per_prompt: int,
        includes_usage: bool,
    ) -> None:
        self._head = head
        self._texts = texts
        self._choices_per_prompt = choices_per_prompt
        self._includes_usage = includes_usage
        self._waiting: list[list[Event]] = [[] for _ in texts]
        self._scores = [ScoreList() for _ in texts]
        self._echoed: set[int] = set()
        self._usages: dict[int, Usage] = {}

    def start(self) -> bytes:
        return b""

    def event(self, choice: int, event: Event) -> bytes:
        waiting = self._waiting[choice]
        waiting.append(event)
        if not isinstance(event, TextDelta | Finished):
            return b""
        self._waiting[choice] = []
        text = self._texts[choice]
        frames = b"".join(
            self._chunk(choice, piece, tokens, None)
            for piece, tokens in text.pieces(waiting, echoes=choice not in self._echoed)
        )
        self._echoed.add(choice)
        if isinstance(event, Finished):
            finish = _finish_of([event], text)
            self._usages[choice] = finish.usage or Usage()
            frames += self._chunk(choice, "", [], finish.reason)
        return frames

    def ping(self, comment: str) -> bytes:
        return comment_frame(comment)

    def error(self, error: ApiError) -> bytes:
        return data_frame(error.openai_body()) + DONE_FRAME

    def end(self) -> bytes:
        if not self._includes_usage:
            return DONE_FRAME
        usages = [self._usages[choice] for choice in sorted(self._usages)]
        usage = usage_body(usages, self._choices_per_prompt)
        return data_frame({**self._head, "choices": [], "usage": usage}) + DONE_FRAME

    def _chunk(
        self, choice: int, text: str, tokens: list[TokenScored], reason: str | None
    ) -> bytes:
        chunk: dict[str, Any] = {
            "index": choice,
            "text": text,
            "logprobs": self._scores[choice].entries(tokens) if tokens else None,
            "finish_reason": reason,
        }
        frame = {**self._head, "choices": [chunk]}
        if self._includes_usage:
            frame["usage"] = None
        return data_frame(frame)


class ScoreList:
    """Token scores in the four lists of completions; knows how many characters came before."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def entries(self, tokens: Iterable[TokenScored]) -> dict[str, list[Any]]:
        """The lists for these tokens, which come after those of earlier calls."""
        lists: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        for token in tokens:
            name = token_name(token.text_bytes)
            top = {token_name(text): logprob for _, text, logprob in token.top}
            lists["tokens"].append(name)
            lists["token_logprobs"].append(token.logprob)
            known = None if token.logprob is None else {**top, name: token.logprob}
            lists["top_logprobs"].append(known)
            lists["text_offset"].append(self._characters)
            self._characters += len(self._decoder.decode(token.text_bytes))
        return lists


def token_name(text: bytes) -> str:
    """A token's text; of one that is no whole text `bytes:\\\\xe2\\\\x80`, as OpenAI writes it."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)

"""Messages in, events out: the tokenizer, the chat format and the engine as one.

Owns the way of a reply: render the conversation, let the engine continue it, parse what comes. The
terminal chat and the server both stand on it. Knows nothing of terminals, HTTP or files of
conversations, and leaves all arithmetic to the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from hybridk2.chat.events import Event, PromptProgress, PromptScored, TokenScored, Usage
from hybridk2.chat.generation import PlainTextParser, ReplyStream
from hybridk2.chat.parser import OutputParser
from hybridk2.chat.template import count_tool_calls, render
from hybridk2.checkpoint import LoadProgress, locate_model
from hybridk2.config import EngineConfig, K2Config
from hybridk2.engine import Engine, EngineStats
from hybridk2.errors import CheckpointError
from hybridk2.request import Generation
from hybridk2.routing_trace import TraceHeader, TraceRecorder
from hybridk2.sampling import GeneratedToken, SamplingParams, TokenConstraint
from hybridk2.scheduler import Priority
from hybridk2.tokenizer import Tokenizer

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


class Assistant:
    """A loaded model that answers conversations."""

    def __init__(self, model_name: str, engine: Engine, tokenizer: Tokenizer) -> None:
        self.model_name = model_name
        self.tokenizer = tokenizer
        self._engine = engine
        self._recorder: TraceRecorder | None = None
        control = tokenizer.control
        self._stop_ids = tuple({*engine.eos_token_ids, control.im_end, control.eos})

    @classmethod
    def load(
        cls, choices: EngineConfig, on_progress: Callable[[LoadProgress], None] | None = None
    ) -> Assistant:
        """Load tokenizer and engine. Raises the HybridK2Error of whatever is wrong with them."""
        folder = locate_model(choices.model)
        tokenizer = Tokenizer.from_folder(folder)  # first: it takes no memory to find it missing
        engine = Engine.load(choices, on_progress)
        if engine.config.vocab_size != tokenizer.vocab_size:
            engine.close()
            raise CheckpointError(
                f"{folder}: config.json says {engine.config.vocab_size} token ids, tiktoken.model "
                f"makes {tokenizer.vocab_size}. The folder mixes files of different models"
            )
        return cls(choices.model, engine, tokenizer)

    @property
    def config(self) -> K2Config:
        return self._engine.config

    @property
    def context_tokens(self) -> int:
        """Tokens that a conversation and its answer may have together."""
        return self._engine.context_tokens

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def begin(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        params: SamplingParams | None = None,
        *,
        constraint: TokenConstraint | None = None,
        priority: Priority = "interactive",
        deadline_seconds: float | None = None,
    ) -> ReplyInProgress:
        """Queue an answer to a conversation; it advances with `step`.

        messages, tools: OpenAI-style. params: None for the defaults. constraint: what the reply is
        held to. deadline_seconds: from now to the end of the reply. Any thread may call it. Raises
        ChatError for messages that cannot be rendered, ContextLengthError for a prompt beyond the
        context, QueueFullError when too many wait.
        """
        params = params or SamplingParams()
        generation = self._engine.submit(
            render(messages, tools, self.tokenizer),
            params,
            self._stop_ids,
            self.tokenizer.unmapped_ids,
            constraint=constraint,
            priority=priority,
            deadline_seconds=deadline_seconds,
        )
        parser = OutputParser(self.tokenizer, count_tool_calls(messages), tools)
        return ReplyInProgress(self._engine, generation, parser, params, self.tokenizer)

    def begin_completion(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        echo_logprobs: int | None = None,
        priority: Priority = "interactive",
        deadline_seconds: float | None = None,
    ) -> ReplyInProgress:
        """Queue the continuation of a text or of token ids, without any chat format.

        A text never becomes control tokens; ids may be any of the vocabulary. echo_logprobs: how
        many alternatives to report for each token of the prompt, in one PromptScored before the
        text; None for no report. The rest is as for `begin`.
        """
        generation = self._engine.submit(
            self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt,
            params,
            self._stop_ids,
            self.tokenizer.unmapped_ids,
            priority=priority,
            deadline_seconds=deadline_seconds,
            prompt_logprobs=echo_logprobs,
        )
        parser = PlainTextParser(self.tokenizer)
        return ReplyInProgress(self._engine, generation, parser, params, self.tokenizer)

    def step(self) -> bool:
        """Advance every reply in progress. Returns whether there is more to do."""
        return self._engine.step()

    def stats(self) -> EngineStats:
        """What runs, waits and was done so far. Any thread may call it, also during a step."""
        return self._engine.stats()

    def count_prompt_tokens(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None
    ) -> int:
        """Tokens of the prompt that `begin` would make of this conversation."""
        return len(render(messages, tools, self.tokenizer))

    def reply(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        params: SamplingParams | None = None,
    ) -> Generator[Event, None, None]:
        """Answer a conversation. Closing the iterator ends the reply; the last event is Finished.

        The same as `begin`, for who has one conversation at a time. Raises what `begin` raises, and
        EngineError when a step fails.
        """
        reply = self.begin(messages, tools, params)
        try:
            while not reply.done:
                events = reply.poll()
                if not events:
                    self.step()
                yield from events
        finally:
            reply.cancel()

    def warm(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Read a conversation ahead of its next turn, so that the turn reads only what is new.

        The template drops the reasoning of finished turns, so an answer has to be read once more
        where it now stands; this is that reading. should_stop: asked between chunks.
        """
        prefix = render(messages, tools, self.tokenizer, add_generation_prompt=False)
        self._engine.warm(prefix, should_stop)

    def trace_header(self, source: str) -> TraceHeader:
        """What a routing trace of this model says of it. source: what the model runs."""
        config = self._engine.config
        return TraceHeader(
            self._engine.routing_fingerprint(),
            config.num_moe_layers,
            config.n_routed_experts,
            config.num_experts_per_tok,
            source,
        )

    def expert_read_bytes_per_second(self) -> float:
        """What all threads read of the experts' memory when they do nothing else, measured now."""
        return self._engine.experts.read_bytes_per_second()

    def record_routing(self, recorder: TraceRecorder) -> None:
        """Tell `recorder` from now on which experts each decoded token picks, until `close`."""
        self._recorder = recorder
        self._engine.watch_routing(
            lambda slot, ids: recorder.picked(slot, ids.cpu().numpy()), recorder.begin_step
        )

    def close(self) -> None:
        """End all replies, free the model, and finish a routing trace."""
        self._engine.close()
        if self._recorder is not None:
            self._recorder.close()


class ReplyInProgress:
    """One reply on its way. Nothing here waits for the model; one thread at a time may use it."""

    def __init__(
        self,
        engine: Engine,
        generation: Generation,
        parser: OutputParser | PlainTextParser,
        params: SamplingParams,
        tokenizer: Tokenizer,
    ) -> None:
        self._engine = engine
        self._generation = generation
        self._parser = parser
        self._stream = ReplyStream(parser, params.stop)
        self._tokenizer = tokenizer
        self._read_tokens = 0
        self._reports_prompt = generation.task.prompt_logprobs is not None
        self.done = False  # no event will come any more

    @property
    def prompt_tokens(self) -> int:
        return len(self._generation.prompt_ids)

    @property
    def queue_position(self) -> int | None:
        """How many requests will start before this one; None once it has started, or ended."""
        return self._generation.queue_position

    def cancel(self) -> None:
        """End the reply, finished or not; `poll` then gives what had come, and Finished."""
        self._engine.cancel(self._generation)

    def poll(self) -> list[Event]:
        """What came since the last call, nothing once `done`. The last event is Finished.

        Raises the reply's error, once, after all that came before it.
        """
        if self.done:
            return []
        ended = self._generation.done  # asked first: what came before the end is then all there
        events = self._prompt_events()
        while not self._stream.ended and (token := self._engine.take(self._generation)):
            score = None if token.logprob is None else self._scored(token)
            events += self._stream.push(token.id, score)
        if self._stream.ended:
            self.cancel()
        elif not ended:
            return events
        elif self._generation.error is not None:
            if not events:
                self.done = True
                raise self._generation.error
            return events
        self.done = True
        reason = self._generation.finish_reason or "stop"
        return events + self._stream.finish(reason, self._usage())

    def _prompt_events(self) -> list[Event]:
        events: list[Event] = []
        read_tokens = self._generation.prefilled_tokens
        if read_tokens > self._read_tokens:
            self._read_tokens = read_tokens
            events.append(PromptProgress(read_tokens, self.prompt_tokens))
        if self._reports_prompt and len(self._generation.prompt_scores) == self.prompt_tokens:
            self._reports_prompt = False
            scores = (self._scored(token) for token in self._generation.prompt_scores)
            events.append(PromptScored(tuple(scores)))
        return events

    def _scored(self, token: GeneratedToken) -> TokenScored:
        text = self._tokenizer.token_bytes
        top = tuple((token_id, text(token_id), p) for token_id, p in token.top_logprobs)
        return TokenScored(token.id, text(token.id), token.logprob, top)

    def _usage(self) -> Usage:
        generation = self._generation
        return Usage(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=generation.cached_tokens,
            completion_tokens=generation.completion_tokens,
            reasoning_tokens=self._parser.reasoning_tokens,
            prefill_seconds=generation.prefill_seconds,
            decode_seconds=generation.decode_seconds,
            context_tokens=self.prompt_tokens + generation.completion_tokens,
            context_limit=self._engine.context_tokens,
        )

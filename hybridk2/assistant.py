"""Messages in, events out: the tokenizer, the chat format and the engine as one.

Owns the way of a reply: render the conversation, let the engine continue it, parse what comes. The
terminal chat and the server both stand on it. Knows nothing of terminals, HTTP or files of
conversations, and leaves all arithmetic to the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from hybridk2.chat.events import Event, PromptProgress, Usage
from hybridk2.chat.generation import stream
from hybridk2.chat.parser import EndReason, OutputParser
from hybridk2.chat.template import count_tool_calls, render
from hybridk2.checkpoint import LoadProgress, locate_model
from hybridk2.config import EngineConfig, K2Config
from hybridk2.engine import Engine, Generation
from hybridk2.errors import CheckpointError
from hybridk2.sampling import SamplingParams
from hybridk2.tokenizer import Tokenizer

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


class Assistant:
    """A loaded model that answers conversations."""

    def __init__(self, model_name: str, engine: Engine, tokenizer: Tokenizer) -> None:
        self.model_name = model_name
        self.tokenizer = tokenizer
        self._engine = engine
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

    def reply(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        params: SamplingParams | None = None,
    ) -> Generator[Event, None, None]:
        """Answer a conversation. Closing the iterator ends the reply; the last event is Finished.

        messages, tools: OpenAI-style. params: None for the defaults. Raises ChatError for messages
        that cannot be rendered, RequestError for a prompt beyond the context, EngineError when a
        step fails.
        """
        params = params or SamplingParams()
        prompt_ids = render(messages, tools, self.tokenizer)
        parser = OutputParser(self.tokenizer, count_tool_calls(messages), tools)
        generation = self._engine.submit(
            prompt_ids, params, self._stop_ids, self.tokenizer.unmapped_ids
        )

        def end_reason() -> EndReason:
            assert generation.finish_reason is not None, "the tokens ran out without a reason"
            return generation.finish_reason

        try:
            for read_tokens in self._engine.prefill(generation):
                yield PromptProgress(read_tokens, len(prompt_ids))
            yield from stream(
                (token.id for token in self._engine.tokens(generation)),
                parser,
                params.stop,
                end_reason=end_reason,
                usage=lambda: self._usage(generation, parser),
            )
        finally:
            self._engine.cancel(generation)

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

    def close(self) -> None:
        self._engine.close()

    def _usage(self, generation: Generation, parser: OutputParser) -> Usage:
        prompt_tokens = len(generation.prompt_ids)
        return Usage(
            prompt_tokens=prompt_tokens,
            cached_tokens=generation.cached_tokens,
            completion_tokens=generation.completion_tokens,
            reasoning_tokens=parser.reasoning_tokens,
            prefill_seconds=generation.prefill_seconds,
            decode_seconds=generation.decode_seconds,
            context_tokens=prompt_tokens + generation.completion_tokens,
            context_limit=self.context_tokens,
        )

"""The engine: requests in, tokens out.

Owns the loaded model, the latent cache and the running requests. It speaks token ids only: text,
messages and stop strings live above it. Each step gives every running request one unit of work, a
chunk of its prompt or one new token, computed on its own: what else is running never changes the
numbers of a request, only their pace.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from hybridk2.checkpoint import Checkpoint, locate_model
from hybridk2.config import EngineConfig, K2Config
from hybridk2.device import Device, select_device
from hybridk2.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    HybridK2Error,
    RequestError,
)
from hybridk2.experts.host import HostExperts
from hybridk2.experts.loading import LoadProgress, check_memory, load_experts
from hybridk2.experts.router import AsyncRouter
from hybridk2.kv_cache import PAGE_TOKENS, CacheSequence, PagedLatentCache
from hybridk2.model.k2 import DecoderLayer, K2Model
from hybridk2.sampling import GeneratedToken, Sampler, SamplingParams, TokenConstraint

logger = logging.getLogger(__name__)

# Where the user sets no context: as much as a long conversation needs, 2.3 GB of cache for K2. The
# model's own limit of 262,144 tokens would be 18 GB.
_DEFAULT_CONTEXT_TOKENS = 32_768

# Dense bytes per layer from which more than one thread shares an operator.
_SHARED_LAYER_BYTES = 4 << 20

FinishReason = Literal["stop", "length", "cancelled"]
Priority = Literal["interactive", "background"]


@dataclass(frozen=True)
class EngineStats:
    """What the engine does now, and what it did since it was loaded."""

    running: int
    waiting_interactive: int
    waiting_background: int
    max_running: int
    max_queued: int
    cache_tokens_used: int  # held by running requests
    cache_tokens_capacity: int
    prompt_tokens_total: int
    cached_tokens_total: int  # of those, not computed again
    completion_tokens_total: int
    requests_total: Mapping[str, int]  # by finish reason, "error" among them
    steps_total: int
    step_seconds_total: float
    expert_bytes_total: int  # routed weights read by steps
    host_expert_share: float  # of the routed experts, how many host memory served


class Generation:
    """One request on its way: what it asked for, what it has got, and how long that took."""

    def __init__(
        self,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        stop_ids: frozenset[int],
        max_tokens: int,
        sampler: Sampler,
        prompt_logprobs: int | None,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.prompt_logprobs = prompt_logprobs
        self.prompt_scores: list[GeneratedToken] = []
        self.queue_position: int | None = None
        self.stop_ids = stop_ids
        self.max_tokens = max_tokens
        # A request that names a seed is to repeat itself bit for bit.
        self.repeatable = params.seed is not None
        self.finish_reason: FinishReason | None = None
        self.error: HybridK2Error | None = None
        self.cached_tokens = 0
        self.prefilled_tokens = 0  # of the prompt, reused ones included
        self.completion_tokens = 0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self._sampler = sampler
        self._sequence: CacheSequence | None = None
        self._next_id: int | None = None  # sampled, not yet run through the model
        self._output: deque[GeneratedToken] = deque()

    @property
    def limit_tokens(self) -> int:
        """Tokens of the cache that the request can come to hold."""
        return -(-(len(self.prompt_ids) + self.max_tokens) // PAGE_TOKENS) * PAGE_TOKENS

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Engine:
    """A loaded model and its running requests. Its methods may be called from any thread."""

    def __init__(
        self,
        model: K2Model,
        experts: HostExperts,
        cache: PagedLatentCache,
        eos_token_ids: Sequence[int],
        context_tokens: int,
    ) -> None:
        self.config: K2Config = model.config
        self.context_tokens = context_tokens
        self.eos_token_ids = tuple(eos_token_ids)
        self._model = model
        self.experts = experts
        self._cache = cache
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._lock = threading.RLock()

    @classmethod
    def load(
        cls, choices: EngineConfig, on_progress: Callable[[LoadProgress], None] | None = None
    ) -> Engine:
        """Load a checkpoint and be ready for requests.

        on_progress: told often enough to draw a bar. Raises the HybridK2Error of whatever is wrong
        with the checkpoint, the choices or the machine's memory, before large memory is taken.
        """
        with Checkpoint.open(locate_model(choices.model)) as checkpoint:
            return cls._from_checkpoint(checkpoint, choices, on_progress)

    @classmethod
    def _from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        choices: EngineConfig,
        on_progress: Callable[[LoadProgress], None] | None,
    ) -> Engine:
        config = checkpoint.config
        device = select_device(choices.device)
        context_tokens = _context_tokens(choices, config)
        chunk_tokens = -(-choices.prefill_chunk_tokens // PAGE_TOKENS) * PAGE_TOKENS
        dtype = getattr(torch, choices.dtype)
        cache_tokens = choices.kv_cache_tokens or 2 * context_tokens
        check_memory(
            checkpoint,
            psutil.virtual_memory().available,
            dense_bytes=_dense_bytes(checkpoint, dtype),
            cache_bytes=PagedLatentCache.bytes_for(config, cache_tokens, dtype),
        )
        threads = choices.threads or psutil.cpu_count(logical=False) or 1
        torch.set_num_threads(_dense_threads(checkpoint, threads))
        experts = HostExperts(
            config.num_moe_layers,
            config.n_routed_experts,
            config.hidden_size,
            config.moe_intermediate_size,
            isa=choices.isa,
            threads=threads,
            huge_pages=choices.huge_pages,
        )
        try:
            load_experts(checkpoint, experts, on_progress or (lambda progress: None))
            model = load_model(checkpoint, experts, device, dtype, on_progress)
            cache = PagedLatentCache(config, cache_tokens, chunk_tokens, device, dtype)
        except BaseException:
            experts.close()
            raise
        logger.info(
            "model %s: %s activations on %s, %d threads, context %d tokens, cache %d tokens",
            choices.model,
            choices.dtype,
            device.name,
            threads,
            context_tokens,
            cache.capacity_tokens,
        )
        return cls(model, experts, cache, checkpoint.eos_token_ids, context_tokens)

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        stop_ids: Sequence[int] | None = None,
        forbidden_ids: Sequence[int] = (),
        *,
        constraint: TokenConstraint | None = None,
        priority: Priority = "interactive",
        deadline_seconds: float | None = None,
        prompt_logprobs: int | None = None,
    ) -> Generation:
        """Queue a request. It advances with `step`, or by reading it with `tokens`.

        stop_ids: end the output and are not part of it; None takes the checkpoint's end tokens.
        forbidden_ids: never sampled. Raises RequestError when the prompt is empty, holds an id
        outside the vocabulary, or leaves no room in the context.
        """
        prompt = tuple(prompt_ids)
        if not prompt:
            raise RequestError("the prompt is empty: expected at least one token")
        vocab_size = self.config.vocab_size
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            raise RequestError(f"token id {wrong} is not in the vocabulary of {vocab_size} tokens")
        room = self.context_tokens - len(prompt)
        if room < 1:
            raise ContextLengthError(len(prompt), params.max_tokens, self.context_tokens)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        stops = frozenset(self.eos_token_ids if stop_ids is None else stop_ids)
        sampler = Sampler(params, seed, prompt, vocab_size, forbidden_ids, constraint)
        generation = Generation(prompt, params, stops, max_tokens, sampler, prompt_logprobs)
        if generation.limit_tokens > self._cache.capacity_tokens:
            raise RequestError(
                f"prompt and answer may need {generation.limit_tokens} tokens of cache, and it "
                f"holds {self._cache.capacity_tokens}. Lower max_tokens or enlarge the cache"
            )
        with self._lock:
            self._waiting.append(generation)
        return generation

    def prefill(self, generation: Generation) -> Iterator[int]:
        """Read the request's prompt; after each chunk, how many of its tokens are read.

        Optional: `tokens` reads the prompt as well. For who wants to show progress, or to stop in
        between with `cancel`. An error of the request is left to `tokens`.
        """
        while generation.prefilled_tokens < len(generation.prompt_ids) and not generation.done:
            prefilled = generation.prefilled_tokens
            self.step()
            if generation.prefilled_tokens > prefilled:
                yield generation.prefilled_tokens

    def tokens(self, generation: Generation) -> Iterator[GeneratedToken]:
        """The request's tokens as they come. Closing the iterator cancels the request.

        Raises the request's error when a step of it fails.
        """
        try:
            while True:
                while not generation._output and not generation.done:
                    self.step()
                token = self.take(generation)
                if token is None:
                    break
                yield token
            if generation.error is not None:
                raise generation.error
        finally:
            self.cancel(generation)

    def take(self, generation: Generation) -> GeneratedToken | None:
        """The request's next token if it is there. Never waits."""
        try:
            return generation._output.popleft()
        except IndexError:
            return None

    def stats(self) -> EngineStats:
        """See EngineStats. Any thread may call it, also during a step."""
        return EngineStats(
            running=len(self._running),
            waiting_interactive=len(self._waiting),
            waiting_background=0,
            max_running=8,
            max_queued=64,
            cache_tokens_used=self._cache.capacity_tokens - self._cache.available_tokens,
            cache_tokens_capacity=self._cache.capacity_tokens,
            prompt_tokens_total=0,
            cached_tokens_total=0,
            completion_tokens_total=0,
            requests_total={},
            steps_total=0,
            step_seconds_total=0.0,
            expert_bytes_total=0,
            host_expert_share=1.0,
        )

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        stop_ids: Sequence[int] | None = None,
        forbidden_ids: Sequence[int] = (),
    ) -> Iterator[GeneratedToken]:
        """Submit a request and read its tokens. See `submit` and `tokens`."""
        yield from self.tokens(self.submit(prompt_ids, params, stop_ids, forbidden_ids))

    def warm(self, token_ids: Sequence[int], should_stop: Callable[[], bool]) -> None:
        """Compute and cache a prefix that a later request will start with.

        should_stop: asked between chunks. Does nothing when other requests fill the cache.
        """
        ids = list(token_ids[: self.context_tokens - 1])
        with self._lock:
            if self._promised_tokens() + len(ids) + PAGE_TOKENS > self._cache.capacity_tokens:
                return
            # One id more than is wanted, as the last one is never taken from the cache.
            sequence = self._cache.open([*ids, 0], repeatable=False)
        try:
            while sequence.length < len(ids) and not should_stop():
                with self._lock:
                    self._run_chunk(sequence, ids)
        finally:
            with self._lock:
                sequence.close()

    def cancel(self, generation: Generation) -> None:
        """End a request, finished or not; what it computed stays cached."""
        with self._lock:
            self._end(generation, "cancelled")

    def step(self) -> bool:
        """Give every running request one unit of work. Returns whether there was any."""
        with self._lock:
            while self._waiting and (
                self._promised_tokens() + self._waiting[0].limit_tokens
                <= self._cache.capacity_tokens
            ):
                self._running.append(self._waiting.popleft())
            for generation in list(self._running):
                self._advance(generation)
            return bool(self._running or self._waiting)

    def close(self) -> None:
        """End all requests and free the experts' memory and threads."""
        with self._lock:
            for generation in [*self._running, *self._waiting]:
                self._end(generation, "cancelled")
            self.experts.close()

    def _promised_tokens(self) -> int:
        return sum(generation.limit_tokens for generation in self._running)

    def _advance(self, generation: Generation) -> None:
        try:
            if generation._next_id is None:
                self._prefill(generation)
            else:
                self._decode(generation)
        except HybridK2Error as error:
            self._end(generation, error)
        except Exception as error:
            logger.exception("a step failed; its request ends")
            failure = EngineError(f"the step failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._end(generation, failure)

    @torch.inference_mode()
    def _prefill(self, generation: Generation) -> None:
        started = time.perf_counter()
        if generation._sequence is None:
            generation._sequence = self._cache.open(
                generation.prompt_ids, repeatable=generation.repeatable
            )
            generation.cached_tokens = generation._sequence.length
        sequence = generation._sequence
        hidden = self._run_chunk(sequence, generation.prompt_ids)
        generation.prefilled_tokens = sequence.length
        if sequence.length == len(generation.prompt_ids):
            self._sample(generation, hidden[-1:])
        generation.prefill_seconds += time.perf_counter() - started

    @torch.inference_mode()
    def _run_chunk(self, sequence: CacheSequence, token_ids: Sequence[int]) -> torch.Tensor:
        """Run the tokens up to the next multiple of the chunk, so that chunks are the same ones
        wherever a prompt was taken up."""
        start = sequence.length
        chunk = self._cache.chunk_tokens
        end = min(start - start % chunk + chunk, len(token_ids))
        sequence.reserve(end - start)
        ids = torch.tensor(token_ids[start:end], dtype=torch.int64)
        return self._model.forward(ids, torch.arange(start, end), sequence)

    @torch.inference_mode()
    def _decode(self, generation: Generation) -> None:
        started = time.perf_counter()
        sequence = generation._sequence
        assert sequence is not None
        assert generation._next_id is not None
        sequence.reserve(1)
        position = torch.tensor([sequence.length])
        hidden = self._model.forward(torch.tensor([generation._next_id]), position, sequence)
        self._sample(generation, hidden)
        generation.decode_seconds += time.perf_counter() - started

    def _sample(self, generation: Generation, hidden: torch.Tensor) -> None:
        sequence = generation._sequence
        assert sequence is not None
        logits = self._model.logits(hidden)[0].cpu()
        if not bool(logits.isfinite().all()):
            raise EngineError(
                f"the logits after token {sequence.length} are not finite: a weight of the "
                "checkpoint is damaged, or an activation overflowed. `hybridk2 verify` names it"
            )
        token = generation._sampler.sample(logits, sequence.length)
        if token.id in generation.stop_ids:
            self._end(generation, "stop")
            return
        generation.completion_tokens += 1
        generation._next_id = token.id
        generation._output.append(token)
        if generation.completion_tokens == generation.max_tokens:
            self._end(generation, "length")

    def _end(self, generation: Generation, how: FinishReason | HybridK2Error) -> None:
        if generation._sequence is not None:
            generation._sequence.close()
        if generation in self._running:
            self._running.remove(generation)
        elif generation in self._waiting:
            self._waiting.remove(generation)
        if generation.done:
            return
        if isinstance(how, HybridK2Error):
            generation.error = how
        else:
            generation.finish_reason = how


def _context_tokens(choices: EngineConfig, config: K2Config) -> int:
    longest = config.max_position_embeddings
    if choices.context_tokens is None:
        return min(longest, _DEFAULT_CONTEXT_TOKENS)
    if choices.context_tokens > longest:
        raise ConfigError(
            f"context: {choices.context_tokens} tokens asked for, the model was trained for "
            f"{longest} at most"
        )
    return choices.context_tokens


def _dense_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Memory of all weights but the routed experts; embedding and head stay as they are stored."""
    config = checkpoint.config
    kept_bytes = 2 * config.vocab_size * config.hidden_size * torch.bfloat16.itemsize
    widening = dtype.itemsize / torch.bfloat16.itemsize
    return kept_bytes + int((checkpoint.dense_bytes - kept_bytes) * widening)


def _dense_threads(checkpoint: Checkpoint, threads: int) -> int:
    """Threads for dense arithmetic: one where an operator is too small to be shared out.

    torch's threads spin at a barrier after every operator. On a layer of a few hundred kilobytes
    they gain nothing, and beside other programs each barrier waits for the scheduler: the embedded
    model then made 2 tokens/s with two threads and 100 with one (2 Zen 4 cores, both busy).
    """
    layer_bytes = checkpoint.dense_bytes / checkpoint.config.num_hidden_layers
    return threads if layer_bytes >= _SHARED_LAYER_BYTES else 1


def load_model(
    checkpoint: Checkpoint,
    experts: HostExperts,
    device: Device,
    dtype: torch.dtype,
    on_progress: Callable[[LoadProgress], None] | None = None,
) -> K2Model:
    """Read the dense weights layer by layer and put the model together around loaded experts.

    Raises CheckpointError with the name of a tensor that cannot be read.
    """
    config = checkpoint.config
    router = AsyncRouter(experts, device)
    started = time.perf_counter()
    layer_bytes = checkpoint.dense_bytes // (config.num_hidden_layers + 1)

    def report(done: int) -> None:
        if on_progress is not None:
            seconds = time.perf_counter() - started
            on_progress(LoadProgress("dense weights", done, checkpoint.dense_bytes, seconds))

    layers = []
    for index in range(config.num_hidden_layers):
        weights = checkpoint.layer(index)
        layers.append(DecoderLayer(config, weights, index, router, device, dtype))
        report((index + 1) * layer_bytes)
    model = K2Model(
        config,
        checkpoint.embedding(),
        layers,
        checkpoint.final_norm(),
        checkpoint.lm_head(),
        device,
        dtype,
    )
    report(checkpoint.dense_bytes)
    return model

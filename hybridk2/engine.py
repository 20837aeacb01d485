"""The engine: requests in, tokens out.

Owns the loaded model, the latent cache and the life of every request: admission, steps, errors, the
end. It speaks token ids only: text, messages and stop strings live above it. Whose turn it is, the
scheduler says; what runs on the model, execution.

A step gives one token to every request that decodes, all of them together, and reads one chunk of
one prompt: a stream waits for one chunk at most. What else is running never changes the numbers of
a request that names a seed, only their pace; one without a seed may round differently in company.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from hybridk2.checkpoint import Checkpoint, locate_model
from hybridk2.config import EngineConfig, K2Config
from hybridk2.engine_parts import EngineParts, load_parts
from hybridk2.engine_stats import EngineStats, Totals
from hybridk2.errors import DeadlineError, EngineError, HybridK2Error, ReplyError
from hybridk2.execution import Execution, step_error
from hybridk2.experts.host import HostExperts
from hybridk2.experts.loading import LoadProgress
from hybridk2.kv_cache import PAGE_TOKENS
from hybridk2.model.layers import DECODE_ROWS
from hybridk2.request import FinishReason, Generation, Task, check_prompt
from hybridk2.sampling import (
    GeneratedToken,
    Sampler,
    SamplingParams,
    TokenConstraint,
    check_number_of_logprobs,
)
from hybridk2.scheduler import Priority, Scheduler
from hybridk2.timeline import Timeline

logger = logging.getLogger(__name__)


class Engine:
    """A loaded model and its running requests. Its methods may be called from any thread.

    experts: the host's. card: the name of the card that computes all else, None without one.
    """

    def __init__(
        self,
        parts: EngineParts,
        eos_token_ids: Sequence[int],
        max_running: int,
        max_queued: int,
    ) -> None:
        model, cache = parts.model, parts.cache
        self.config: K2Config = model.config
        # No more than the cache holds are of use.
        self.context_tokens = min(parts.context_tokens, cache.capacity_tokens)
        self.eos_token_ids = tuple(eos_token_ids)
        self._model = model
        self._parts = parts
        self.experts: HostExperts = parts.experts
        self.card: str | None = None if parts.device.memory_bytes() is None else parts.device.name
        self._cache = cache
        self._execution = Execution(model, cache)
        self._scheduler: Scheduler[Generation] = Scheduler(max_running, max_queued)
        self._totals = Totals()
        self._on_step: Callable[[Sequence[int]], None] | None = None
        self._stepping = threading.Lock()  # held for as long as a step takes
        # Held for moments: who runs and waits, and the end of requests. Taken after _stepping.
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
            parts = load_parts(checkpoint, choices, on_progress or (lambda progress: None))
            return cls(parts, checkpoint.eos_token_ids, choices.max_running, choices.max_queued)

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
        """Queue a request. It advances with `step`, or by reading it with `tokens`. Never waits.

        stop_ids: end the output and are not part of it; None takes the checkpoint's end tokens.
        forbidden_ids: never sampled. constraint: what the output is held to. deadline_seconds: from
        now to the end. prompt_logprobs: how many alternatives to report for each token of the
        prompt; the prompt is then computed whole, whatever is cached of it.

        Raises RequestError when the prompt is empty or holds an id outside the vocabulary,
        ContextLengthError when it leaves no room in the context, QueueFullError.
        """
        prompt = tuple(prompt_ids)
        vocab_size = self.config.vocab_size
        check_prompt(prompt, vocab_size, self.context_tokens, params.max_tokens)
        check_number_of_logprobs("prompt_logprobs", prompt_logprobs)
        room = self.context_tokens - len(prompt)
        task = Task(
            prompt_ids=prompt,
            stop_ids=frozenset(self.eos_token_ids if stop_ids is None else stop_ids),
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            repeatable=params.seed is not None,
            priority=priority,
            prompt_logprobs=prompt_logprobs,
            deadline=None if deadline_seconds is None else time.monotonic() + deadline_seconds,
        )
        seed = secrets.randbits(64) if params.seed is None else params.seed
        sampler = Sampler(params, seed, prompt, vocab_size, forbidden_ids, constraint)
        return self._queue(Generation(task, sampler))

    def _queue(self, generation: Generation) -> Generation:
        with self._lock:
            self._scheduler.submit(generation)
        return generation

    def tokens(self, generation: Generation) -> Iterator[GeneratedToken]:
        """The request's tokens as they come. Closing the iterator cancels the request.

        Raises the request's error when a step of it fails.
        """
        try:
            while True:
                while not generation.output and not generation.done:
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
            return generation.output.popleft()
        except IndexError:
            return None

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
        """Compute and cache a prefix that a later request will start with, behind all others.

        should_stop: asked between chunks. Raises QueueFullError.
        """
        task = Task(
            prompt_ids=tuple(token_ids[: self.context_tokens - 1]),
            stop_ids=frozenset(),
            max_tokens=0,
            repeatable=False,
            priority="background",
            prompt_logprobs=None,
            deadline=None,
        )
        sampler = Sampler(SamplingParams(), 0, (), self.config.vocab_size)
        generation = self._queue(Generation(task, sampler))
        try:
            while not generation.done and not should_stop():
                self.step()
            if generation.error is not None:
                raise generation.error
        finally:
            self.cancel(generation)

    def cancel(self, generation: Generation) -> None:
        """End a request, finished or not; what it computed stays cached. Never waits.

        During a step of another thread a running request ends with that step, at the latest when
        the next one begins; any other at once.
        """
        with self._lock:
            if generation.done:
                return
            generation.cancelled = True
            if generation.sequence is None and generation.queue_position is not None:
                self._end(generation, "cancelled")
                return
        if self._stepping.acquire(blocking=False):
            try:
                self._end_overdue()
            finally:
                self._stepping.release()

    def step(self) -> bool:
        """One token for every request that decodes, one chunk for one that reads its prompt.

        Returns whether there is more to do.
        """
        with self._stepping:
            started = time.perf_counter()
            self._end_overdue()
            self._start_waiting()
            decoding = self._scheduler.decoding()
            for first in range(0, len(decoding), DECODE_ROWS):
                self._decode(decoding[first : first + DECODE_ROWS])
            reading = self._scheduler.next_to_read()
            if reading is not None:
                self._read(reading)
            self._end_overdue()
            if decoding or reading is not None:
                self._totals.steps += 1
                self._totals.step_seconds += time.perf_counter() - started
            with self._lock:
                return any(True for _ in self._scheduler.requests())

    def stats(self) -> EngineStats:
        """See EngineStats. Any thread may call it; it never waits for a step."""
        experts_read, on_host = self._model.experts_read, self._model.host_experts_read
        with self._lock:
            scheduler, totals = self._scheduler, self._totals
            return EngineStats(
                running=len(scheduler.running),
                waiting_interactive=scheduler.waiting("interactive"),
                waiting_background=scheduler.waiting("background"),
                max_running=scheduler.max_running,
                max_queued=scheduler.max_queued,
                cache_tokens_used=self._cache.capacity_tokens - self._cache.available_tokens,
                cache_tokens_capacity=self._cache.capacity_tokens,
                prompt_tokens_total=totals.prompt_tokens,
                cached_tokens_total=totals.cached_tokens,
                completion_tokens_total=totals.completion_tokens,
                requests_total=dict(totals.requests),
                steps_total=totals.steps,
                step_seconds_total=totals.step_seconds,
                expert_bytes_total=experts_read * self.experts.expert_bytes,
                host_expert_share=on_host / experts_read if experts_read else 1.0,
            )

    def record_times(self, timeline: Timeline | None) -> None:
        """Tell `timeline` from the next step on what runs when, or None: nobody."""
        with self._stepping:
            self._model.timeline = timeline

    def watch_routing(
        self,
        on_decode: Callable[[int, torch.Tensor], None] | None,
        on_step: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        """Have every later step of decoding tell which experts it picks. See K2Model.

        on_step: called before each, also one that then fails, with the numbers of the requests that
        get a token, in the order of the picks' rows.
        """
        with self._stepping:
            self._model.watch_routing(on_decode)
            self._on_step = on_step

    def routing_fingerprint(self) -> str:
        """What tells this model's routing from another's. See K2Model."""
        return self._model.routing_fingerprint()

    def close(self) -> None:
        """End all requests and free the experts' memory and threads. Waits for a step under way."""
        with self._stepping:
            with self._lock:
                for generation in list(self._scheduler.requests()):
                    self._end(generation, "cancelled")
            self._parts.close()

    def _start_waiting(self) -> None:
        with self._lock:
            while (candidate := self._scheduler.candidate()) is not None and self._fits(candidate):
                self._scheduler.start(candidate)

    def _fits(self, candidate: Generation) -> bool:
        """Whether the cache has the pages that it and all running requests are promised.

        Alone a request always fits: no context is longer than the cache.
        """
        running = self._scheduler.running
        promised = sum(self._missing_tokens(generation) for generation in [*running, candidate])
        return not running or promised <= self._cache.available_tokens

    def _missing_tokens(self, generation: Generation) -> int:
        """Tokens of whole pages that a request is promised and does not hold."""
        promised = -(-generation.promised_tokens // PAGE_TOKENS) * PAGE_TOKENS
        if generation.sequence is not None:
            return max(promised - generation.sequence.held_tokens, 0)
        if generation.scores_prompt:
            return promised
        repeatable = generation.task.repeatable
        return promised - self._cache.shared_tokens(generation.read_ids, repeatable=repeatable)

    def _end_overdue(self) -> None:
        """End what was cancelled, or is not finished when it should be."""
        with self._lock:
            for generation in list(self._scheduler.requests()):
                if generation.cancelled:
                    self._end(generation, "cancelled")
                elif generation.is_late():
                    message = "the request was not finished in the time that it was given"
                    self._end(generation, DeadlineError(message))

    def _decode(self, generations: list[Generation]) -> None:
        """One token further for up to DECODE_ROWS requests at once."""
        started = time.perf_counter()
        ready = [generation for generation in generations if self._make_room(generation, 1)]
        # Making room for one may have taken the pages of another.
        ready = [generation for generation in ready if generation.sequence is not None]
        if not ready:
            return
        if self._on_step is not None:
            self._on_step([generation.number for generation in ready])
        try:
            logits = self._execution.decode(ready)
        except Exception as error:
            logger.exception("a step of %d requests failed", len(ready))
            if len(ready) == 1:
                self._end(ready[0], step_error(error))
                return
            # One request's trouble is not the others': each on its own.
            for generation in ready:
                self._decode([generation])
            return
        seconds = time.perf_counter() - started
        for row, generation in enumerate(ready):
            generation.decode_seconds += seconds
            if not generation.pending_ids:
                self._sample(generation, logits[row])

    def _read(self, generation: Generation) -> None:
        """Read one chunk of a prompt, and sample the first token once all of it is read."""
        started = time.perf_counter()
        prefilled_before, cached_before = generation.prefilled_tokens, generation.cached_tokens
        try:
            self._execution.find_past(generation)
            # Of a prompt that is not to be answered the cache may hold all.
            chunk_tokens = self._execution.chunk_tokens(generation)
            if not self._make_room(generation, chunk_tokens):
                return
            logits = self._execution.read_chunk(generation) if chunk_tokens else None
        except Exception as error:
            logger.exception("a step of a prompt failed")
            self._end(generation, step_error(error))
            return
        generation.prefill_seconds += time.perf_counter() - started
        self._totals.prompt_tokens += generation.prefilled_tokens - prefilled_before
        self._totals.cached_tokens += generation.cached_tokens - cached_before
        if logits is not None:
            self._sample(generation, logits)
        elif not generation.reading and generation.task.max_tokens == 0:
            self._end(generation, "stop")

    def _make_room(self, generation: Generation, tokens: int) -> bool:
        """Room for so many more tokens of a running request. False: it had to give up its own.

        Where the cache is full, the youngest requests give up their pages until there is room.
        """
        sequence = generation.sequence
        if sequence is None:
            return False
        needed = sequence.length + tokens - sequence.held_tokens
        while needed > self._cache.available_tokens:
            with self._lock:
                victim = self._scheduler.youngest(lambda other: other.sequence is not None)
                logger.info("the cache is full: request %d begins again later", victim.number)
                victim.give_up_pages()
                self._scheduler.preempt(victim)
            if victim is generation:
                return False
        sequence.reserve(tokens)
        return True

    def _sample(self, generation: Generation, logits: torch.Tensor) -> None:
        assert generation.sequence is not None
        position = generation.sequence.length
        try:
            if not bool(logits.isfinite().all()):
                raise EngineError(
                    f"the logits after token {position} are not finite: a weight of the checkpoint "
                    "is damaged, or an activation overflowed. `hybridk2 verify` names it"
                )
            token = generation.sampler.sample(logits, position)
        except ReplyError as error:  # the model's doing; no step failed
            self._end(generation, error)
            return
        except Exception as error:
            logger.exception("no token could be sampled")
            self._end(generation, step_error(error))
            return
        if self._model.timeline is not None:
            self._model.timeline.mark("sampling")
        if token.id in generation.task.stop_ids:
            self._end(generation, "stop")
            return
        generation.sampled_ids.append(token.id)
        generation.pending_ids.append(token.id)
        generation.output.append(token)
        self._totals.completion_tokens += 1
        if generation.completion_tokens == generation.task.max_tokens:
            self._end(generation, "length")

    def _end(self, generation: Generation, how: FinishReason | HybridK2Error) -> None:
        """End a request that runs or waits. What it computed stays cached."""
        with self._lock:
            if generation.sequence is not None:
                generation.sequence.close()
            self._scheduler.remove(generation)
            reason = "error" if isinstance(how, HybridK2Error) else how
            if generation.task.max_tokens:
                self._totals.requests[reason] += 1
            if isinstance(how, HybridK2Error):
                generation.error = how
            else:
                generation.finish_reason = how

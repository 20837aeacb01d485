"""The work of a step: one chunk of one prompt, or one token further for several requests.

Owns the way between requests and tensors: which tokens run, at which positions, against which
cached past, and what of the result is asked for. Does not know whose turn it is; samples nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridk2.errors import EngineError, HybridK2Error, OutOfMemoryError
from hybridk2.kv_cache import PagedLatentCache
from hybridk2.model.k2 import K2Model
from hybridk2.request import Generation
from hybridk2.sampling import GeneratedToken

# Logits of a prompt that are scored at a time. Each block of rows reads lm_head once more: for K2
# 64 MB are 102 rows, so that a chunk of 512 tokens reads it six times.
_SCORED_LOGIT_BYTES = 64 << 20


class Execution:
    """Runs requests on the model. Its methods are the engine's steps, so one at a time."""

    def __init__(self, model: K2Model, cache: PagedLatentCache) -> None:
        self._model = model
        self._cache = cache

    def find_past(self, generation: Generation) -> None:
        """Before a chunk: take from the cache what is known by now, by whomever it was computed."""
        task, sequence = generation.task, generation.sequence
        # A request that only reads wants its last token cached as well: as if one more followed.
        ids = generation.read_ids if task.max_tokens else (*generation.read_ids, 0)
        if generation.scores_prompt:
            ids = ids[:1]
        if sequence is not None:
            known_tokens = self._cache.known_tokens(ids, repeatable=task.repeatable)
            if known_tokens <= sequence.length:
                return
            sequence.close()
        before = generation.prefilled_tokens
        generation.sequence = self._cache.open(ids, repeatable=task.repeatable)
        self._note_progress(generation)
        generation.cached_tokens += generation.prefilled_tokens - before

    def chunk_tokens(self, generation: Generation) -> int:
        """Length of the next chunk: up to the next multiple of the cache's chunk, so that chunks
        are the same ones wherever a prompt was taken up."""
        assert generation.sequence is not None, "find_past() comes first"
        start, chunk = generation.sequence.length, self._cache.chunk_tokens
        return min(start - start % chunk + chunk, len(generation.read_ids)) - start

    @torch.inference_mode()
    def read_chunk(self, generation: Generation) -> Tensor | None:
        """Run the next chunk, for which there is room in the sequence.

        Returns the logits after it, (vocab,) fp32 on the host, once all is read and a token is to
        be sampled from them; before that None.
        """
        sequence = generation.sequence
        assert sequence is not None, "find_past() comes first"
        start = sequence.length
        ids = generation.read_ids[start : start + self.chunk_tokens(generation)]
        positions = torch.arange(start, start + len(ids))
        hidden = self._model.forward(torch.tensor(ids, dtype=torch.int64), positions, sequence)
        if generation.scores_prompt:
            self._score_prompt(generation, hidden, start)
        self._note_progress(generation)
        if generation.reading or generation.pending_ids or not generation.task.max_tokens:
            return None
        return self._model.logits(hidden[-1:])[0].cpu()

    @torch.inference_mode()
    def decode(self, generations: Sequence[Generation]) -> Tensor:
        """Run the next pending token of each request, for which there is room in each sequence.

        Returns the logits after them: (requests, vocab) fp32 on the host, which the next call may
        overwrite. A failed call leaves all requests as they were.
        """
        sequences = [g.sequence for g in generations if g.sequence is not None]
        token_ids = [generation.pending_ids[0] for generation in generations]
        logits = self._model.decode(
            token_ids,
            sequences,
            rows_are_independent=any(g.task.repeatable for g in generations),
        )
        for generation, sequence in zip(generations, sequences, strict=True):
            sequence.advance([generation.pending_ids.popleft()])
        return logits

    def _note_progress(self, generation: Generation) -> None:
        assert generation.sequence is not None
        read = min(generation.sequence.length, len(generation.prompt_ids))
        generation.prefilled_tokens = max(generation.prefilled_tokens, read)

    def _score_prompt(self, generation: Generation, hidden: Tensor, start: int) -> None:
        """Log-probabilities of the tokens that follow those of the chunk."""
        task, scores = generation.task, generation.prompt_scores
        assert task.prompt_logprobs is not None
        if start == 0:
            scores.append(GeneratedToken(task.prompt_ids[0]))
        targets = task.prompt_ids[start + 1 : start + 1 + len(hidden)]
        rows = max(_SCORED_LOGIT_BYTES // (4 * self._model.config.vocab_size), 1)
        for first in range(0, len(targets), rows):
            ids = targets[first : first + rows]
            logits = self._model.logits(hidden[first : first + len(ids)]).cpu()
            total = logits.logsumexp(-1, keepdim=True)
            own = logits.gather(1, torch.tensor(ids)[:, None]) - total
            top = logits.topk(task.prompt_logprobs, dim=-1)
            for row, token_id in enumerate(ids):
                pairs = zip(
                    top.indices[row].tolist(), (top.values[row] - total[row]).tolist(), strict=True
                )
                scores.append(GeneratedToken(token_id, float(own[row]), tuple(pairs)))


def step_error(error: Exception) -> HybridK2Error:
    """What a request that failed in a step is told."""
    if isinstance(error, HybridK2Error):
        return error
    what = f"{type(error).__name__}: {error}"
    # torch's allocator for the host raises a plain RuntimeError.
    no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if no_memory or "can't allocate memory" in str(error):
        failure: HybridK2Error = OutOfMemoryError(
            f"a step needed more memory than is free: {what}. Try again, send less at a time, or "
            "give the cache fewer tokens"
        )
    else:
        failure = EngineError(f"the step failed: {what}")
    failure.__cause__ = error
    return failure

"""From logits to a token.

Owns what a request may ask of sampling and the arithmetic that follows from it. The random number
of a token is a function of the request's seed and the token's position alone, so a request repeats
itself whatever else is running. Knows no text: token ids only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hybridk2.errors import EngineError, RequestError

MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks of sampling. Temperature 1.0 is the model's own recommendation.

    temperature 0 picks the most likely token. top_p 1.0, top_k 0, min_p 0.0 leave the distribution
    whole. seed None draws one. max_tokens None ends at the context's limit. stop: strings that end
    the visible text. logprobs: how many alternatives to report per token, None for no report.
    logit_bias: (token id, what is added to its logit), from -100 to 100.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        _check_real("temperature", self.temperature, 0.0, 100.0)
        _check_real("top_p", self.top_p, 0.0, 1.0, open_below=True)
        _check_real("min_p", self.min_p, 0.0, 1.0)
        _check_real("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_below=True)
        _check_real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_integer("top_k", self.top_k, 0, 2**31 - 1)
        if self.seed is not None:
            _check_integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        check_number_of_logprobs("logprobs", self.logprobs)
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise RequestError("stop: expected non-empty strings")
        for token_id, bias in self.logit_bias:
            _check_integer("logit_bias: token id", token_id, 0, 2**31 - 1)
            _check_real(f"logit_bias of {token_id}", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)


def _check_real(
    name: str, value: float, low: float, high: float, *, open_below: bool = False
) -> None:
    inside = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (low < value if open_below else low <= value)
        and value <= high
    )
    if not inside:
        bound = "above" if open_below else "from"
        raise RequestError(f"{name}: expected a number {bound} {low:g} to {high:g}, found {value}")


def _check_integer(name: str, value: int, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise RequestError(f"{name}: expected an integer from {low} to {high}, found {value}")


def check_number_of_logprobs(name: str, value: int | None) -> None:
    """Raises RequestError when more alternatives are asked for than are reported."""
    if value is not None:
        _check_integer(name, value, 0, MAX_TOP_LOGPROBS)


@dataclass(frozen=True)
class GeneratedToken:
    """A token as sampled. Log-probabilities are the model's own, before temperature and penalties.

    Both are None/empty when the request asked for none. top_logprobs: (id, logprob), likeliest
    first.
    """

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class TokenConstraint(Protocol):
    """What a reply is held to, token by token: `mask`, then `accept` of what was sampled.

    Called by the engine's thread only, strictly in turns. The token that ends the reply is accepted
    as any other. What either raises ends the request with an EngineError.
    """

    def mask(self) -> np.ndarray | None:
        """(vocab_size,) bool: True where a token may come next. None: any may."""

    def accept(self, token_id: int) -> None:
        """This token was sampled."""


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of one position: Philox-4x64, keyed by seed, counted by position.

    Counter-based (Salmon et al., SC 2011), so no state passes from token to token.
    """
    key = np.array([seed % 2**64, 0], dtype=np.uint64)
    generator = np.random.Philox(key=key, counter=[position, 0, 0, 0])
    return float(np.random.Generator(generator).random())


class Sampler:
    """Samples one request's tokens, one after the other."""

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        prompt_ids: Sequence[int],
        vocab_size: int,
        forbidden_ids: Sequence[int] = (),
        constraint: TokenConstraint | None = None,
    ) -> None:
        """forbidden_ids: never sampled, such as ids that stand for no text. constraint: what may
        be sampled beyond that. Raises RequestError for a bias of an id outside the vocabulary."""
        self._params = params
        self._seed = seed
        self._constraint = constraint
        self._forbidden = torch.tensor(forbidden_ids, dtype=torch.int64)
        self._repeats = params.repetition_penalty != 1.0
        biased = [token_id for token_id, _ in params.logit_bias]
        if biased and max(biased) >= vocab_size:
            raise RequestError(
                f"logit_bias: token id {max(biased)} is not in the vocabulary of {vocab_size}"
            )
        self._biased = torch.tensor(biased, dtype=torch.int64)
        self._bias = torch.tensor([bias for _, bias in params.logit_bias], dtype=torch.float64)
        self._counts_output = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._seen = torch.zeros(vocab_size, dtype=torch.bool)
        self._counts = torch.zeros(vocab_size)
        self._seen[torch.tensor(list(set(prompt_ids)), dtype=torch.int64)] = True

    def sample(self, logits: Tensor, position: int) -> GeneratedToken:
        """logits: (vocab,) fp32 on the host, finite. position: the index the token will have.

        Raises EngineError when the constraint leaves no token to choose.
        """
        allowed = self._allowed(self._penalised(logits))
        token_id = self._pick(allowed, position)
        if self._constraint is not None:
            self._constraint.accept(token_id)
        self._seen[token_id] = True
        self._counts[token_id] += 1
        if self._params.logprobs is None:
            return GeneratedToken(token_id)
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        top = logprobs.topk(self._params.logprobs)
        return GeneratedToken(
            token_id,
            float(logprobs[token_id]),
            tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
        )

    def _penalised(self, logits: Tensor) -> Tensor:
        """Repetition as in CTRL (arXiv 1909.05858), over prompt and output; presence and frequency
        as in OpenAI's API, over the output alone."""
        params = self._params
        logits = logits.double()  # a copy: the logits themselves are reported
        if self._repeats:
            divided = torch.where(
                logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty
            )
            logits = torch.where(self._seen, divided, logits)
        if self._counts_output:
            logits = logits - params.frequency_penalty * self._counts
            logits = logits - params.presence_penalty * (self._counts > 0)
        if self._biased.numel():
            logits = logits.index_add(0, self._biased, self._bias)
        return logits

    def _allowed(self, logits: Tensor) -> Tensor:
        """Logits with -inf wherever a token must not come."""
        if self._forbidden.numel():
            logits[self._forbidden] = float("-inf")
        mask = None if self._constraint is None else self._constraint.mask()
        if mask is None:
            return logits
        logits = logits.masked_fill_(torch.from_numpy(~mask), float("-inf"))
        if not bool(logits.isfinite().any()):
            raise EngineError("the constraint of this request allows no token to come next")
        return logits

    def _pick(self, logits: Tensor, position: int) -> int:
        params = self._params
        if params.temperature == 0:
            return int(logits.argmax())
        probabilities = torch.softmax((logits - logits.max()) / params.temperature, dim=-1)
        if params.min_p > 0.0:
            unlikely = probabilities < params.min_p * probabilities.max()
            probabilities = probabilities.masked_fill(unlikely, 0.0)
        if params.top_k == 0 and params.top_p == 1.0:
            return _draw(probabilities, uniform(self._seed, position))
        # Likeliest first; equal ones by id, so that the order is the same on every run.
        kept, order = torch.sort(probabilities, descending=True, stable=True)
        if params.top_k > 0:
            kept = kept[: params.top_k]
        if params.top_p < 1.0:
            # The smallest set that reaches top_p, measured within what top_k left.
            mass = kept.cumsum(-1) / kept.sum()
            kept = kept[: int((mass < params.top_p).sum()) + 1]
        return int(order[_draw(kept, uniform(self._seed, position))])


def _draw(probabilities: Tensor, drawn: float) -> int:
    """The index at which the cumulated probabilities, scaled to 1, pass drawn: never one of 0."""
    mass = probabilities.cumsum(-1)
    index = int(torch.searchsorted(mass, drawn * float(mass[-1]), right=True))
    # drawn < 1, but its product may round up to the whole mass.
    return min(index, int(torch.searchsorted(mass, mass[-1])))

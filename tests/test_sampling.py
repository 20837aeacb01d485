"""Sampling draws from the distribution that the parameters describe, and repeats itself."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from hybridk2.errors import EngineError, RequestError
from hybridk2.sampling import Sampler, SamplingParams, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
DRAWS = 2000


def draw(params: SamplingParams, logits: torch.Tensor = LOGITS, seed: int = 1) -> Counter[int]:
    counts: Counter[int] = Counter()
    for position in range(DRAWS):
        sampler = Sampler(params, seed, [], logits.numel())
        counts[sampler.sample(logits, position).id] += 1
    return counts


def assert_drawn_from(counts: Counter[int], probabilities: torch.Tensor) -> None:
    for token, p in enumerate(probabilities.tolist()):
        if p == 0:
            assert counts[token] == 0, f"token {token} has probability 0"
            continue
        # Five standard deviations of a binomial count.
        tolerance = 5 * math.sqrt(DRAWS * p * (1 - p)) + 1
        assert abs(counts[token] - DRAWS * p) <= tolerance, f"token {token}: {counts[token]}"


def test_temperature_one_draws_from_the_softmax() -> None:
    assert_drawn_from(draw(SamplingParams()), LOGITS.softmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    counts = draw(SamplingParams(temperature=temperature))
    assert_drawn_from(counts, (LOGITS / temperature).softmax(-1))


def test_temperature_zero_takes_the_likeliest() -> None:
    assert set(draw(SamplingParams(temperature=0.0))) == {0}


def test_top_k_keeps_the_k_likeliest() -> None:
    kept = torch.where(torch.arange(6) < 2, LOGITS, -math.inf)
    assert_drawn_from(draw(SamplingParams(top_k=2)), kept.softmax(-1))


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    probabilities = LOGITS.softmax(-1)  # 0.56, 0.21, 0.13, 0.08, ...
    kept = torch.where(torch.arange(6) < 3, LOGITS, -math.inf)
    between = float(probabilities[:2].sum() + probabilities[:3].sum()) / 2
    assert_drawn_from(draw(SamplingParams(top_p=between)), kept.softmax(-1))


def test_top_p_of_almost_nothing_still_keeps_the_likeliest() -> None:
    assert set(draw(SamplingParams(top_p=1e-9))) == {0}


def test_min_p_drops_what_is_less_than_that_share_of_the_likeliest() -> None:
    ratio = float((LOGITS[3] - LOGITS[0]).exp())
    kept = torch.where(torch.arange(6) < 4, LOGITS, -math.inf)
    assert_drawn_from(draw(SamplingParams(min_p=ratio * 0.999)), kept.softmax(-1))
    kept = torch.where(torch.arange(6) < 3, LOGITS, -math.inf)
    assert_drawn_from(draw(SamplingParams(min_p=ratio * 1.001)), kept.softmax(-1))


def test_forbidden_ids_are_never_sampled() -> None:
    sampler = Sampler(SamplingParams(temperature=0.0), 0, [], 6, forbidden_ids=[0, 1])
    assert sampler.sample(LOGITS, 0).id == 2


def test_a_bias_is_added_to_its_logit_and_not_to_what_is_reported() -> None:
    params = SamplingParams(logit_bias=((3, 1.5), (0, -100.0)), logprobs=1)
    biased = LOGITS + torch.tensor([-100.0, 0.0, 0.0, 1.5, 0.0, 0.0])
    assert_drawn_from(draw(params), biased.softmax(-1).where(biased > -50, torch.tensor(0.0)))
    token = Sampler(params, 0, [], 6).sample(LOGITS, 0)
    assert token.top_logprobs[0][1] == pytest.approx(float(LOGITS.double().log_softmax(-1)[0]))


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(RequestError, match="logit_bias: token id 6"):
        Sampler(SamplingParams(logit_bias=((6, 1.0),)), 0, [], 6)


class Only:
    """Allows the ids given, None for all, and keeps what was accepted."""

    def __init__(self, *allowed: int) -> None:
        self.allowed = np.isin(np.arange(6), allowed) if allowed else None
        self.accepted: list[int] = []

    def mask(self) -> np.ndarray | None:
        return self.allowed

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def test_a_constraint_leaves_the_distribution_of_what_it_allows() -> None:
    counts: Counter[int] = Counter()
    for position in range(DRAWS):
        only = Only(1, 2, 4)
        token = Sampler(SamplingParams(), 1, [], 6, constraint=only).sample(LOGITS, position)
        assert only.accepted == [token.id]
        counts[token.id] += 1
    kept = torch.where(torch.isin(torch.arange(6), torch.tensor([1, 2, 4])), LOGITS, -math.inf)
    assert_drawn_from(counts, kept.softmax(-1))


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}]
)
def test_every_way_of_choosing_stays_within_the_constraint(params: dict[str, float]) -> None:
    sampler = Sampler(SamplingParams(**params), 0, [], 6, constraint=Only(5))  # type: ignore[arg-type]
    assert [sampler.sample(LOGITS, position).id for position in range(3)] == [5, 5, 5]


def test_a_constraint_without_a_mask_allows_all_but_the_forbidden() -> None:
    params = SamplingParams(temperature=0.0)
    assert Sampler(params, 0, [], 6, [0], Only()).sample(LOGITS, 0).id == 1
    with pytest.raises(EngineError, match="allows no token"):
        Sampler(params, 0, [], 6, [0], Only(0)).sample(LOGITS, 0)


def test_repetition_penalty_counts_the_prompt_and_scales_by_sign() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0, -1.5])
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert Sampler(params, 0, [0], 4).sample(logits, 0).id == 1
    # A negative logit is multiplied: -1.0 becomes -2.0, below -1.5.
    only_negative = torch.tensor([-9.0, -9.0, -1.0, -1.5])
    assert Sampler(params, 0, [2], 4).sample(only_negative, 0).id == 3


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = torch.tensor([1.0, 0.7, 0.0])
    presence = Sampler(SamplingParams(temperature=0.0, presence_penalty=0.5), 0, [0], 3)
    assert [presence.sample(logits, i).id for i in range(4)] == [0, 1, 0, 0]
    frequency = Sampler(SamplingParams(temperature=0.0, frequency_penalty=0.2), 0, [0], 3)
    assert [frequency.sample(logits, i).id for i in range(5)] == [0, 0, 1, 0, 1]


def test_logprobs_are_the_models_own() -> None:
    params = SamplingParams(temperature=0.3, top_k=2, frequency_penalty=1.0, logprobs=3)
    token = Sampler(params, 0, [], 6).sample(LOGITS, 0)
    expected = LOGITS.double().log_softmax(-1)
    assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-12)
    assert [id for id, _ in token.top_logprobs] == [0, 1, 2]
    assert [p for _, p in token.top_logprobs] == pytest.approx(expected[:3].tolist(), abs=1e-12)


def test_a_token_depends_on_seed_and_position_alone() -> None:
    params = SamplingParams()
    alone = Sampler(params, 42, [], 6).sample(LOGITS, 17).id
    busy = Sampler(params, 42, [], 6)
    for position in range(17):
        busy.sample(LOGITS, position)
    assert busy.sample(LOGITS, 17).id == alone
    assert len({uniform(seed, 3) for seed in range(100)}) == 100
    assert len({uniform(3, position) for position in range(100)}) == 100
    assert uniform(-1, 0) == uniform(2**64 - 1, 0) != uniform(2**64 - 2, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", float("inf")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("logprobs", 21),
        ("stop", ("",)),
        ("logit_bias", ((0, 100.5),)),
        ("logit_bias", ((0, float("nan")),)),
        ("logit_bias", ((-1, 1.0),)),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]

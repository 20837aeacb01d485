"""Picks and weights by one kernel against the router's own operators in torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybridk2.checkpoint import RouterWeights
from hybridk2.config import KIMI_K2_THINKING
from hybridk2.device import CpuDevice
from hybridk2.model.moe import TopKRouter
from tests.triton_kernels import DEVICE
from tests.triton_offline import CARDS, MOST_SHARED_BYTES, MOST_STACK_BYTES, compiled

routing = pytest.importorskip("hybridk2.model.triton.routing", reason="Triton is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]

EPS_FP32 = 2.0**-23
FACTOR = KIMI_K2_THINKING.routed_scaling_factor
NOBODY = -1


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Picked:
    """What the kernel makes of logits."""

    def __init__(
        self, logits: Tensor, bias: Tensor, top_k: int, in_use: Tensor | None = None
    ) -> None:
        rows = logits.shape[0]
        in_use = torch.ones(rows, 1, dtype=torch.bool) if in_use is None else in_use
        picks = torch.full((rows, top_k), 12345, dtype=torch.int32, device=DEVICE)
        found = routing.pick_experts(
            *(tensor.to(DEVICE) for tensor in (logits, bias, in_use)),
            picks,
            scaling_factor=FACTOR,
            nobody=NOBODY,
        )
        self.expert_ids, self.weights = (tensor.cpu() for tensor in found)
        self.picks = picks.cpu()


class RouterOfLogits(TopKRouter):
    """The model's router, whose input is its logits."""

    def _logits(self, x: Tensor) -> Tensor:
        return x


def by_torch(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    experts = logits.shape[1]
    config = replace(KIMI_K2_THINKING, n_routed_experts=experts, num_experts_per_tok=top_k)
    weights = RouterWeights(weight=torch.empty(experts, 0), bias=bias)
    return RouterOfLogits(config, weights, CpuDevice())(logits)


def choice_of(logits: Tensor, bias: Tensor) -> Tensor:
    return (logits.double().sigmoid() + bias.double()).nan_to_num(nan=float("-inf"))


def assert_weights(found: Tensor, logits: Tensor, picks: Tensor) -> None:
    """A score is off by (|x| + 6) eps, a sum of k and the quotient's product by k + 2 more; both
    the numerator and the sum carry a score's error."""
    picked = logits.gather(1, picks.long()).double()
    exact = picked.sigmoid() / (picked.sigmoid().sum(1, keepdim=True) + 1e-20) * FACTOR
    off = 2 * (picked.abs().amax(1, keepdim=True) + 6) + picks.shape[1] + 2
    excess = (found.double() - exact).abs() - off * EPS_FP32 * exact.abs() - 2.0**-126
    assert excess.max() <= 0, f"{excess.max()} beyond the tolerance"


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize(("experts", "top_k"), [(384, 8), (32, 4), (37, 3), (5, 5), (1, 1)])
def test_random_logits_are_picked_as_torch_picks_them(experts: int, top_k: int, rows: int) -> None:
    logits, bias = random(rows, experts, seed=rows), random(experts, seed=1) / 20
    ordered = choice_of(logits, bias).sort(descending=True).values
    # No two of the picked and the next are so near that a score's last bits decide.
    gaps = -ordered[:, : top_k + 1].diff()
    assert not gaps.numel() or gaps.min() > 32 * EPS_FP32, "another seed is needed"
    found = Picked(logits, bias, top_k)
    ids, weights = by_torch(logits, bias, top_k)
    assert torch.equal(found.expert_ids, ids)
    assert torch.equal(found.picks, ids)
    assert_weights(found.weights, logits, ids)
    assert_weights(weights, logits, ids)


def test_of_equal_scores_the_lower_expert_comes_first() -> None:
    values = torch.randint(0, 4, (8, 384), generator=torch.Generator().manual_seed(0))
    logits, bias = values.float(), torch.zeros(384)
    wanted = logits.sort(descending=True, stable=True).indices[:, :8].int()
    found = Picked(logits, bias, 8)
    assert torch.equal(found.expert_ids, wanted)
    assert_weights(found.weights, logits, wanted)
    # torch leaves open which of equal ones it takes: the scores are the same.
    ids, _ = by_torch(logits, bias, 8)
    assert torch.equal(logits.gather(1, ids.long()), logits.gather(1, wanted.long()))


def test_the_bias_moves_the_choice_and_not_the_weights() -> None:
    logits, bias = random(4, 384), torch.zeros(384)
    bias[[7, 300]] = torch.tensor([3.0, -3.0])
    logits[:, 300] = 9.0
    found = Picked(logits, bias, 8)
    assert (found.expert_ids[:, 0] == 7).all()
    assert not (found.expert_ids == 300).any()
    assert_weights(found.weights, logits, found.expert_ids)


def test_nan_is_the_lowest_and_stays_in_its_own_tokens_weights() -> None:
    logits, bias = random(4, 37), random(37, seed=1) / 20
    clean = Picked(logits, bias, 3)
    logits[1, 3:] = torch.nan  # as many numbers as picks: in no weight
    logits[2, 2:] = torch.nan  # one too few
    logits[3] = torch.nan
    found = Picked(logits, bias, 3)
    assert torch.equal(found.expert_ids[0], clean.expert_ids[0])
    assert torch.equal(found.weights[0], clean.weights[0])
    assert sorted(found.expert_ids[1].tolist()) == [0, 1, 2]
    assert_weights(found.weights[1:2], logits[1:2], found.expert_ids[1:2])
    assert sorted(found.expert_ids[2].tolist()) == [0, 1, 2]
    assert found.expert_ids[3].tolist() == [0, 1, 2]
    assert found.weights[2:].isnan().all()
    ids, weights = by_torch(logits, bias, 3)
    assert torch.equal(found.expert_ids[:2], ids[:2])
    assert torch.equal(found.weights.isnan(), weights.isnan())


def test_infinite_logits_and_biases_are_ordered_as_torch_orders_them() -> None:
    logits, bias = random(3, 16), random(16, seed=1) / 20
    logits[0, 4], logits[0, 5] = torch.inf, -torch.inf
    logits[1] = -torch.inf
    bias[9], bias[10] = torch.inf, -torch.inf
    logits[2, 0] = torch.nan  # below even what the bias forbids
    found = Picked(logits, bias, 16)
    ids, weights = by_torch(logits, bias, 16)
    assert torch.equal(found.expert_ids, ids)
    assert (found.expert_ids[:, 0] == 9).all()
    assert found.expert_ids[2].tolist()[-2:] == [10, 0]
    assert torch.equal(found.weights.isnan(), weights.isnan())
    assert (found.weights[1] == 0).all()
    assert_weights(found.weights[:1], logits[:1].clamp(-200, 200), ids[:1])


def test_scores_that_all_underflow_give_weights_of_zero() -> None:
    found = Picked(torch.full((1, 16), -1e4), random(16), 4)
    assert (found.weights == 0).all()


def test_rows_that_are_not_in_use_ask_nobody_and_are_told_all_the_same() -> None:
    logits, bias = random(4, 32), torch.zeros(32)
    in_use = torch.tensor([[True], [False], [True], [False]])
    found, everyone = Picked(logits, bias, 4, in_use), Picked(logits, bias, 4)
    assert torch.equal(found.picks, everyone.picks)
    assert torch.equal(found.expert_ids[::2], everyone.expert_ids[::2])
    assert (found.expert_ids[1::2] == NOBODY).all()
    assert torch.equal(found.weights, everyone.weights)


def test_a_rows_bits_do_not_depend_on_its_neighbours() -> None:
    logits, bias = random(8, 384), random(384, seed=1)
    together = Picked(logits, bias, 8)
    for row in range(8):
        alone = Picked(logits[row : row + 1], bias, 8)
        assert torch.equal(alone.expert_ids[0], together.expert_ids[row])
        assert torch.equal(alone.weights[0], together.weights[row])


def launch_k2() -> None:
    in_use, picks = torch.ones(8, 1, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.int32)
    routing.pick_experts(
        torch.empty(8, 384), torch.empty(384), in_use, picks, scaling_factor=FACTOR, nobody=NOBODY
    )


def test_the_kernel_compiles_for_every_card_within_its_shared_memory() -> None:
    found = compiled(__name__, launch_k2.__name__)
    assert [(kernel.kernel, kernel.card) for kernel in found] == [("_pick", card) for card in CARDS]
    for kernel in found:
        assert kernel.shared_bytes <= MOST_SHARED_BYTES, kernel
        assert kernel.stack_bytes <= MOST_STACK_BYTES, kernel

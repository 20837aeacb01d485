"""INT4 experts on the GPU against the format's own arithmetic in fp64, and against the host's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybridk2.config import KIMI_K2_THINKING
from hybridk2.experts.host import HostExperts
from hybridk2.planner import ModelSizes
from tests.expert_panels import pack_expert
from tests.expert_weights import (
    RandomLayer,
    assert_within,
    compute,
    random_activations,
    random_routing,
)
from tests.triton_kernels import DEVICE
from tests.triton_offline import CARDS, MOST_SHARED_BYTES, MOST_STACK_BYTES, compiled

int4 = pytest.importorskip("hybridk2.model.triton.int4", reason="Triton is not installed")

# Widths of 1.5 blocks and of half a one: both matrices end in the middle of a block. Small, as the
# interpreter takes 40 ms for a strip.
EXPERTS, HIDDEN, INTERMEDIATE = 6, 96, 32


@pytest.fixture(scope="module")
def layer() -> RandomLayer:
    return RandomLayer(EXPERTS, HIDDEN, INTERMEDIATE)


def packed(layer: RandomLayer, experts: list[int]) -> Tensor:
    return torch.stack([pack_expert(*layer.experts[expert]) for expert in experts])


def resident(
    layer: RandomLayer, x: Tensor, places: Tensor, weights: Tensor, panels: Tensor
) -> Tensor:
    arguments = (tensor.to(DEVICE) for tensor in (x, places, weights, panels))
    return int4.resident_experts(*arguments, intermediate=layer.intermediate).cpu()


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 3), (8, 1)])
def test_the_weighted_sum_of_experts_is_the_references(
    layer: RandomLayer, tokens: int, top_k: int
) -> None:
    x = random_activations(tokens, HIDDEN, torch.bfloat16)
    ids, weights = random_routing(tokens, EXPERTS, top_k)
    found = resident(layer, x, ids, weights, packed(layer, list(range(EXPERTS))))
    assert_within(found, layer.reference(x, ids, weights))


def test_only_experts_with_a_place_count_and_places_are_not_ids(layer: RandomLayer) -> None:
    here = [4, 1]  # expert 4 lies at place 0, expert 1 at place 1, the others elsewhere
    x = random_activations(4, HIDDEN, torch.bfloat16)
    ids = torch.tensor([[4, 1, 0], [0, 2, 1], [1, 4, 5], [0, 2, 3]], dtype=torch.int32)
    weights = random_routing(4, EXPERTS, 3)[1]
    places = torch.full_like(ids, -1)
    for place, expert in enumerate(here):
        places[ids == expert] = place
    found = resident(layer, x, places, weights, packed(layer, here))
    reference = layer.reference(x, ids.where(places >= 0, -1), weights)
    assert_within(found, reference)
    assert found[3].count_nonzero() == 0


def test_an_expert_may_stand_twice_in_a_row(layer: RandomLayer) -> None:
    x = random_activations(1, HIDDEN, torch.bfloat16)
    ids = torch.tensor([[2, 2]], dtype=torch.int32)
    weights = torch.tensor([[0.75, 0.5]])
    found = resident(layer, x, ids, weights, packed(layer, list(range(EXPERTS))))
    assert_within(found, layer.reference(x, ids, weights))


def test_a_tokens_bits_do_not_depend_on_its_neighbours(layer: RandomLayer) -> None:
    x = random_activations(2, HIDDEN, torch.bfloat16)
    ids, weights = random_routing(2, EXPERTS, 2)
    panels = packed(layer, list(range(EXPERTS)))
    together = resident(layer, x, ids, weights, panels)
    for token in range(2):
        row = slice(token, token + 1)
        alone = resident(layer, x[row].contiguous(), ids[row], weights[row], panels)
        assert torch.equal(together[row], alone)


def test_one_tokens_nan_stays_its_own(layer: RandomLayer) -> None:
    x = random_activations(3, HIDDEN, torch.bfloat16)
    x[1, 7] = float("nan")
    ids, weights = random_routing(3, EXPERTS, 2)
    found = resident(layer, x, ids, weights, packed(layer, list(range(EXPERTS))))
    assert found[1].isnan().all()
    others = torch.tensor([0, 2])
    assert_within(found[others], layer.reference(x[others], ids[others], weights[others]))


def test_host_and_resident_shares_add_up_to_the_host_alone(layer: RandomLayer) -> None:
    x = random_activations(4, HIDDEN, torch.bfloat16)
    ids, weights = random_routing(4, EXPERTS, 2)
    lives_here = ids % 2 == 0
    panels = packed(layer, list(range(EXPERTS)))
    with HostExperts(1, EXPERTS, HIDDEN, INTERMEDIATE, threads=1) as host:
        layer.load_into(host)
        share = compute(host, x, ids.where(~lives_here, -1), weights)
    share = share + resident(layer, x, ids.where(lives_here, -1), weights, panels)
    assert_within(share, layer.reference(x, ids, weights))


@pytest.mark.parametrize(
    ("hidden", "intermediate"),
    [
        (1056, 32),
        (32, 1056),
        pytest.param(7168, 2048, marks=pytest.mark.soak),
    ],
)
def test_long_sums_pass_over_several_tiles(hidden: int, intermediate: int) -> None:
    """K2's own widths take the interpreter half a minute. A tile is 128 lines of 8 columns: 1056
    columns are a tile and four lines, and end in the middle of a block."""
    layer = RandomLayer(2, hidden, intermediate)
    x = random_activations(1, hidden, torch.bfloat16)
    ids, weights = torch.tensor([[1]], dtype=torch.int32), torch.tensor([[0.5]])
    found = resident(layer, x, ids, weights, packed(layer, [0, 1]))
    assert_within(found, layer.reference(x, ids, weights))


def test_an_expert_has_as_many_bytes_as_the_planner_counts() -> None:
    assert int4.expert_bytes(7168, 2048) == ModelSizes.from_config(KIMI_K2_THINKING).expert_bytes


@pytest.mark.parametrize(("hidden", "intermediate"), [(96, 32), (512, 128)])
def test_a_widened_expert_is_each_value_rounded_to_the_nearest_bf16(
    hidden: int, intermediate: int
) -> None:
    layer = RandomLayer(2, hidden, intermediate, seed=3)
    for expert in range(2):
        gate_up = torch.full((2 * intermediate, hidden), torch.nan).bfloat16().to(DEVICE)
        down = torch.full((hidden, intermediate), torch.nan).bfloat16().to(DEVICE)
        int4.dequantise(
            pack_expert(*layer.experts[expert]).to(DEVICE),
            hidden=hidden,
            intermediate=intermediate,
            gate_up_out=gate_up,
            down_out=down,
        )
        gate, up, exact_down = layer.dense(expert)
        assert torch.equal(gate_up.cpu(), torch.cat((gate, up)).bfloat16())
        assert torch.equal(down.cpu(), exact_down.bfloat16())


def test_all_sixteen_values_occur_in_every_column_of_a_word(layer: RandomLayer) -> None:
    """What the comparisons above rest on: no nibble value and no place in a word is left out."""
    words = layer.experts[0][0].packed
    for column in range(8):
        assert set((words >> (4 * column) & 15).unique().tolist()) == set(range(16))


def launch_k2() -> None:
    """Every launch of one K2 expert, for compiling."""
    panels = torch.empty(1, int4.expert_bytes(7168, 2048), dtype=torch.uint8)
    int4.resident_experts(
        torch.empty(2, 7168, dtype=torch.bfloat16),
        torch.empty(2, 8, dtype=torch.int32),
        torch.empty(2, 8),
        panels,
        intermediate=2048,
    )
    int4.dequantise(
        panels[0],
        hidden=7168,
        intermediate=2048,
        gate_up_out=torch.empty(4096, 7168, dtype=torch.bfloat16),
        down_out=torch.empty(7168, 2048, dtype=torch.bfloat16),
    )


def test_the_kernels_compile_for_every_card_within_its_shared_memory() -> None:
    found = compiled(__name__, launch_k2.__name__)
    assert {(kernel.kernel, kernel.card) for kernel in found} == {
        (name, card) for name in ("_gate_up", "_down", "_widen") for card in CARDS
    }
    for kernel in found:
        assert kernel.shared_bytes <= MOST_SHARED_BYTES, kernel
        assert kernel.stack_bytes <= MOST_STACK_BYTES, kernel

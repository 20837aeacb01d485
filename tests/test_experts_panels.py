"""Panels read with torch: the checkpoint's exact values, and experts as the host computes them."""

from __future__ import annotations

import pytest
import torch

from hybridk2.experts import panels
from hybridk2.experts.host import HostExperts

from .expert_weights import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    RandomLayer,
    assert_within,
    random_activations,
    random_routing,
)


def packed_layer(layer: RandomLayer) -> torch.Tensor:
    """(experts, expert_bytes), packed by the extension."""
    with HostExperts(1, 1, layer.hidden, layer.intermediate, threads=1) as experts:
        return torch.stack([experts.pack_expert(*matrices) for matrices in layer.experts])


# Whole blocks of 64 columns, half ones, and K2's true sizes.
@pytest.mark.parametrize(
    ("hidden", "intermediate"), [(64, 64), (32, 32), (96, 32), (HIDDEN, INTERMEDIATE), (7168, 2048)]
)
def test_panels_give_back_the_values_that_were_packed(hidden: int, intermediate: int) -> None:
    layer = RandomLayer(1, hidden, intermediate, seed=hidden)
    panel = packed_layer(layer)[0]
    assert panel.numel() == panels.expert_bytes(hidden, intermediate)
    gate_up, down = torch.empty(2 * intermediate, hidden), torch.empty(hidden, intermediate)
    panels.dequantise(
        panel, hidden=hidden, intermediate=intermediate, gate_up_out=gate_up, down_out=down
    )
    gate, up, expected_down = layer.dense(0)
    assert torch.equal(gate_up.double(), torch.cat([gate, up]))
    assert torch.equal(down.double(), expected_down)


def test_values_need_no_more_than_eleven_significant_bits() -> None:
    """So products of them in TF32, which has eleven, are exact: three of a code, eight of bf16."""
    codes = torch.arange(-8, 8).double()
    significands = torch.arange(128, 256).double()  # of every normal bf16
    products = torch.outer(codes, significands).abs()
    odd = products
    while (even := (odd != 0) & (odd % 2 == 0)).any():
        odd = torch.where(even, odd / 2, odd)
    assert odd.max() < 2**11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tokens", [1, 3, 8, 40])
def test_experts_computed_from_panels_agree_with_the_reference(
    tokens: int, dtype: torch.dtype
) -> None:
    layer = RandomLayer(EXPERTS, HIDDEN, INTERMEDIATE)
    x = random_activations(tokens, HIDDEN, dtype)
    places, weights = random_routing(tokens, EXPERTS, TOP_K)
    places[::2, 0] = -1
    result = panels.resident_experts(
        x, places, weights, packed_layer(layer), intermediate=INTERMEDIATE
    )
    assert_within(result, layer.reference(x, places, weights))
    nobody = torch.full_like(places, -1)
    none = panels.resident_experts(
        x, nobody, weights, packed_layer(layer), intermediate=INTERMEDIATE
    )
    assert torch.equal(none, torch.zeros(tokens, HIDDEN))

"""A streamed expert on the GPU: unpacked by Triton without rounding, then as the reference is."""

from __future__ import annotations

import pytest
import torch

from hybridk2.device import CpuDevice, select_device
from hybridk2.experts import panels
from hybridk2.experts.prefill import ExpertProducts

from .expert_panels import pack_expert
from .expert_weights import HIDDEN, INTERMEDIATE, RandomLayer, assert_within, random_activations
from .triton_kernels import DEVICE, INTERPRETED
from .triton_offline import MOST_SHARED_BYTES, MOST_STACK_BYTES, compiled

int4 = pytest.importorskip("hybridk2.model.triton.int4", reason="Triton is not installed")


@pytest.mark.parametrize(("hidden", "intermediate"), [(96, 32), (HIDDEN, INTERMEDIATE)])
def test_unpacking_into_fp32_rounds_nothing(hidden: int, intermediate: int) -> None:
    layer = RandomLayer(1, hidden, intermediate)
    packed = pack_expert(*layer.experts[0]).to(DEVICE)
    found, expected = (
        (
            torch.full((2 * intermediate, hidden), torch.nan, device=DEVICE),
            torch.empty(hidden, intermediate, device=DEVICE),
        )
        for _ in range(2)
    )
    for dequantise, (gate_up, down) in (
        (int4.dequantise, found),
        (panels.dequantise, expected),
    ):
        dequantise(
            packed, hidden=hidden, intermediate=intermediate, gate_up_out=gate_up, down_out=down
        )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_an_expert_unpacked_by_triton_is_within_the_references_bound() -> None:
    layer = RandomLayer(1, HIDDEN, INTERMEDIATE)
    device = CpuDevice() if INTERPRETED else select_device("cuda")
    products = ExpertProducts(HIDDEN, INTERMEDIATE, device, int4.dequantise)
    x = random_activations(20, HIDDEN, torch.bfloat16)
    found = products(pack_expert(*layer.experts[0]).to(DEVICE), x.to(DEVICE)).cpu()
    only = torch.zeros(20, 1, dtype=torch.int32)
    assert_within(found, layer.reference(x, only, torch.ones(20, 1)))


def launch_k2() -> None:
    """The launches of one streamed expert, for compiling."""
    int4.dequantise(
        torch.empty(int4.expert_bytes(7168, 2048), dtype=torch.uint8),
        hidden=7168,
        intermediate=2048,
        gate_up_out=torch.empty(4096, 7168),
        down_out=torch.empty(7168, 2048),
    )


def test_it_compiles_for_every_card_without_spills() -> None:
    kernels = compiled(__name__, "launch_k2")
    assert {kernel.kernel for kernel in kernels} == {"_widen"}
    for kernel in kernels:
        assert kernel.shared_bytes <= MOST_SHARED_BYTES, kernel
        assert kernel.stack_bytes <= MOST_STACK_BYTES, kernel

"""Where experts lie in host memory: regions that make up the one-node layout, no memory for others.

The kernels prove the arena's layout; here it is the measure for `pack_expert` and the regions.
"""

from __future__ import annotations

import ctypes
import os

import numpy as np
import pytest
import torch

from hybridk2.checkpoint import QuantizedLinear
from hybridk2.errors import ConfigError, EngineError
from hybridk2.experts.host import ExpertRegion, HostExperts

from .expert_weights import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    RandomLayer,
    assert_within,
    compute,
    loaded,
    random_activations,
    random_matrix,
    random_routing,
)


@pytest.fixture(scope="module")
def layer() -> RandomLayer:
    return RandomLayer(EXPERTS, HIDDEN, INTERMEDIATE)


def assembled(experts: HostExperts, regions: tuple[ExpertRegion, ...]) -> bytes:
    """The regions' bytes put where their offsets say; every byte must be given exactly once."""
    out = bytearray(experts.expert_bytes)
    covered = 0
    for region in regions:
        assert region.offset == covered, "ascending, without gaps"
        out[region.offset : region.offset + region.bytes] = ctypes.string_at(
            region.address, region.bytes
        )
        covered += region.bytes
    assert covered == experts.expert_bytes
    return bytes(out)


@pytest.mark.parametrize("nodes", [1, 2, 3, 6, 8])
def test_regions_put_together_are_the_packed_expert_on_any_number_of_nodes(
    layer: RandomLayer, nodes: int
) -> None:
    with loaded(layer, threads=8, simulated_nodes=nodes) as experts:
        assert len(experts.threads_of_node) == nodes
        for number, matrices in enumerate(layer.experts):
            regions = experts.expert_regions(0, number)
            assert len(regions) <= (1 if nodes == 1 else 2 * nodes)
            packed = experts.pack_expert(*matrices)
            assert assembled(experts, regions) == packed.numpy().tobytes()


def test_a_layer_lies_on_each_node_without_gaps_whichever_experts_are_elsewhere(
    layer: RandomLayer,
) -> None:
    """What is pinned for a layer is then one range on each node."""
    elsewhere = np.zeros((2, EXPERTS), bool)
    elsewhere[0, [0, 3]] = elsewhere[1, [EXPERTS - 1]] = True
    with HostExperts(
        2, EXPERTS, HIDDEN, INTERMEDIATE, threads=2, simulated_nodes=2, elsewhere=elsewhere
    ) as experts:
        ends: list[int] = []
        for slot, expert in np.argwhere(~elsewhere).tolist():
            experts.load_expert(slot, expert, *layer.experts[expert])
            regions = sorted(experts.expert_regions(slot, expert))
            joined = [regions[0]]
            for region in regions[1:]:
                if joined[-1].address + joined[-1].bytes == region.address:
                    joined[-1] = joined[-1]._replace(bytes=joined[-1].bytes + region.bytes)
                else:
                    joined.append(region)
            assert len(joined) == 2, "a slice on each node"
            assert not ends or [region.address for region in joined] == ends
            ends = [region.address + region.bytes for region in joined]


def test_experts_elsewhere_take_no_memory_and_the_others_compute_as_ever(
    layer: RandomLayer,
) -> None:
    elsewhere = np.zeros((1, EXPERTS), bool)
    elsewhere[0, [1, 4]] = True
    x = random_activations(40, HIDDEN, torch.bfloat16)
    ids, weights = random_routing(40, EXPERTS, TOP_K)
    ids[torch.from_numpy(elsewhere[0])[ids.long()]] = -1
    with loaded(layer, threads=2) as all_here:
        expected = compute(all_here, x, ids, weights)
        all_bytes = all_here.weight_bytes
    for nodes in (1, 2):
        with HostExperts(
            1, EXPERTS, HIDDEN, INTERMEDIATE, threads=2, simulated_nodes=nodes, elsewhere=elsewhere
        ) as experts:
            assert experts.weight_bytes == all_bytes * (EXPERTS - 2) // EXPERTS
            for number in np.flatnonzero(~elsewhere[0]).tolist():
                experts.load_expert(0, number, *layer.experts[number])
            found = compute(experts, x, ids, weights)
            assert torch.equal(found, expected)
            assert_within(found, layer.reference(x, ids, weights))
            with pytest.raises(EngineError, match=r"slot 0, expert 4 is kept elsewhere"):
                experts.load_expert(0, 4, *layer.experts[4])
            with pytest.raises(EngineError, match=r"expert 4 is not loaded"):
                experts.expert_regions(0, 4)
            ids[0, 0] = 4
            with pytest.raises(EngineError, match=r"token 0: layer slot 0, expert 4 is not loaded"):
                compute(experts, x, ids, weights)
            ids[0, 0] = -1


def test_all_experts_may_be_elsewhere(layer: RandomLayer) -> None:
    elsewhere = np.ones((1, EXPERTS), bool)
    with HostExperts(1, EXPERTS, HIDDEN, INTERMEDIATE, threads=2, elsewhere=elsewhere) as experts:
        assert experts.weight_bytes == 0
        x = random_activations(3, HIDDEN, torch.float32)
        ids, weights = random_routing(3, EXPERTS, TOP_K)
        result = compute(experts, x, torch.full_like(ids, -1), weights)
        assert torch.equal(result, torch.zeros(3, HIDDEN))


def test_a_mask_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected 2 layers of 4 experts, .* \(4, 2\)"):
        HostExperts(2, 4, 64, 64, threads=1, elsewhere=np.zeros((4, 2), bool))


def test_packing_refuses_matrices_of_another_shape(layer: RandomLayer) -> None:
    gate, up, down = layer.experts[0]
    with HostExperts(1, 1, HIDDEN, INTERMEDIATE, threads=1) as experts:
        with pytest.raises(EngineError, match=r"packed: down\.packed: expected torch\.int32"):
            experts.pack_expert(gate, up, up)
        narrow = random_matrix(INTERMEDIATE, HIDDEN - 32, torch.Generator())
        with pytest.raises(EngineError, match=r"gate\.packed"):
            experts.pack_expert(narrow, up, down)


def touched_bytes(begin: int, num_bytes: int) -> int:
    """Of so many bytes of anonymous memory, those in pages that the process has."""
    page_bytes = os.sysconf("SC_PAGESIZE")
    pages = -(-num_bytes // page_bytes)
    vector = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(begin // page_bytes * page_bytes)
    result = libc.mincore(address, ctypes.c_size_t(pages * page_bytes), vector)
    assert result == 0, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in vector) * page_bytes


@pytest.mark.parametrize("huge_pages", [False, True], ids=["4 KB pages", "2 MB pages"])
@pytest.mark.parametrize("elsewhere_is_known", [False, True], ids=["unloaded", "elsewhere"])
def test_an_expert_that_is_not_loaded_here_touches_no_memory(
    huge_pages: bool, elsewhere_is_known: bool
) -> None:
    """With K2's true sizes, 4 of 24 experts here; all others are packed for another place.

    Bound: what is loaded, and where a run of loaded experts begins or ends within a page, the rest
    of that page: three runs with two edges each where the others have their places, one run that
    begins on an edge where they have none.
    """
    layers, experts, hidden, intermediate = 3, 8, 7168, 2048
    here = [(1, 2), (1, 3), (1, 6), (2, 7)]
    elsewhere = np.ones((layers, experts), bool)
    elsewhere[tuple(zip(*here, strict=True))] = False
    gate, up, down = (
        QuantizedLinear(
            torch.ones(rows, columns // 8, dtype=torch.int32),
            torch.ones(rows, columns // 32, dtype=torch.bfloat16),
        )
        for rows, columns in [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    )
    with HostExperts(
        *(layers, experts, hidden, intermediate),
        threads=2,
        huge_pages=huge_pages,
        elsewhere=elsewhere if elsewhere_is_known else None,
    ) as host:
        for slot, expert in np.ndindex(layers, experts):
            if (slot, expert) in here:
                host.load_expert(slot, expert, gate, up, down)
            else:
                host.pack_expert(gate, up, down)
        assert host.expert_bytes == 24_772_608
        assert host.weight_bytes == (4 if elsewhere_is_known else 24) * host.expert_bytes
        place = 0 if elsewhere_is_known else experts + 2
        begin = host.expert_regions(1, 2)[0].address - place * host.expert_bytes
        touched = touched_bytes(begin, host.weight_bytes)
        page_bytes = (2 << 20) if huge_pages else os.sysconf("SC_PAGESIZE")
        edges = 1 if elsewhere_is_known else 6
        assert 4 * host.expert_bytes <= touched <= 4 * host.expert_bytes + edges * page_bytes

"""Experts dealt to NUMA nodes: the same bits and bytes as on one, on nodes that are simulated.

That threads read no weights of another node is proven in native/test_numa.cc.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybridk2.experts.host import HostExperts, reserved_page_bytes

from .expert_weights import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    RandomLayer,
    compute,
    loaded,
    random_activations,
    random_routing,
    runnable_isas,
)


@pytest.fixture(scope="module")
def layer() -> RandomLayer:
    return RandomLayer(EXPERTS, HIDDEN, INTERMEDIATE)


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_bits_do_not_depend_on_the_number_of_numa_nodes(
    layer: RandomLayer, isa: str, dtype: torch.dtype
) -> None:
    # 7 strips of down and 6 of gate and up on up to 8 nodes: uneven, and some nodes have none.
    calls = [
        (random_activations(n, HIDDEN, dtype, seed=n), *random_routing(n, EXPERTS, TOP_K))
        for n in (0, 1, 4, 40, 300)
    ]
    with loaded(layer, isa=isa, threads=2) as experts:
        assert experts.threads_of_node == (2,)
        expected = [compute(experts, *call) for call in calls]
        weight_bytes = experts.weight_bytes
    for nodes, threads in ((2, 2), (3, 3), (3, 7), (6, 6), (8, 8)):
        with loaded(layer, isa=isa, threads=threads, simulated_nodes=nodes) as experts:
            assert len(experts.threads_of_node) == nodes
            assert sum(experts.threads_of_node) == threads
            assert experts.weight_bytes == weight_bytes
            for call, result in zip(calls, expected, strict=True):
                assert torch.equal(compute(experts, *call), result), f"{nodes} nodes"


def test_an_expert_is_whole_when_it_lies_on_several_nodes(layer: RandomLayer) -> None:
    for nodes in (1, 2, 3, 8):
        with loaded(layer, threads=8, simulated_nodes=nodes) as experts:
            for number in range(EXPERTS):
                found = experts.expert_weights(0, number)
                for matrix, expected in zip(found, layer.dense(number), strict=True):
                    assert torch.equal(matrix.double(), expected), f"{nodes} nodes"


def test_weights_take_four_and_a_half_bits_on_any_number_of_nodes() -> None:
    for nodes in (1, 2, 3, 6):
        with HostExperts(60, 3, 7168, 2048, threads=6, simulated_nodes=nodes) as experts:
            assert experts.weight_bytes * 8 == 4.5 * 60 * 3 * 3 * 7168 * 2048


def test_fewer_threads_than_numa_nodes_work_as_on_one_and_say_so(
    layer: RandomLayer, caplog: pytest.LogCaptureFixture
) -> None:
    with loaded(layer, threads=2, simulated_nodes=3) as experts:
        assert experts.threads_of_node == (2,)
    assert "too few threads for one on each of 3 NUMA nodes" in caplog.text


def test_only_cores_that_the_process_may_use_get_threads() -> None:
    program = """
import os
from hybridk2.experts.host import HostExperts, usable_cores
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
with HostExperts(1, 1, 64, 32) as experts:
    print(usable_cores(), experts.threads)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.split() == ["1", "1"], run.stderr


def test_reserved_page_bytes_are_what_the_kernel_says() -> None:
    pages = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages")
    expected = int(pages.read_text()) << 30 if pages.exists() else 0
    assert reserved_page_bytes() == expected

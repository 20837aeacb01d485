"""Placements: files that are whole or refused, and policies against the exhaustive optimum."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from hybridk2.errors import TuningError
from hybridk2.placement import Placement, by_frequency, by_marginal_gain, layer_budgets, uniform

PLACEMENT = Placement("of-a-model", 8, "frequency", ((0, 3, 7), (), (5,)))


def test_a_placement_is_read_as_it_was_written(tmp_path: Path) -> None:
    PLACEMENT.save(tmp_path / "placement.json")
    assert Placement.load(tmp_path / "placement.json") == PLACEMENT
    assert list(tmp_path.iterdir()) == [tmp_path / "placement.json"], "nothing else is left"
    mask = PLACEMENT.mask()
    assert mask.sum() == PLACEMENT.num_resident == 4
    assert Placement.from_mask("of-a-model", "frequency", mask) == PLACEMENT


def test_every_changed_letter_of_a_file_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    PLACEMENT.save(path)
    good = path.read_text()
    for position, letter in enumerate(good.rstrip("\n")):
        path.write_text(good[:position] + ("1" if letter != "1" else "2") + good[position + 1 :])
        with pytest.raises(TuningError, match=str(path)):
            Placement.load(path)


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {"model": "m", "experts": 8, "policy": "p"},
        {"model": "m", "experts": 8, "policy": "p", "resident": [[8]]},
        {"model": "m", "experts": 8, "policy": "p", "resident": [[-1]]},
        {"model": "m", "experts": 8, "policy": "p", "resident": [[1, 1]]},
        {"model": "m", "experts": 8, "policy": "p", "resident": [["1"]]},
        {"model": "m", "experts": True, "policy": "p", "resident": [[]]},
        {"model": "m", "experts": 8, "policy": "p", "resident": [[]], "more": 1},
    ],
)
def test_a_checksum_does_not_make_a_placement(content: object, tmp_path: Path) -> None:
    from hybridk2.placement import FORMAT, VERSION, _checksum

    path = tmp_path / "placement.json"
    document = {"format": FORMAT, "version": VERSION, "sha256": _checksum(content)}
    path.write_text(json.dumps(document | {"placement": content}))
    with pytest.raises(TuningError, match=str(path)):
        Placement.load(path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="nowhere"):
        PLACEMENT.save(tmp_path / "nowhere" / "placement.json")


@pytest.mark.parametrize("budget", [0, 1, 7, 12, 35, 36, 100])
def test_policies_place_as_many_experts_as_the_budget_says(budget: int) -> None:
    counts = np.random.default_rng(0).integers(9, size=(3, 12))
    for mask in (
        uniform(3, 12, budget),
        by_frequency(counts, budget),
        by_marginal_gain(counts, budget),
    ):
        assert mask.shape == counts.shape
        assert mask.sum() == min(budget, 36)
    assert np.ptp(layer_budgets(3, 12, budget)) <= 1


def test_frequency_takes_the_most_picked_of_each_layer_and_marginal_gain_of_all() -> None:
    counts = np.array([[9, 8, 1, 7], [3, 2, 1, 0]])
    assert by_frequency(counts, 4).tolist() == [[True, True, False, False]] * 2
    assert by_marginal_gain(counts, 4).tolist() == [
        [True, True, False, True],
        [True, False, False, False],
    ]


def test_an_expert_that_costs_time_stays_out_whatever_the_budget() -> None:
    assert by_marginal_gain(np.array([[3.0, -1.0], [0.0, -2.0]]), 4).tolist() == [
        [True, False],
        [True, False],
    ]


@pytest.mark.parametrize("seed", range(20))
def test_marginal_gain_has_as_many_hits_as_the_best_of_all_placements(seed: int) -> None:
    random = np.random.default_rng(seed)
    counts = random.integers(20, size=(3, 4))
    budget = int(random.integers(1, 12))
    best = max(
        counts.ravel()[list(chosen)].sum()
        for chosen in itertools.combinations(range(counts.size), budget)
    )
    assert counts[by_marginal_gain(counts, budget)].sum() == best

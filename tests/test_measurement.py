"""What a process takes beside its weights: the same whichever small model runs in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridk2.measurement.process import process_bytes, resident_bytes
from hybridk2.planner import ModelSizes
from hybridk2.synthesis import synthesize, synthetic_config


def test_weights_and_process_are_the_resident_set_within_2_percent(tmp_path: Path) -> None:
    """Of a process a third of which is weights. The model's own buffers, 4 MB, are 1%; the
    rest allows for pages of libraries that one of two runs happened to touch."""
    config = synthetic_config("small", layers=3, experts=48)
    synthesize(tmp_path / "small", config, seed=0)
    planned_bytes = ModelSizes.from_config(config).host_weight_bytes + process_bytes()
    assert planned_bytes == pytest.approx(resident_bytes(str(tmp_path / "small")), rel=0.02)

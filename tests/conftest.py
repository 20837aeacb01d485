"""Fixtures that more than one test file needs, and how Triton runs in the whole test process."""

import os
from pathlib import Path

import pytest
import torch

# Read when Triton is imported, by whomever: see triton_kernels.py.
os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def one_dense_thread() -> None:
    """Matrices of tests are tiny: more threads only wait for each other where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Published test vectors and the real vocabulary, which lie beside the project."""
    if not (SHARED / "k2" / "vectors").is_dir():
        pytest.skip(f"test vectors are not here: {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in K2's format, under 1 MB: 3 layers, 8 experts, top-2. Read only."""
    from hybridk2.synthesis import synthesize, synthetic_config

    folder = tmp_path_factory.mktemp("checkpoints") / "small"
    synthesize(folder, synthetic_config("tiny"), seed=0)
    return folder

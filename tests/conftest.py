"""Fixtures that more than one test file needs."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Published test vectors and the real vocabulary, which lie beside the project."""
    if not (SHARED / "k2" / "vectors").is_dir():
        pytest.skip(f"test vectors are not here: {SHARED}")
    return SHARED

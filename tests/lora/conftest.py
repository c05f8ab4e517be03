from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of the reference models; tests only read it."""
    return Path(__file__).parents[1] / "golden" / "models"

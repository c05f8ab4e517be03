from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def models() -> Path:
    """The reference models; read only."""
    return Path(__file__).parents[1] / "golden" / "models"

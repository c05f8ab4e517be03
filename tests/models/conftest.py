from pathlib import Path

import pytest

MODELS = Path(__file__).parents[1] / "golden" / "models"


@pytest.fixture(scope="session")
def models() -> Path:
    """The reference models; read only."""
    return MODELS

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest

from qlora_jax.config import QuantConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.models.decoder import Decoder

MODELS = Path(__file__).parents[1] / "golden" / "models"


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of the reference models; tests only read it."""
    return MODELS


@pytest.fixture(scope="session")
def open_model() -> Callable[..., Decoder]:
    """Loads a reference model by name in float32; each call returns a new model."""

    def read(name: str, quant: QuantConfig | None = None) -> Decoder:
        return load_model(open_folder(MODELS / name), quant=quant, dtype=jnp.float32)

    return read

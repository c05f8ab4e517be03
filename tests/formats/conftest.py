import shutil
from pathlib import Path

import pytest

from qlora_jax.errors import UserError
from qlora_jax.formats.fetch import fetch

MODELS = Path(__file__).parents[1] / "golden" / "models"


@pytest.fixture
def models() -> Path:
    """The reference models; read only."""
    return MODELS


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A copy of the reference llama that a test may damage."""
    folder = tmp_path / "llama"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(MODELS / "llama" / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def builtin_gguf() -> Path:
    """The built-in model's file, from the cache or downloaded."""
    try:
        return fetch("smollm2-135m-instruct")
    except UserError as e:
        pytest.skip(str(e))

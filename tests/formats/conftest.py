import shutil
from pathlib import Path

import pytest
from small_tokenizers import builtin_gguf as builtin_gguf

MODELS = Path(__file__).parents[1] / "golden" / "models"


@pytest.fixture
def models() -> Path:
    """Folder of the reference models; read only."""
    return MODELS


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A copy of the reference llama that a test may damage."""
    folder = tmp_path / "llama"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(MODELS / "llama" / name, folder / name)
    return folder

"""Compares with installed bitsandbytes, transformers and PEFT on random weights (make parity).

The models are tiny. Everything runs in float32 on the CPU without network access.
"""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # Collecting a module of this folder imports torch; `make test` must not import torch.
    return True if "not parity" in config.option.markexpr else None

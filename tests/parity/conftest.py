"""Live comparisons with bitsandbytes, transformers and PEFT, on random weights (make parity).

Models are tiny and everything runs in float32 on the CPU; no network, a few minutes on 2 cores.
"""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # Collecting a module here imports torch where it is installed, which `make test` must not.
    return True if "not parity" in config.option.markexpr else None

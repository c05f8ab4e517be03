"""Models of other people's packages, quantized, adapted and trained (make test-models).

They are built from random numbers and tiny; no network, some minutes on 2 cores.
"""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # Collecting a module here looks for packages that no other test may lean on.
    asked = config.option.markexpr
    return None if "other_models" in asked and "not other_models" not in asked else True

"""Quantizes, adapts and trains models of third-party packages (make test-models).

The models are tiny and have random weights. The tests need no network and take some minutes on
2 cores.
"""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # Collecting these modules looks for packages that no other test may depend on.
    asked = config.option.markexpr
    return None if "other_models" in asked and "not other_models" not in asked else True

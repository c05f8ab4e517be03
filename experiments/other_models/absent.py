"""Stand-ins for large packages that model packages import but do not need for their models."""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

NAMES = ("tensorflow", "tensorflow_datasets", "tensorboard")
"""kauldron imports these packages for training loops; gemma uses its annotations and modules."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in NAMES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return mock.MagicMock(__path__=[], __spec__=spec, __name__=spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """Replaces packages of `NAMES` that are not installed by stand-ins, for imports in the body."""
    finder = _Finder()
    sys.meta_path.append(finder)  # last, so that installed packages are found first
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            if getattr(getattr(module, "__spec__", None), "loader", None) is finder:
                del sys.modules[name]

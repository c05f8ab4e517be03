"""Stand-ins for large packages that others import beside their models, and do not need for them."""

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
"""kauldron, whose annotations and modules gemma uses, imports them for training loops."""


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
    """Lets packages be imported whose imports of `NAMES` would fail; those installed are used."""
    finder = _Finder()
    sys.meta_path.append(finder)  # last: what is installed is found before
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            if getattr(getattr(module, "__spec__", None), "loader", None) is finder:
                del sys.modules[name]

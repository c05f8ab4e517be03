"""Trains: the loss, the step, the optimizer, the loop, checkpoints, the report.

`qlora_jax.train(config)` is `qlora_jax.library.train`: Python makes a package that is imported an
attribute of the package above it, where a function of the same name would be lost.
"""

import importlib
import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # by its name, since the library imports this package
        return importlib.import_module("qlora_jax.library").train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

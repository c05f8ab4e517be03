"""Training: the loss, the step, the optimizer, the loop, checkpoints and the report.

The package itself is callable: `qlora_jax.train(config)` calls `qlora_jax.library.train`. When
Python imports a subpackage, it sets an attribute on the parent package, and that attribute would
replace a function named `train`.
"""

import importlib
import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # imported at the call, because the library imports this package
        return importlib.import_module("qlora_jax.library").train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

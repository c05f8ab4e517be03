"""A built-in data set: the docstrings of some of this package's dependencies."""

import functools
import importlib.util
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from qlora_jax.data.builtin import python_docs
from qlora_jax.data.records import Record

PACKAGES = (
    "datasets",
    "flax",
    "huggingface_hub",
    "jax",
    "matplotlib",
    "numpy",
    "orbax",
    "pyarrow",
    "pydantic",
    "rich",
)


def records(format: str = "auto", dropped: Counter[str] | None = None) -> list[Record]:
    """Returns records like `python_docs.records`, of the packages `PACKAGES`, without import."""
    if format == "text":
        return python_docs.texts(documented(), "package-docs")
    dropped = Counter() if dropped is None else dropped
    return python_docs.questions(documented(), "package-docs", format, dropped)


@functools.cache
def documented() -> Mapping[str, str]:
    """Returns the cleaned docstring for each dotted public name, sorted by name."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        for folder in _folders(package):
            for path, module in python_docs.modules(folder, package):
                found.update(python_docs.parse(path, module))
    return MappingProxyType(dict(sorted(found.items())))


def _folders(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [Path(f) for f in (spec.submodule_search_locations or ())] if spec else []

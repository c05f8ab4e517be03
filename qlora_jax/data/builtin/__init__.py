"""The built-in data sets, which need no data file and no network."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from qlora_jax.data.builtin import package_docs, python_docs, python_source
from qlora_jax.data.records import Record

SOURCES: Mapping[str, Callable[[str, Counter[str]], list[Record]]] = {
    "python-docs": python_docs.records,
    "python-source": python_source.records,
    "package-docs": package_docs.records,
}
"""Maps a name to a function (format, counters of skipped records) -> records."""


def is_builtin(source: str) -> bool:
    """Returns whether `source` names built-in data sets: one, or several joined by `+`."""
    return all(name in SOURCES for name in source.split("+"))


def records(source: str, format: str, dropped: Counter[str]) -> Iterator[Record]:
    """Yields the records of every data set that `source` names, one data set after the other.

    Raises:
      UserError: a data set has no records in this format.
    """
    for name in source.split("+"):
        yield from SOURCES[name](format, dropped)

"""From the `data` section of a config to typed records, trained on and held out."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from qlora_jax.config import DataConfig
from qlora_jax.data import builtin, files, hub
from qlora_jax.data.builtin.passages import passages
from qlora_jax.data.holdout import hold_out
from qlora_jax.data.records import Record, Text, parser
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of a run.

    Attributes:
      train: examples to train on, in the source's order.
      held_out: examples to evaluate on; empty when none were asked for.
      dropped: reason to number of records left out.
    """

    train: list[Record]
    held_out: list[Record]
    dropped: dict[str, int]


def read(config: DataConfig) -> Split:
    """Reads the source, its first `max_examples` records, and sets the held-out part aside.

    Empty records are left out and do not count. A held-out source or split of its own is read in
    the same way and taken whole.

    A .txt file is one document: it is cut at paragraphs into passages that only serve to hold
    some of it out, and an end of text is put after the last one alone.

    Raises:
      UserError: the source is missing, malformed or empty, or lacks the fields; file and line or
        row are named.
    """
    dropped: Counter[str] = Counter()
    records = _read(config, config.source, config.split, dropped)
    if config.eval_source is None and config.eval_split is None:
        train, held_out = hold_out(records, config.eval_fraction)
    else:
        if config.eval_source is None and _is_single(config.source):
            raise UserError(
                f"data.eval_split: {config.source} has no splits; "
                "give data.eval_source, or data.eval_fraction"
            )
        source = config.eval_source or config.source
        train, held_out = records, _read(config, source, config.eval_split or config.split, dropped)
    return Split(train, held_out, dict(dropped))


def _read(config: DataConfig, source: str, split: str, dropped: Counter[str]) -> list[Record]:
    if config.name is not None and source == config.source and _is_single(source):
        raise UserError(f"data.name: {source} has no configurations; remove it")

    def kept() -> Iterator[Record]:
        for record in _records(config, source, split, dropped):
            if record.key.strip():
                yield record
            else:
                dropped["empty"] += 1

    records = list(islice(kept(), config.max_examples or None))
    if not records:
        raise UserError(f"{source}: no examples in it")
    return records


def _records(
    config: DataConfig, source: str, split: str, dropped: Counter[str]
) -> Iterator[Record]:
    if builtin.is_builtin(source):
        return builtin.records(source, config.format, dropped)
    path = Path(source).expanduser()
    if path.suffix == ".txt" and (paths.is_file(path) or _is_single(source)):
        return _document(path, config)
    if _is_single(source):
        rows = files.read_rows(path)
    else:
        # Another data set has other configurations.
        name = config.name if source == config.source else None
        rows = hub.read_rows(str(path) if paths.is_dir(path) else source, name, split)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{source}: no examples in it")
    parse = parser(list(first[0]), config.format, source)
    return (parse(row, where) for row, where in chain([first], rows))


def _document(path: Path, config: DataConfig) -> Iterator[Record]:
    if config.format not in ("auto", "text"):
        raise UserError(f"data.format {config.format}: {path} is plain text; use text or auto")
    text = files.read_text(path)
    # Passages a few rows long keep nearly all context; a short text still gives about twenty.
    size = max(200, min(16 * config.sequence_length, len(text) // 20))
    pieces = list(passages(text, size))
    for number, piece in enumerate(pieces, 1):
        yield Text(text=piece, ends=number == len(pieces), where=f"{path} passage {number}")


def _is_single(source: str) -> bool:
    """Whether the source is a built-in one or a file, there or not, and so has no splits."""
    path = Path(source).expanduser()
    if builtin.is_builtin(source) or paths.is_file(path):
        return True
    named_like_a_file = path.suffix in (*files.READERS, ".txt")
    return not paths.is_dir(path) and (
        named_like_a_file or source.startswith((".", "/", "~")) or source.count("/") > 1
    )

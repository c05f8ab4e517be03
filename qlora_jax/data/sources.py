"""Reads the training and held-out records that the `data` section of a config names."""

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from qlora_jax.config import DataConfig
from qlora_jax.data import builtin, files, hub
from qlora_jax.data.bad_records import BadRecords
from qlora_jax.data.builtin.passages import passages
from qlora_jax.data.findings import Findings
from qlora_jax.data.holdout import hold_out
from qlora_jax.data.records import Record, Text
from qlora_jax.data.rows import parse
from qlora_jax.data.values import Fields, Row, without_nulls
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataSplit:
    """The records of a run.

    Attributes:
      train: training records, in the source's order.
      held_out: maps the name of a held-out set to its records, in the config's order. If the
        config gives no names, the single set has the name "". Empty if the config has no
        held-out set.
      found: counts and warnings: skipped records, unread fields, empty answers.
    """

    train: list[Record]
    held_out: dict[str, list[Record]]
    found: Findings


def read(config: DataConfig) -> DataSplit:
    """Reads the first `max_examples` records of the source, and splits off the held-out records.

    Several sources are read one after the other. Empty records are skipped and do not count
    towards `max_examples`. The same is true for bad records, unless `on_bad_record` is `error`. If
    the config names a held-out source or split, all of its records are held out; they are read in
    the same way.

    A .txt file is one document. It is cut at paragraphs into passages, so that some passages can
    be held out. Only the last passage gets an end-of-text token.

    Raises:
      UserError: the source is missing, malformed or empty, or none of its records can be used;
        the message names the file and the line or row.
    """
    found = Findings(BadRecords(config.on_bad_record))
    records = _read(config, config.source, config.split, found)
    if config.eval_source is None and config.eval_split is None:
        train, held_out = hold_out(records, config.eval_fraction)
        return DataSplit(train, {"": held_out} if held_out else {}, found)
    single = next(filter(_is_single, listed(config.source)), None)
    if config.eval_source is None and single is not None:
        raise UserError(
            f"data.eval_split: {single} has no splits; give data.eval_source, or data.eval_fraction"
        )
    split = config.eval_split or config.split
    sets = {
        name: _read(config, source, split, found) for name, source in eval_sources(config).items()
    }
    return DataSplit(records, sets, found)


def eval_sources(config: DataConfig) -> dict[str, str | list[str]]:
    """Returns held-out set names with their sources; a set without a name has the name ""."""
    if isinstance(config.eval_source, dict):
        return dict(config.eval_source)
    return {"": config.eval_source or config.source}


def listed(source: str | list[str]) -> list[str]:
    """Returns the sources as a list."""
    return [source] if isinstance(source, str) else source


def named(source: str | list[str]) -> str:
    """Returns the sources as one string, for messages and reports."""
    return ", ".join(listed(source))


def _read(config: DataConfig, source: str | list[str], split: str, found: Findings) -> list[Record]:
    """Reads the first `max_examples` records of one source or several.

    Args:
      config: settings of the data. Its `name` applies only to a hub data set of `config.source`.
      source: the source or sources.
      split: split to read from hub data sets.
      found: counters of skipped records; updated.

    Raises:
      UserError: the source has no records, or none of its records can be used.
    """
    name = _configuration(config) if source == config.source else None
    left_out = found.bad.count

    def kept() -> Iterator[Record]:
        for one in listed(source):
            for record in _records(config, one, name, split, found):
                found.total += 1
                if record.key.strip():
                    found.look_at(record)
                    yield record
                else:
                    found.dropped["empty"] += 1

    records = list(islice(kept(), config.max_examples or None))
    left_out = found.bad.count - left_out
    found.total += left_out
    if not records and left_out:
        raise UserError(f"{named(source)}: none of its records can be used: {found.bad.reasons()}")
    if not records:
        raise UserError(f"{named(source)}: no examples in it; give one that holds records")
    return records


def _configuration(config: DataConfig) -> str | None:
    """Returns the configuration `config.name` of the only hub data set among the sources."""
    if config.name is None:
        return None
    hubs = [source for source in listed(config.source) if not _is_single(source)]
    if not hubs:
        raise UserError(f"data.name: {named(config.source)} has no configurations; remove it")
    if len(hubs) > 1:
        raise UserError(
            f"data.name {config.name}: several hub data sets ({', '.join(hubs)}) could use it; "
            "give only one hub data set, and the others as files"
        )
    return config.name


def _records(
    config: DataConfig, source: str, name: str | None, split: str, found: Findings
) -> Iterator[Record]:
    if builtin.is_builtin(source):
        return builtin.records(source, config.format, found.dropped)
    path = Path(source).expanduser()
    parts = source.split("+")
    if len(parts) > 1 and all(parts) and not paths.exists(path):
        raise UserError(
            f"{source}: no such file; give several sources as a list: [{', '.join(parts)}]"
        )
    if files.ending(path) == files.TEXT and (paths.is_file(path) or _is_single(source)):
        return _document(path, config)
    return _parsed(config, _rows(source, path, name, split, found), found)


def _rows(
    source: str, path: Path, name: str | None, split: str, found: Findings
) -> Iterator[tuple[Row, str]]:
    """Yields rows of a file or hub data set, without the nulls that a table adds."""
    if not _is_single(source):
        known = str(path) if paths.is_dir(path) else source
        rows = hub.read_rows(known, name, split, found.warnings.append)
    else:
        rows = files.read_rows(path, found.bad)
        if files.ending(path) != files.PARQUET:
            return rows
    return ((without_nulls(row), where) for row, where in rows)


def _parsed(
    config: DataConfig, rows: Iterator[tuple[Row, str]], found: Findings
) -> Iterator[Record]:
    """Yields the records of rows; skips bad records, and counts fields that were not read."""
    for row, where in rows:
        fields, record = Fields(row, where), None
        with found.bad.guard(where):
            record = parse(fields, config.format)
        if record is not None:
            found.unread.update(fields.unread())
            yield record


def _document(path: Path, config: DataConfig) -> Iterator[Record]:
    if config.format not in ("auto", "text"):
        raise UserError(f"data.format {config.format}: {path} is plain text; use text or auto")
    text = files.read_text(path)
    # A passage of several rows keeps nearly all context. A short text gives about 20 passages.
    size = max(200, min(16 * config.sequence_length, len(text) // 20))
    pieces = list(passages(text, size))
    for number, piece in enumerate(pieces, 1):
        yield Text(text=piece, ends=number == len(pieces), where=f"{path} passage {number}")


def _is_single(source: str) -> bool:
    """Returns whether the source has no splits: a built-in one, or a file, existing or not."""
    path = Path(source).expanduser()
    if builtin.is_builtin(source) or paths.is_file(path):
        return True
    return not paths.is_dir(path) and (
        files.ending(path) != "" or source.startswith((".", "/", "~")) or source.count("/") > 1
    )

"""Skips single bad records of a data set, and counts them by reason."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Literal

from qlora_jax.runtime.errors import UserError, first_line
from qlora_jax.runtime.streams import printable

Action = Literal["drop", "error"]
SHOWN = 5
"""Maximum number of reasons that a warning lists."""
MOST = 1000
"""Maximum number of different reasons that are counted separately; it limits the memory."""
OTHER = ""
DIFFERS = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")
"""Matches values and numbers; two reasons that differ only in these count as one reason."""


@dataclasses.dataclass
class Reason:
    """One reason for skipping records.

    Attributes:
      text: error message of the first skipped record, without the record's place.
      first: place of the first skipped record.
      count: number of records that were skipped for this reason.
    """

    text: str
    first: str
    count: int = 0


class BadRecords:
    """The counts of a run's records that cannot be used, by reason.

    A run has one such object. The file readers, the row parser and the encoder handle each record
    inside `guard`. At the end, the caller prints `line`:

        bad = BadRecords(config.on_bad_record)
        for record in records:
            with bad.guard(record.where):
                examples.append(encoded(record))  # may raise UserError
        if bad.count:
            warn(bad.line(len(records)))

    Attributes:
      action: `drop` skips bad records; `error` stops at the first bad record.
      count: number of skipped records.
    """

    def __init__(self, action: Action) -> None:
        self.action = action
        self.count = 0
        self._reasons: dict[str, Reason] = {}

    @contextlib.contextmanager
    def guard(self, where: str) -> Iterator[None]:
        """Counts the record as bad if the `with` block raises UserError.

        With `action` `drop`, the UserError ends the block and is not raised again. The block has
        then produced no record. Other exceptions are raised as usual.

        Args:
          where: the record's place, such as `data.jsonl:12`. The error message gets this prefix
            if it does not begin with it.

        Raises:
          UserError: `action` is `error` and the record is bad.
        """
        try:
            yield
        except UserError as e:
            reason = first_line(e).removeprefix(where).lstrip(": ")
            if self.action == "error":
                between = "" if str(e).startswith(where) else f"{where}: "
                raise UserError(f"{between}{e}") from None
            self._add(reason, where)

    def reasons(self) -> str:
        """Returns the reasons for skipping records in one line, the most frequent reason first."""
        ranked = sorted(self._reasons.values(), key=lambda reason: -reason.count)
        parts = [f"{r.count:,} {printable(r.text)} (first {r.first})" for r in ranked[:SHOWN]]
        if rest := sum(reason.count for reason in ranked[SHOWN:]):
            parts.append(f"{rest:,} for other reasons")
        return "; ".join(parts)

    def line(self, total: int) -> str:
        """Returns the warning about the skipped records, in one line.

        Args:
          total: number of records that were read, including the bad records.
        """
        return (
            f"warning: {self.count:,} of {total:,} records left out: {self.reasons()}; correct "
            "them, or set data.on_bad_record: error to stop at the first"
        )

    def _add(self, text: str, where: str) -> None:
        self.count += 1
        kind = DIFFERS.sub("*", text)
        if len(self._reasons) >= MOST and kind not in self._reasons:
            kind = OTHER
        self._reasons.setdefault(kind, Reason(text, where)).count += 1

"""Leaves single bad records out of a data set, and counts them by reason."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Literal

from qlora_jax.runtime.errors import UserError, first_line
from qlora_jax.runtime.streams import printable

Action = Literal["drop", "error"]
SHOWN = 5
"""Reasons that a line lists."""
MOST = 1000
"""Reasons that are told apart, so that memory is bounded."""
OTHER = ""
DIFFERS = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")
"""Parts of a reason in which two records may differ: values and numbers."""


@dataclasses.dataclass
class Reason:
    """Why records were left out.

    Attributes:
      text: the error of the first of them, without its place.
      first: the place of the first of them.
      count: number of records.
    """

    text: str
    first: str
    count: int = 0


class BadRecords:
    """The records of a run that cannot be used.

    One object serves a whole run: the readers of files, the parser of rows and the encoder put
    each record under `guard`, and who prints asks for `line` at the end:

        bad = BadRecords(config.on_bad_record)
        for record in records:
            with bad.guard(record.where):
                examples.append(encoded(record))  # may raise UserError
        if bad.count:
            warn(bad.line(len(records)))

    Attributes:
      action: `drop` leaves a bad record out; `error` stops at the first.
      count: number of records left out.
    """

    def __init__(self, action: Action) -> None:
        self.action = action
        self.count = 0
        self._reasons: dict[str, Reason] = {}

    @contextlib.contextmanager
    def guard(self, where: str) -> Iterator[None]:
        """Leaves out the one record that is made inside.

        A UserError that is raised inside ends the block; the record is counted, and what the block
        would have made is not there. Other exceptions pass.

        Args:
          where: the record's place, such as `data.jsonl:12`; put in front of an error's message
            unless it is there.

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
        """Lists why records were left out, the most frequent reason first, in one line."""
        ranked = sorted(self._reasons.values(), key=lambda reason: -reason.count)
        parts = [f"{r.count:,} {printable(r.text)} (first {r.first})" for r in ranked[:SHOWN]]
        if rest := sum(reason.count for reason in ranked[SHOWN:]):
            parts.append(f"{rest:,} for other reasons")
        return "; ".join(parts)

    def line(self, total: int) -> str:
        """Returns the warning, in one line.

        Args:
          total: number of records that were looked at, bad ones included.
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

"""Collects warnings about a data set: skipped records, unread fields and empty answers."""

import dataclasses
from collections import Counter
from itertools import groupby

from qlora_jax.data.bad_records import BadRecords
from qlora_jax.data.records import Chat, Prompt, Record
from qlora_jax.runtime.streams import printable

NAMED = 20
"""Maximum number of fields that the line about unread fields names."""


@dataclasses.dataclass
class Findings:
    """The warnings and counts about the records of a run that the user should see.

    Attributes:
      bad: counts of the records that cannot be used.
      total: number of records that were read, including the bad records.
      dropped: maps a reason to the number of records that were skipped for it. It holds the
        reasons other than errors, such as empty records.
      unread: maps a field to the number of records in which the field has a value and was not
        read.
      empty_answers: number of records with an empty answer.
      first_empty: place of the first record with an empty answer.
      warnings: further warnings, one line each.
    """

    bad: BadRecords
    total: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    unread: Counter[str] = dataclasses.field(default_factory=Counter)
    empty_answers: int = 0
    first_empty: str = ""
    warnings: list[str] = dataclasses.field(default_factory=list)

    def look_at(self, record: Record) -> None:
        """Counts the record if it has an empty answer."""
        if has_empty_answer(record):
            self.first_empty = self.first_empty or record.where
            self.empty_answers += 1

    def lines(self) -> list[str]:
        """Returns the warnings for the user, one line each."""
        lines = list(self.warnings)
        if self.bad.count:
            lines.append(self.bad.line(self.total))
        if self.empty_answers:
            lines.append(
                f"warning: {self.empty_answers:,} of {self.total:,} records have an empty answer, "
                f"which trains the end of the turn alone (first {self.first_empty}); remove them "
                "unless that is meant"
            )
        if self.unread:
            lines.append(f"not read: {_counted(self.unread)}")
        return lines


def has_empty_answer(record: Record) -> bool:
    """Returns whether an answer that carries loss has neither text nor a tool call."""
    if isinstance(record, Prompt):
        return not record.completion.strip()
    if not isinstance(record, Chat):
        return False
    return any(
        message["role"] == "assistant"
        and turn not in record.without_loss
        and not (message["content"] or "").strip()
        and not message.get("tool_calls")
        for turn, message in enumerate(record.messages)
        if turn
    )


def _counted(counts: Counter[str]) -> str:
    """Lists the names with their counts; names with the same count share one entry."""
    ranked = counts.most_common(NAMED)
    parts = []
    for count, names in groupby(ranked, key=lambda item: item[1]):
        shown = ", ".join(printable(name) for name, _ in names)
        parts.append(f"{shown} ({count:,} record{'s' if count > 1 else ''})")
    rest = len(counts) - len(ranked)
    return ", ".join(parts) + (f" and {rest:,} other fields" if rest else "")

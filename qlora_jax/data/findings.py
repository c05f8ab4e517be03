"""Collects warnings about a data set: records left out, fields not read, empty answers."""

import dataclasses
from collections import Counter
from itertools import groupby

from qlora_jax.data.bad_records import BadRecords
from qlora_jax.data.records import Chat, Prompt, Record
from qlora_jax.runtime.streams import printable

NAMED = 20
"""Fields that the line about unread ones names."""


@dataclasses.dataclass
class Findings:
    """Counts what the user should know of the records of a run.

    Attributes:
      bad: records that cannot be used.
      total: records looked at, bad ones included.
      dropped: reason to number of other records left out.
      unread: field to number of records in which it holds something and was not read.
      empty_answers: number of records with an answer that is empty.
      first_empty: place of the first of these.
      warnings: further lines.
    """

    bad: BadRecords
    total: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    unread: Counter[str] = dataclasses.field(default_factory=Counter)
    empty_answers: int = 0
    first_empty: str = ""
    warnings: list[str] = dataclasses.field(default_factory=list)

    def look_at(self, record: Record) -> None:
        """Counts a record whose answer is empty."""
        if has_empty_answer(record):
            self.first_empty = self.first_empty or record.where
            self.empty_answers += 1

    def lines(self) -> list[str]:
        """Returns what the user is told, a line each."""
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
    """Whether an answer that carries loss has neither text nor a call of a tool."""
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
    """Names with their counts; names that occur equally often share one."""
    ranked = counts.most_common(NAMED)
    parts = []
    for count, names in groupby(ranked, key=lambda item: item[1]):
        shown = ", ".join(printable(name) for name, _ in names)
        parts.append(f"{shown} ({count:,} record{'s' if count > 1 else ''})")
    rest = len(counts) - len(ranked)
    return ", ".join(parts) + (f" and {rest:,} other fields" if rest else "")

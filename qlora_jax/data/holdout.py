"""Splits records into a training set and a held-out set, by a hash of their text."""

import hashlib
from collections.abc import Sequence

from qlora_jax.data.records import Chat, Record


def hold_out(records: Sequence[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """Splits records into (train, held out).

    A hash of the record's text decides on which side the record is. The hash ignores differences
    in white space. The record's position, the seed and the other records have no influence.
    Therefore records with the same text stay on one side, and adding records moves no other
    record. With two or more different texts, neither side is empty: the text with the lowest hash
    is held out, and the text with the highest hash is trained on.
    """
    if not fraction:
        return list(records), []
    places = [_place(r) for r in records]
    low, high = min(places, default=0), max(places, default=0)
    held = [p != high and (p < fraction * 2**64 or p == low) for p in places]
    pairs = list(zip(records, held))
    return [r for r, h in pairs if not h], [r for r, h in pairs if h]


def _place(record: Record) -> int:
    # `spoken` ignores the keys and variables that only the template reads. Conversations that
    # differ only in these stay on one side.
    said = record.spoken if isinstance(record, Chat) else record.key
    text = " ".join(said.split())
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")

"""Sets examples aside by their text."""

import hashlib
from collections.abc import Sequence

from qlora_jax.data.records import Chat, Record


def hold_out(records: Sequence[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """Splits records into (train, held out).

    Which side a record is on follows from a hash of its text alone, white space aside: not from
    its position, a seed or the other records. So records with the same text stay together, and
    adding records moves none. With two or more texts neither side is empty: the text with the
    lowest hash is held out and the one with the highest is trained on.
    """
    if not fraction:
        return list(records), []
    places = [_place(r) for r in records]
    low, high = min(places, default=0), max(places, default=0)
    held = [p != high and (p < fraction * 2**64 or p == low) for p in places]
    pairs = list(zip(records, held))
    return [r for r, h in pairs if not h], [r for r, h in pairs if h]


def _place(record: Record) -> int:
    # Conversations that say the same, and differ in what only the template reads, stay together.
    said = record.spoken if isinstance(record, Chat) else record.key
    text = " ".join(said.split())
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")

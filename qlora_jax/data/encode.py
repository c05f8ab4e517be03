"""Tokenizes records, and marks the token ids that carry loss."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.progress import Progress

from qlora_jax.config import DataConfig
from qlora_jax.data.bad_records import BadRecords
from qlora_jax.data.layouts import RecordText, lay_out
from qlora_jax.data.records import Record
from qlora_jax.data.tokens import Tokens, mark, split_at_answers
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.chat import Span
from qlora_jax.text.tokenizer import Tokenizer

BATCH = 256
LONG = 20_000
"""Minimum number of records for which a progress bar is shown."""
MERGED = (
    "answers share their first token with the end of the prompt, and generation cannot produce "
    "such a token; move the space from the end of the prompt to the start of the answer"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One tokenized example of n >= 2 ids.

    Attributes:
      ids: token ids, i32[n].
      target: bool[n], True for the ids that carry loss; the first one is always False.
    """

    ids: np.ndarray
    target: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeStats:
    """The counts of one call of `encode`.

    Attributes:
      examples: number of examples; a long text gives several.
      tokens: number of ids in all examples.
      target_tokens: number of ids that carry loss.
      truncated: number of examples that were cut to `sequence_length + 1` ids.
      dropped: number of examples that were skipped because they have no target after truncation.
      notes: maps a warning text to the number of answers or conversations that it is about. The
        full warning is the number, then the text.
    """

    examples: int
    tokens: int
    target_tokens: int
    truncated: int
    dropped: int
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)


def encode(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    config: DataConfig,
    bad: BadRecords | None = None,
) -> tuple[list[Example], EncodeStats]:
    """Tokenizes records and marks the targets.

    Targets are the tokens in these character spans:

    - conversation: each turn of the assistant, with the token that ends the turn;
    - prompt/completion pair: the completion, with an end-of-text token;
    - text: the whole text.

    With `loss_on: all`, every id except the first is a target.

    An answer starts with a new token: no token holds the end of the prompt and the start of the
    answer, unless the tokenizer makes this impossible. Some chat templates write the text before
    an answer differently if more turns follow. Such an answer becomes a separate example.

    An example has at most `sequence_length + 1` ids. A longer conversation or pair is cut. A longer
    plain text becomes several examples. Each starts with the last id of the previous example, so
    that every id of the text except the first is a target exactly once.

    Args:
      records: records in order.
      tokenizer: tokenizer of the model.
      config: settings of the data.
      bad: skips and counts records that cannot be rendered or encoded; None: the first such
        record raises.

    Raises:
      UserError: a conversation cannot be rendered, a text cannot be encoded, or an example has no
        target after truncation and `on_no_target` is `error`; the message names the record's
        place.
    """
    examples: list[Example] = []
    truncated = dropped = 0
    notes: Counter[str] = Counter()
    bad = bad or BadRecords("error")
    console = Console(stderr=True)
    hidden = len(records) < LONG or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("tokenizing", total=len(records))
        for record, layout, wholes in _wholes(records, tokenizer, config, bad, notes):
            progress.advance(task)
            for whole in wholes:
                truncated += not layout.chunked and len(whole.ids) > config.sequence_length + 1
                for example in _fit(whole, config.sequence_length + 1, layout.chunked):
                    if example.target.any():
                        examples.append(example)
                    elif config.on_no_target == "error":
                        raise UserError(
                            f"{record.where}: no target in its first {config.sequence_length} "
                            "tokens; raise data.sequence_length, or set data.on_no_target: drop"
                        )
                    else:
                        dropped += 1
    return examples, EncodeStats(
        examples=len(examples),
        tokens=sum(len(e.ids) for e in examples),
        target_tokens=sum(int(e.target.sum()) for e in examples),
        truncated=truncated,
        dropped=dropped,
        notes=notes,
    )


def _wholes(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    config: DataConfig,
    bad: BadRecords,
    notes: Counter[str],
) -> Iterator[tuple[Record, RecordText, list[Example]]]:
    """Yields each record, its layout, and its examples before truncation.

    A record gives one example; some conversations give several.

    Args:
      records: records in order.
      tokenizer: tokenizer of the model.
      config: settings of the data.
      bad: skips and counts records that cannot be used.
      notes: counters of the warnings; updated.
    """
    for start in range(0, len(records), BATCH):
        laid: list[tuple[Record, RecordText]] = []
        for record in records[start : start + BATCH]:
            with bad.guard(record.where):
                laid.append((record, lay_out(record, tokenizer, config)))
        for record, layout, tokens in _tokenized(laid, tokenizer, bad):
            wholes: list[Example] = []
            with bad.guard(record.where):
                wholes = _examples(layout, tokens, tokenizer, config, notes)
            yield record, layout, wholes


def _tokenized(
    laid: Sequence[tuple[Record, RecordText]], tokenizer: Tokenizer, bad: BadRecords
) -> Iterator[tuple[Record, RecordText, Tokens]]:
    """Yields records with layouts and tokens; skips records whose text cannot be encoded."""
    try:
        encoded = tokenizer.encode_batch([layout.text for _, layout in laid])
    except UserError:  # at least one text is bad: encode one by one to find it
        for record, layout in laid:
            with bad.guard(record.where):
                encoded = [tokenizer.encode_with_offsets(layout.text)]
                yield record, layout, Tokens(*encoded[0])
        return
    for (record, layout), tokens in zip(laid, encoded):
        yield record, layout, Tokens(*tokens)


def _examples(
    layout: RecordText,
    tokens: Tokens,
    tokenizer: Tokenizer,
    config: DataConfig,
    notes: Counter[str],
) -> list[Example]:
    """Returns the example of a record's text, then those of answers with a separate text."""
    found = layout.answers(_end(layout, tokens.offsets, config.sequence_length + 1))
    notes.update(layout.notes)
    notes.update(found.notes)
    whole = functools.partial(_whole, layout, tokenizer=tokenizer, config=config, notes=notes)
    examples = [
        whole(text, [span], Tokens(*tokenizer.encode_with_offsets(text)))
        for text, span in found.separate
    ]
    if found.spans or not found.separate:
        examples.insert(0, whole(layout.text, found.spans, tokens))
    return examples


def _whole(
    layout: RecordText,
    text: str,
    spans: Sequence[Span],
    tokens: Tokens,
    *,
    tokenizer: Tokenizer,
    config: DataConfig,
    notes: Counter[str],
) -> Example:
    """Returns a text of a record as one example, without truncation."""
    if not layout.chunked:
        tokens, merged = split_at_answers(text, [start for start, _ in spans], tokens, tokenizer)
        if merged:
            notes[MERGED] += merged
    return _finish(
        layout, tokens.ids, mark(tokens.offsets, spans), tokenizer, config.loss_on == "all"
    )


def _end(layout: RecordText, offsets: np.ndarray, limit: int) -> int:
    """Returns the end, in characters, of the text that remains after truncation."""
    cut = not layout.chunked and len(offsets) > limit
    return int(offsets[limit - 1, 1]) if cut else len(layout.text)


def _finish(
    layout: RecordText, ids: list[int], target: np.ndarray, tokenizer: Tokenizer, loss_on_all: bool
) -> Example:
    answered = np.flatnonzero(target)
    stopped = len(answered) > 0 and ids[answered[-1]] in tokenizer.stop_ids
    whole = tokenizer.with_bos(ids) if layout.bos else ids
    head = len(whole) - len(ids)
    tail = [tokenizer.eos_id] if layout.eos and not stopped else []
    target = np.concatenate([np.zeros(head, bool), target, np.ones(len(tail), bool)])
    if loss_on_all:
        target[:] = True
    target[:1] = False
    return Example(np.array([*whole, *tail], np.int32), target)


def _fit(example: Example, limit: int, chunked: bool) -> Iterator[Example]:
    if not chunked:
        yield Example(example.ids[:limit], example.target[:limit])
        return
    for start in range(0, max(1, len(example.ids) - 1), limit - 1):
        target = example.target[start : start + limit].copy()
        target[:1] = False
        yield Example(example.ids[start : start + limit], target)

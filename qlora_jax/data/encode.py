"""From records to token ids and the mask of those that carry loss."""

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
from qlora_jax.data.tokens import Tokens, mark, parted
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.chat import Span
from qlora_jax.text.tokenizer import Tokenizer

BATCH = 256
LONG = 20_000
"""Records from which on a progress bar is worth its lines."""
MERGED = (
    "answers begin within a token that also holds the end of their prompt, which generation cannot "
    "give; let the prompt end without a space, and the answer begin with it"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One tokenized example of n >= 2 ids.

    Attributes:
      ids: i32[n].
      target: bool[n], true where the id is one the model learns to predict; never at the start.
    """

    ids: np.ndarray
    target: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeStats:
    """What encoding made.

    Attributes:
      examples: examples made; a long text makes several.
      tokens: ids in them.
      target_tokens: ids that carry loss.
      truncated: examples cut at `sequence_length + 1` ids.
      dropped: examples left out because no target was in them, after truncation.
      notes: the end of a warning to the number of answers or conversations that it is true of.
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

    Targets come from character spans: of a conversation the assistant's turns with the token that
    ends each, of a prompt/completion pair the completion and an end of text, of a text everything.
    An answer begins with a token of its own. Where the chat template writes what is before an
    answer differently once more turns follow, that answer is an example of its own.
    With `loss_on: all` every id but the first is a target. An example has at most
    `sequence_length + 1` ids; a text longer than that becomes several examples, each of which
    starts with the last id of the one before, so that every id but the first is a target once.

    Args:
      records: the records, in order.
      tokenizer: the tokenizer.
      config: the settings of data.
      bad: leaves out records that cannot be rendered or encoded; None stops at the first.

    Raises:
      UserError: a conversation cannot be rendered, a text cannot be encoded, or an example has no
        target left and `on_no_target` is error; the record's place is named.
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
    """Yields each record, its layout, and all of it as one example or, of some chats, several.

    Args:
      records: the records.
      tokenizer: the tokenizer.
      config: the settings of data.
      bad: leaves out those that cannot be used.
      notes: counts what is to be told; it is added to.
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
    """Yields records with their layouts and tokens, but for those whose text has none."""
    try:
        encoded = tokenizer.encode_batch([layout.text for _, layout in laid])
    except UserError:  # of one of them
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
    """Returns a record's text as an example, before the examples of answers apart."""
    found = layout.answers(_end(layout, tokens.offsets, config.sequence_length + 1))
    notes.update(layout.notes)
    notes.update(found.notes)
    whole = functools.partial(_whole, layout, tokenizer=tokenizer, config=config, notes=notes)
    examples = [
        whole(text, [span], Tokens(*tokenizer.encode_with_offsets(text)))
        for text, span in found.apart
    ]
    if found.spans or not found.apart:
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
    """Returns a text of a record as one example, whatever its length."""
    if not layout.chunked:
        tokens, merged = parted(text, [start for start, _ in spans], tokens, tokenizer)
        if merged:
            notes[MERGED] += merged
    return _finish(
        layout, tokens.ids, mark(tokens.offsets, spans), tokenizer, config.loss_on == "all"
    )


def _end(layout: RecordText, offsets: np.ndarray, limit: int) -> int:
    """Returns the character after the last token that is kept of a layout."""
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

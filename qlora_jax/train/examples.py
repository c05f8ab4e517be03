"""Reads and encodes the examples of a run, and makes batches of them."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Sequence

from qlora_jax.config import Config
from qlora_jax.data import encode, sources
from qlora_jax.data.bad_records import BadRecords
from qlora_jax.data.encode import EncodeStats, Example
from qlora_jax.data.findings import Findings
from qlora_jax.data.loader import Batch, Loader, held_out_batches
from qlora_jax.data.prompts import SamplePrompt, question
from qlora_jax.data.records import Record
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Data:
    """Encoded examples of a run.

    Attributes:
      train: training examples.
      held_out: map from the name of a held-out set to its examples, at least one for each set; a
        single set may have the name "".
      questions: prompts of the first held-out set, which the model answers as samples.
      stats: statistics of the encoded training examples.
      dropped: map from a reason to the number of records left out for it.
      found: findings from reading the records.
      notes: map from a remark about answers or conversations to the number of affected ones.
    """

    train: list[Example]
    held_out: dict[str, list[Example]]
    questions: list[SamplePrompt]
    stats: EncodeStats
    dropped: dict[str, int]
    found: Findings
    notes: dict[str, int]


def read_data(config: Config, tokenizer: Tokenizer, max_positions: int) -> Data:
    """Reads, splits and encodes the examples.

    A held-out prompt becomes a sample question if the prompt is not longer than
    `data.sequence_length`, and prompt plus `train.sample_tokens` fit in `max_positions`.

    Raises:
      UserError: the data cannot be used.
    """
    split = sources.read(config.data)
    bad = split.found.bad
    train, stats = encode.encode(split.train, tokenizer, config.data, bad)
    if not train:
        raise _nothing_left(config, "", len(split.train), bad)
    held_out: dict[str, list[Example]] = {}
    dropped, notes = Counter(split.found.dropped), Counter(stats.notes)
    dropped["no target"] += stats.dropped
    for name, records in split.held_out.items():
        examples, own = encode.encode(records, tokenizer, config.data, bad)
        dropped["no target"] += own.dropped
        notes.update(own.notes)
        if examples:
            held_out[name] = examples
        elif name:
            raise _nothing_left(config, f"data.eval_source {name}: ", len(records), bad)
    questions = _questions(
        next(iter(split.held_out.values()), []), config, tokenizer, max_positions
    )
    return Data(train, held_out, questions, stats, dict(+dropped), split.found, dict(notes))


def _nothing_left(config: Config, where: str, count: int, bad: BadRecords) -> UserError:
    """Returns the error for a set without any usable record."""
    reasons = f"; or correct the records: {bad.reasons()}" if bad.count else ""
    return UserError(
        f"{where}none of the {count} examples has an answer within data.sequence_length "
        f"{config.data.sequence_length}; raise it, or check data.format{reasons}"
    )


def _questions(
    records: Sequence[Record], config: Config, text: Tokenizer, max_positions: int
) -> list[SamplePrompt]:
    """Returns the first `train.samples` held-out prompts that leave room for an answer."""
    found: list[SamplePrompt] = []
    room = min(config.data.sequence_length, max_positions - config.train.sample_tokens)
    for record in records:
        if len(found) == config.train.samples:
            break
        with contextlib.suppress(UserError):  # a bad record; the encoder already reported it
            asked = question(record, text, config.data)
            if asked is not None and 0 < len(asked.ids) <= room:
                found.append(asked)
    return found


def describe_data(data: Data) -> str:
    """Returns a summary line of the data, followed by the lines of `warnings`."""
    stats = data.stats
    parts = [
        f"{stats.examples:,} examples, {stats.tokens:,} tokens of which {stats.target_tokens:,} "
        f"carry loss; {sum(map(len, data.held_out.values())):,} held out"
    ]
    if sets := [f"{name} {len(x):,}" for name, x in data.held_out.items() if name]:
        parts[0] += f" ({', '.join(sets)})"
    if stats.truncated:
        parts.append(f"{stats.truncated:,} cut at the sequence length")
    return "\n".join(["; ".join([*parts, *left_out(data)]), *warnings(data)])


def left_out(data: Data) -> list[str]:
    """Returns, for each reason, a text with the number of records left out."""
    return [f"{count:,} left out: {reason}" for reason, count in data.dropped.items()]


def warnings(data: Data) -> list[str]:
    """Returns a line for each problem of the records that the user should know."""
    notes = [f"warning: {count:,} {note}" for note, count in data.notes.items()]
    return [*data.found.lines(), *notes]


def loader(config: Config, data: Data, pad_id: int, seed: int) -> Loader:
    """Returns the training batches, in an order that depends on the seed.

    Args:
      config: config of the run.
      data: examples of the run.
      pad_id: id of the padding token.
      seed: seed of the order.
    """
    return Loader(
        data.train,
        config.data,
        batch_size=config.train.batch_size,
        gradient_accumulation=config.train.gradient_accumulation,
        seed=seed,
        pad_id=pad_id,
    )


def held_out(config: Config, data: Data, pad_id: int) -> dict[str, Sequence[Batch]]:
    """Returns the batches of each held-out set, by name; empty without held-out data."""
    rows, size = config.train.eval_rows, config.train.batch_size
    return {
        name: held_out_batches(examples, config.data, size, rows, pad_id)
        for name, examples in data.held_out.items()
    }


def targets(batches: Sequence[Batch]) -> int:
    """Returns the number of target tokens in the batches."""
    return sum(int(batch["mask"].sum()) for batch in batches)

"""The examples of a run: read, encoded, and in batches."""

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
      train: examples to train on.
      held_out: name of a held-out set to its examples, none of which is empty; the only set may
        have the name "".
      questions: prompts of the first set, to answer as samples.
      stats: what encoding `train` made.
      dropped: reason to number of records left out.
      found: what reading the records found.
      notes: what is to be told of answers or conversations, and their number.
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

    A held-out prompt is a question when it and `train.sample_tokens` fit in `max_positions`.

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
    """Returns the error of records of which none can be trained on."""
    reasons = f"; or correct the records: {bad.reasons()}" if bad.count else ""
    return UserError(
        f"{where}none of the {count} examples has an answer within data.sequence_length "
        f"{config.data.sequence_length}; raise it, or check data.format{reasons}"
    )


def _questions(
    records: Sequence[Record], config: Config, text: Tokenizer, max_positions: int
) -> list[SamplePrompt]:
    """Returns the first held-out prompts that leave room for an answer."""
    found: list[SamplePrompt] = []
    room = min(config.data.sequence_length, max_positions - config.train.sample_tokens)
    for record in records:
        if len(found) == config.train.samples:
            break
        with contextlib.suppress(UserError):  # a bad record, of which encoding has told
            asked = question(record, text, config.data)
            if asked is not None and 0 < len(asked.ids) <= room:
                found.append(asked)
    return found


def describe_data(data: Data) -> str:
    """Returns a line on what is trained on, and one for each thing to be known of it."""
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
    """Returns how many records were left out, by reason."""
    return [f"{count:,} left out: {reason}" for reason, count in data.dropped.items()]


def warnings(data: Data) -> list[str]:
    """Returns a line for each thing that the user should know of the records."""
    notes = [f"warning: {count:,} {note}" for note, count in data.notes.items()]
    return [*data.found.lines(), *notes]


def loader(config: Config, data: Data, pad_id: int, seed: int) -> Loader:
    """Returns the batches to train on, in the order that the seed gives.

    Args:
      config: the run's config.
      data: its examples.
      pad_id: token of what fills a row.
      seed: the seed of the order.
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
    """Returns the batches that evaluations are on, by set; none where nothing is set aside."""
    rows, size = config.train.eval_rows, config.train.batch_size
    return {
        name: held_out_batches(examples, config.data, size, rows, pad_id)
        for name, examples in data.held_out.items()
    }


def targets(batches: Sequence[Batch]) -> int:
    """Returns the number of target tokens in batches."""
    return sum(int(batch["mask"].sum()) for batch in batches)

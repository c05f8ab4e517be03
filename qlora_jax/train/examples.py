"""The examples of a run: read, encoded, and in batches."""

import dataclasses
from collections.abc import Sequence

from qlora_jax.config import Config
from qlora_jax.data import encode, sources
from qlora_jax.data.encode import EncodeStats, Example
from qlora_jax.data.findings import Findings
from qlora_jax.data.loader import Batch, Loader, held_out_batches
from qlora_jax.data.prompts import Question, question
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Data:
    """Encoded examples of a run.

    Attributes:
      train: examples to train on.
      held_out: examples to evaluate on.
      questions: held-out prompts to answer as samples.
      stats: what encoding `train` made.
      dropped: reason to number of records left out.
      found: what reading them found; its lines are for the user.
    """

    train: list[Example]
    held_out: list[Example]
    questions: list[Question]
    stats: EncodeStats
    dropped: dict[str, int]
    found: Findings


def read_data(config: Config, text: Tokenizer, max_positions: int) -> Data:
    """Reads, splits and encodes the examples.

    A held-out prompt is a question when it and `train.sample_tokens` fit in `max_positions`.

    Raises:
      UserError: the data cannot be used.
    """
    split = sources.read(config.data)
    train, stats = encode.encode(split.train, text, config.data)
    if not train:
        raise UserError(
            f"none of the {len(split.train)} examples has an answer within data.sequence_length "
            f"{config.data.sequence_length}; raise it, or check data.format"
        )
    held_out: list[Example] = []
    without_target = stats.dropped
    if split.held_out:
        held_out, held_out_stats = encode.encode(split.held_out, text, config.data)
        without_target += held_out_stats.dropped
    questions: list[Question] = []
    for record in split.held_out:
        if len(questions) == config.train.samples:
            break
        asked = question(record, text, config.data)
        room = min(config.data.sequence_length, max_positions - config.train.sample_tokens)
        if asked is not None and 0 < len(asked.ids) <= room:
            questions.append(asked)
    dropped = dict(split.found.dropped)
    if without_target:
        dropped["no target"] = without_target
    return Data(train, held_out, questions, stats, dropped, split.found)


def describe_data(data: Data) -> str:
    """A line on what is trained on, and one for each thing that the user should know of it."""
    stats = data.stats
    parts = [
        f"{stats.examples:,} examples, {stats.tokens:,} tokens of which {stats.target_tokens:,} "
        f"carry loss; {len(data.held_out):,} held out"
    ]
    if stats.truncated:
        parts.append(f"{stats.truncated:,} cut at the sequence length")
    parts += [f"{count:,} left out: {reason}" for reason, count in data.dropped.items()]
    return "\n".join(["; ".join(parts), *data.found.lines()])


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


def held_out(config: Config, data: Data, pad_id: int) -> Sequence[Batch]:
    """Returns the batches that evaluations are on; none where nothing is set aside."""
    if not data.held_out:
        return []
    rows, size = config.train.eval_rows, config.train.batch_size
    return held_out_batches(data.held_out, config.data, size, rows, pad_id)

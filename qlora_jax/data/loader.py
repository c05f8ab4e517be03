"""Makes batches in an order that depends only on seed and epoch, so that a run can resume."""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qlora_jax.config import DataConfig
from qlora_jax.data.encode import Example
from qlora_jax.data.packing import bucket_lengths, fill, pack
from qlora_jax.data.sources import named
from qlora_jax.runtime.errors import UserError

Batch = dict[str, np.ndarray]


class BatchRows(NamedTuple):
    """The rows of one batch, each a list of example indices, and the length of these rows."""

    rows: list[list[int]]
    length: int


class Loader:
    """An endless iterator over training batches.

    A batch is a dict of arrays [k, B, T]: k micro-batches of B rows of T positions.
    `packing.fill` describes the arrays. With packing, T is `sequence_length`; without packing, T
    is one of the lengths of `packing.bucket_lengths`.

    Every epoch holds each example exactly once. The rows of an epoch are distributed evenly over
    the smallest possible number of steps, so all steps have nearly the same number of rows. Empty
    rows, which carry no loss, fill each batch. If the data set is smaller than a batch, an epoch
    is one step.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        config: DataConfig,
        *,
        batch_size: int,
        gradient_accumulation: int = 1,
        seed: int = 0,
        pad_id: int = 0,
    ) -> None:
        """Raises UserError if there are no examples."""
        if not examples:
            raise UserError(f"{named(config.source)}: no examples to train on; give others")
        self._examples = examples
        self._config = config
        self._shape = (gradient_accumulation, batch_size)
        self._seed = seed
        self._pad_id = pad_id
        self._epoch = self._step = 0
        self._steps = self._plan(0)
        self._fingerprint = _fingerprint(examples, config, self._shape, seed)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows, length = self._steps[self._step]
        self._step += 1
        if self._step == len(self._steps):
            self._epoch, self._step = self._epoch + 1, 0
            self._steps = self._plan(self._epoch)
        k, b = self._shape
        flat = fill(rows, self._examples, length, k * b, self._pad_id)
        return {name: array.reshape(k, b, length) for name, array in flat.items()}

    @property
    def epoch(self) -> float:
        """Number of finished epochs plus the finished fraction of the current epoch."""
        return self._epoch + self._step / len(self._steps)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in the current epoch; with packing, epochs differ slightly."""
        return len(self._steps)

    def steps_of(self, epochs: float) -> int:
        """Returns the number of batches in the first `epochs` epochs, rounded up."""
        whole = int(epochs)
        steps = sum(len(self._plan(epoch)) for epoch in range(whole))
        if part := epochs - whole:
            # 1.1 - 1 is slightly more than 0.1 in floating point; without `round`, 0.1 of 10
            # batches would become 2.
            steps += math.ceil(round(part * len(self._plan(whole)), 6))
        return max(steps, 1)

    def state(self) -> dict[str, Any]:
        """Returns the position in the data, as plain JSON values."""
        return {"epoch": self._epoch, "step": self._step, "fingerprint": self._fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state()`; the batches that follow are bit-identical.

        Raises:
          UserError: the state belongs to other data or other batch settings.
        """
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                "the examples, data.sequence_length, data.packing, train.batch_size, "
                "train.gradient_accumulation or train.seed differ from the run to resume; "
                "restore them, or start a new run"
            )
        self._epoch, self._step = int(state["epoch"]), int(state["step"])
        self._steps = self._plan(self._epoch)

    def _plan(self, epoch: int) -> list[BatchRows]:
        rng = np.random.default_rng([self._seed, epoch])
        k, b = self._shape
        lengths = [len(e.ids) - 1 for e in self._examples]
        return plan_epoch(lengths, self._config, k * b, rng)


def plan_epoch(
    lengths: Sequence[int], config: DataConfig, rows_per_step: int, rng: np.random.Generator
) -> list[BatchRows]:
    """Returns the batches of one epoch.

    Args:
      lengths: number of positions that each example takes.
      config: settings of the data; only `sequence_length` and `packing` are read.
      rows_per_step: number of rows in a batch, all micro-batches together.
      rng: random generator that shuffles examples, rows and batches.
    """
    order = rng.permutation(len(lengths)).tolist()
    capacity = config.sequence_length
    if config.packing:
        rows = pack(lengths, capacity, order)
        rows = [rows[i] for i in rng.permutation(len(rows))]
        return deal(rows, capacity, rows_per_step)
    steps: list[BatchRows] = []
    waiting: list[int] = []
    low = 0
    for length in bucket_lengths(capacity):
        # Examples that do not fill a batch move to the next longer row length, and come first.
        waiting += [i for i in order if low < lengths[i] <= length]
        whole = len(waiting) - len(waiting) % rows_per_step if length < capacity else len(waiting)
        steps += deal([[i] for i in waiting[:whole]], length, rows_per_step)
        waiting, low = waiting[whole:], length
    return [steps[i] for i in rng.permutation(len(steps))]


def deal(rows: Sequence[list[int]], length: int, rows_per_step: int) -> list[BatchRows]:
    """Distributes rows evenly over the smallest possible number of steps."""
    count = -(-len(rows) // rows_per_step)
    edges = [i * len(rows) // count for i in range(count + 1)] if count else [0]
    return [BatchRows(list(rows[a:b]), length) for a, b in itertools.pairwise(edges)]


def held_out_batches(
    examples: Sequence[Example],
    config: DataConfig,
    batch_size: int,
    max_rows: int,
    pad_id: int = 0,
) -> list[Batch]:
    """Returns the evaluation batches, dicts of arrays [B, T], always in the same order.

    If there are more than `max_rows` rows, the choice of rows depends only on the examples, not
    on the run's seed. Empty rows fill the last batch of each row length.
    """
    lengths = [len(e.ids) - 1 for e in examples]
    order = np.random.default_rng(0).permutation(len(examples)).tolist()
    capacity = config.sequence_length
    if config.packing:
        groups = {capacity: pack(lengths, capacity, order)[:max_rows]}
    else:
        groups = {length: [] for length in bucket_lengths(capacity)}
        for i in order[:max_rows]:
            groups[next(b for b in groups if b >= lengths[i])].append([i])
    return [
        fill(rows[i : i + batch_size], examples, length, batch_size, pad_id)
        for length, rows in groups.items()
        for i in range(0, len(rows), batch_size)
    ]


def _fingerprint(
    examples: Sequence[Example], config: DataConfig, shape: tuple[int, int], seed: int
) -> str:
    digest = hashlib.sha256(repr((config.sequence_length, config.packing, shape, seed)).encode())
    for example in examples:
        digest.update(len(example.ids).to_bytes(4, "little"))
        digest.update(example.ids.tobytes())
        digest.update(example.target.tobytes())
    return digest.hexdigest()[:16]

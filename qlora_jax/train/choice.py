"""Chooses the step that a run exports, and early stopping, by held-out loss. Pure functions."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qlora_jax.config import TrainConfig
from qlora_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The held-out losses at one step, in nats per target token.

    Attributes:
      step: number of steps done.
      loss: loss of the set that decides: the first or only set.
      sets: map from the name of a set to its loss; empty if the only set has no name.
    """

    step: int
    loss: float
    sets: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BestStep:
    """The best and the last evaluation since the first step; saved in each checkpoint.

    Attributes:
      best: first evaluation with the lowest loss; None before the first evaluation.
      last: newest evaluation; None before the first evaluation.
      since: number of evaluations after `best`.
    """

    best: Evaluation | None = None
    last: Evaluation | None = None
    since: int = 0

    def seen(self, new: Evaluation) -> "BestStep":
        """Returns the best and last evaluation after one more evaluation."""
        if self.best is None or _rank(new) < _rank(self.best):
            return BestStep(new, new, 0)
        return BestStep(self.best, new, self.since + 1)

    def stops(self, patience: int) -> bool:
        """Returns whether training stops early now; patience 0 never stops."""
        return 0 < patience <= self.since

    def exported(self, keep_best: bool) -> Evaluation | None:
        """Returns the evaluation of the exported step; None without held-out data."""
        return self.best if keep_best else self.last


def describe_losses(found: Evaluation) -> str:
    """Returns the losses as text, with the name of each set."""
    sets = ", ".join(f"{name} {loss:.4f}" for name, loss in found.sets.items())
    return sets or f"{found.loss:.4f}"


def describe_patience(patience: int) -> str:
    """Returns the reason of an early stop, for messages."""
    return f"no lower held-out loss in {patience} evaluations in a row (train.patience)"


def read_evaluation(values: Mapping[str, Any] | None) -> Evaluation | None:
    """Returns an evaluation from the dict of `dataclasses.asdict`; None for None."""
    return None if values is None else Evaluation(**values)


def read_choice(values: Mapping[str, Any]) -> BestStep:
    """Returns a `BestStep` from the dict of `dataclasses.asdict`."""
    best, last = read_evaluation(values["best"]), read_evaluation(values["last"])
    return BestStep(best, last, values["since"])


def check(train: TrainConfig) -> None:
    """Checks that a run with `keep_best` or `patience` evaluates during training.

    Raises:
      UserError: the run has one of these settings, and `train.eval_every` is 0.
    """
    if (name := _setting(train)) and not train.eval_every:
        raise UserError(
            f"{name} needs evaluations in training, but train.eval_every 0 evaluates only at the "
            f"end; give train.eval_every, or remove {name}"
        )


def check_held_out(train: TrainConfig, held_out: bool) -> None:
    """Checks that a run with `keep_best` or `patience` has held-out data.

    Raises:
      UserError: the run has one of these settings and no held-out data.
    """
    if (name := _setting(train)) and not held_out:
        raise UserError(
            f"{name} needs a held-out loss, but no data is held out; give data.eval_source or "
            f"data.eval_fraction, or remove {name}"
        )


def _setting(train: TrainConfig) -> str | None:
    given = {"train.keep_best": train.keep_best, "train.patience": train.patience}
    return next((name for name, value in given.items() if value), None)


def _rank(found: Evaluation) -> float:
    return math.inf if math.isnan(found.loss) else found.loss

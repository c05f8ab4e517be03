"""Which step a run exports and when it stops early, by its held-out losses. Pure functions."""

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
      step: steps done.
      loss: of the set that decides, which is the first or only one.
      sets: name of a set to its loss; empty where the only one has no name.
    """

    step: int
    loss: float
    sets: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BestStep:
    """What the evaluations since the first step have told; part of each checkpoint.

    Attributes:
      best: the first one of the lowest loss; None before there is any.
      last: the newest one.
      since: evaluations after `best`.
    """

    best: Evaluation | None = None
    last: Evaluation | None = None
    since: int = 0

    def seen(self, new: Evaluation) -> "BestStep":
        """Returns what is known after one more evaluation."""
        if self.best is None or _rank(new) < _rank(self.best):
            return BestStep(new, new, 0)
        return BestStep(self.best, new, self.since + 1)

    def stops(self, patience: int) -> bool:
        """Whether training stops here; never with a patience of 0."""
        return 0 < patience <= self.since

    def exported(self, keep_best: bool) -> Evaluation | None:
        """The evaluation of the step that the run exports; None without held-out data."""
        return self.best if keep_best else self.last


def describe_losses(found: Evaluation) -> str:
    """Returns the losses in words, each set's with its name."""
    sets = ", ".join(f"{name} {loss:.4f}" for name, loss in found.sets.items())
    return sets or f"{found.loss:.4f}"


def describe_patience(patience: int) -> str:
    """Returns why a run stopped early."""
    return f"no lower held-out loss in {patience} evaluations in a row (train.patience)"


def read_evaluation(values: Mapping[str, Any] | None) -> Evaluation | None:
    """Returns the evaluation that `dataclasses.asdict` made a dict; None of None."""
    return None if values is None else Evaluation(**values)


def read_choice(values: Mapping[str, Any]) -> BestStep:
    """Returns the choice that `dataclasses.asdict` made a dict."""
    best, last = read_evaluation(values["best"]), read_evaluation(values["last"])
    return BestStep(best, last, values["since"])


def check(train: TrainConfig) -> None:
    """Makes sure that a run that goes by the held-out loss evaluates on the way.

    Raises:
      UserError: it does not.
    """
    if (name := _setting(train)) and not train.eval_every:
        raise UserError(
            f"{name} goes by the held-out loss, and train.eval_every 0 evaluates at the end only; "
            f"give train.eval_every, or remove {name}"
        )


def check_held_out(train: TrainConfig, held_out: bool) -> None:
    """Makes sure that a run that goes by the held-out loss has held-out data.

    Raises:
      UserError: it has none.
    """
    if (name := _setting(train)) and not held_out:
        raise UserError(
            f"{name} goes by the held-out loss, and nothing is held out; give data.eval_source or "
            f"data.eval_fraction, or remove {name}"
        )


def _setting(train: TrainConfig) -> str | None:
    given = {"train.keep_best": train.keep_best, "train.patience": train.patience}
    return next((name for name, value in given.items() if value), None)


def _rank(found: Evaluation) -> float:
    return math.inf if math.isnan(found.loss) else found.loss

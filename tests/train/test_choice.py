"""The step that is exported and the step at which a run stops, against their definitions."""

import dataclasses
import json
import math
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.config import TrainConfig
from qlora_jax.runtime.errors import UserError
from qlora_jax.train.choice import (
    BestStep,
    Evaluation,
    check,
    check_held_out,
    describe_losses,
    read_choice,
)

LOSSES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, math.inf, math.nan]), max_size=12)


def after(losses):
    found = [Evaluation(step, loss) for step, loss in enumerate(losses, 1)]
    return reduce(BestStep.seen, found, BestStep())


def rank(loss):
    return math.inf if math.isnan(loss) else loss


@given(LOSSES)
def test_the_best_is_the_first_of_the_lowest(losses):
    choice = after(losses)
    if not losses:
        assert choice == BestStep()
        return
    ranks = [rank(loss) for loss in losses]
    assert choice.best.step == 1 + ranks.index(min(ranks))
    assert choice.last.step == len(losses)
    assert choice.exported(True) is choice.best
    assert choice.exported(False) is choice.last


@given(LOSSES, st.integers(0, 5))
def test_a_run_stops_after_as_many_evaluations_without_a_lower_loss(losses, patience):
    ranks = [rank(loss) for loss in losses]
    waited = [
        len(ranks) >= patience + 1 and min(ranks[-patience:]) >= min(ranks[:-patience])
        if patience
        else False
    ]
    assert [after(losses).stops(patience)] == waited


@given(LOSSES, st.integers(0, 12))
def test_what_is_known_survives_a_checkpoint(losses, stop):
    first = after([loss for loss in losses[:stop] if not math.isnan(loss)])
    again = read_choice(json.loads(json.dumps(dataclasses.asdict(first))))
    assert again == first


def test_several_sets_are_named():
    assert describe_losses(Evaluation(3, 1.5, {"code": 1.5, "prose": 2.25})) == (
        "code 1.5000, prose 2.2500"
    )
    assert describe_losses(Evaluation(3, 1.5)) == "1.5000"


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"keep_best": True}, "train.keep_best"), ({"patience": 2}, "train.patience")],
)
def test_going_by_a_loss_that_is_not_measured_is_refused(settings, name):
    with pytest.raises(
        UserError, match=f"^{name} needs evaluations .* 0 evaluates only at the end"
    ):
        check(TrainConfig(eval_every=0, **settings))
    with pytest.raises(
        UserError, match=f"^{name} needs a held-out loss, .* is held out; give data"
    ):
        check_held_out(TrainConfig(**settings), False)
    check(TrainConfig(eval_every=1, **settings))
    check_held_out(TrainConfig(**settings), True)
    check(TrainConfig(eval_every=0))
    check_held_out(TrainConfig(), False)

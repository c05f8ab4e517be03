"""The number of steps, and the effect of a new number on the learning rate."""

import math

import pytest

from qlora_jax.config import OptimizerConfig, from_tree
from qlora_jax.train.step_count import describe_jump, describe_warmup, with_steps


def make(warmup=0, **train):
    return from_tree(
        {
            "model": {"path": "m"},
            "data": {"source": "d"},
            "output": "o",
            "optimizer": {"warmup_steps": warmup},
            "train": train,
        },
        "test",
    )


def never(epochs):
    pytest.fail("asked for the steps of epochs")


def test_steps_follow_from_epochs_alone_where_they_are_given():
    assert with_steps(make(), never).train.steps == 200
    assert with_steps(make(steps=7), never).train.steps == 7
    counted = with_steps(make(epochs=2.5), lambda epochs: int(epochs * 10))
    assert (counted.train.steps, counted.train.epochs) == (25, None)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (4, 5)])
def test_a_warmup_that_ends_is_not_warned_of(warmup, steps):
    assert describe_warmup(make(warmup, steps=steps)) is None


@pytest.mark.parametrize("warmup", [5, 500])
def test_a_warmup_without_an_end_is(warmup):
    line = describe_warmup(make(warmup, steps=5))
    assert line.startswith(f"warning: optimizer.warmup_steps {warmup} is not below the 5 steps")


def test_the_rate_jumps_where_it_follows_from_the_number_of_steps():
    assert describe_jump(OptimizerConfig(learning_rate=0.5), 3, 3, 6) is None
    linear = OptimizerConfig(learning_rate=0.5, schedule="linear")
    line = describe_jump(linear, 3, 4, 6)
    assert "with 6 instead of 4 the learning rate continues at 0.25, not 0.125;" in line
    cosine = OptimizerConfig(learning_rate=0.5, schedule="cosine")
    rate = 0.25 * (1 + math.cos(math.pi / 4))
    assert f"continues at {rate:.3g}, not 0;" in describe_jump(cosine, 3, 3, 12)
    assert describe_jump(cosine, 3, 6, 6) is None
    warming = OptimizerConfig(learning_rate=0.5, schedule="cosine", warmup_steps=8)
    assert describe_jump(warming, 3, 10, 20) is None

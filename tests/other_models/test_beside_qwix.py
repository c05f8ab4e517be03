"""The comparison with qwix: the sides are comparable, and bytes and code count right."""

import jax.numpy as jnp
import pytest

from experiments.benchmarks import qwix_trials
from experiments.benchmarks.qwix_measure import compare
from experiments.benchmarks.qwix_sides import BLOCK, bits, code_of

pytestmark = pytest.mark.other_models


@pytest.fixture(scope="module")
def figures():
    pytest.importorskip("qwix")
    pytest.importorskip("tunix")
    return compare("tiny", "float32", length=16, times=9)


def test_all_sides_lower_the_loss(figures):
    for name, own in figures.items():
        assert own.after < own.before - 0.5, name


def test_all_sides_have_the_same_weights_in_blocks_of_the_same_size(figures):
    ours, like, theirs = figures.values()
    assert ours.quantized == like.quantized == theirs.quantized
    assert ours.trained == like.trained == theirs.trained
    # two implementations of one format; neither uses double quantization
    assert like.weights == pytest.approx(theirs.weights, rel=1e-6)
    assert like.logits == pytest.approx(theirs.logits, rel=1e-4)
    assert ours.weights == pytest.approx(theirs.weights, rel=0.01)


def test_bytes_are_those_of_codes_and_scales(figures):
    theirs = list(figures.values())[2]
    assert theirs.packed == theirs.quantized // 2 + 4 * theirs.quantized // BLOCK
    assert theirs.nbytes == theirs.quantized + 4 * theirs.quantized // BLOCK


def test_bits_of_an_array():
    assert bits(jnp.zeros(6, jnp.uint4)) == 24
    assert bits(jnp.zeros(6, jnp.uint8)) == 48
    assert bits(jnp.zeros(6, jnp.bfloat16)) == 96


def test_code_is_counted_without_docstring_and_imports():
    def three(x):
        """Returns 3."""
        import math

        x = math.floor(
            x,
        )
        return x

    assert code_of(three) == (4, 2)


def test_a_trial_ends_in_yes_or_in_the_first_line_of_its_error():
    def refused():
        raise ValueError("a|b\nmore")

    def unmet():
        raise qwix_trials.Unmet("nothing happened")

    assert qwix_trials.outcome(lambda: 3) == "yes"
    assert qwix_trials.outcome(refused) == "no: `ValueError: a\\|b`"
    assert qwix_trials.outcome(unmet) == "no: nothing happened"

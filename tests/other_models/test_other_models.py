"""Checks on models that third parties wrote, with the functions for any model."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from experiments.other_models import measure
from experiments.other_models.cases import Case
from experiments.other_models.every import CASES, installed

pytestmark = pytest.mark.other_models

ROUNDING = {"float32": 2e-6, "bfloat16": 0.03}
"""Largest allowed difference, relative to the largest output, by dtype. It allows for another order
of sums and, in bfloat16, for merged weights that are rounded to a relative 2^-9."""


def built(case: Case):
    if not installed(case):
        pytest.skip(f"{case.module} is not installed")
    return measure.way_of(case).build(case, 0)


def quantized(case: Case):
    return measure.way_of(case).quantize(case, built(case))


def adapted(case: Case):
    return measure.way_of(case).adapt(case, quantized(case))


def moved(case: Case, model):
    """Returns the model with adapters that change the outputs."""
    trained, frozen, join = measure.way_of(case).split(model)
    return join(measure.nudged(trained), frozen)


def rounding(case: Case) -> float:
    return ROUNDING[jnp.dtype(case.dtype).name]


every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every
def test_fresh_adapters_change_nothing(case):
    model = quantized(case)
    before = measure.outputs(case, model)
    np.testing.assert_array_equal(
        measure.outputs(case, measure.way_of(case).adapt(case, model)), before
    )


@every
def test_it_computes_with_the_decoded_weights(case):
    exact, model = built(case), quantized(case)
    way = measure.way_of(case)
    ours = measure.outputs(case, model)
    plain = way.merge(case, model)
    assert measure.difference(ours, measure.outputs(case, plain)) < rounding(case)
    assert measure.difference(ours, measure.outputs(case, exact)) > 0.01  # it is quantized
    before, after = (
        measure.chosen(case, exact, case.kernels),
        measure.chosen(case, plain, case.kernels),
    )
    assert before.keys() == after.keys() == measure.chosen(case, model, case.kernels).keys()
    for path in before:
        old, new = (np.asarray(weights[path], np.float32) for weights in (before, after))
        error = np.linalg.norm(new - old) / np.linalg.norm(old)
        assert 0.07 < error < 0.12, path  # the error of NF4 on normal weights is 0.095


@every
def test_what_is_merged_computes_what_is_adapted(case):
    model = adapted(case)
    base, model = measure.outputs(case, model), moved(case, model)
    ours = measure.outputs(case, model)
    assert measure.difference(ours, base) > max(0.01, 2 * rounding(case))
    merged = measure.way_of(case).merge(case, model)
    assert measure.difference(ours, measure.outputs(case, merged)) < rounding(case)


@every
def test_gradients_are_those_of_the_adapters_alone(case):
    model = adapted(case)
    trained, _, _ = measure.way_of(case).split(model)
    arrays = jax.tree.leaves(trained)
    weights = measure.chosen(case, built(case), case.adapted)
    assert len(arrays) == 2 * len(weights)
    at_start = measure.gradients(case, model)
    for array, gradient in zip(arrays, at_start, strict=True):
        assert np.isfinite(gradient).all()
        assert gradient.any() != np.asarray(array).any()  # B is zero, so A has no effect yet
    for gradient in measure.gradients(case, model, measure.nudged):
        assert np.isfinite(gradient).all()
        assert gradient.any()


@every
def test_training_lowers_the_loss(case):
    told = measure.losses(case, adapted(case))
    assert np.isfinite(told).all()
    assert told[-1] < told[0] - 0.1


@every
def test_a_weight_takes_four_bits_and_its_scales(case):
    model = quantized(case)
    exact = measure.chosen(case, built(case), case.kernels)
    held = measure.chosen(case, model, case.kernels)
    for path, q in held.items():
        assert isinstance(q, qj.QTensor), path
        assert math.prod(q.shape) == exact[path].size, path
        assert q.nbytes == measure.expected_bytes(q.shape), path


@pytest.mark.parametrize("case", [c for c in CASES if not c.linen], ids=lambda case: case.name)
def test_no_weight_is_decoded_outside_of_its_product(case):
    model = adapted(case)
    told = qj.summary(model, *case.example())
    assert told.decoded == {}
    assert told.quantized.variables == len(measure.chosen(case, built(case), case.kernels))

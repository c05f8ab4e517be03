"""Converts weights to matrices and back; checks the einsum equations against np.einsum."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.modules.axes import (
    MATRIX,
    TABLE,
    Axes,
    checked,
    from_equation,
    from_matrices,
    matrices_shape,
    to_matrices,
)
from qlora_jax.runtime.errors import UserError

pytestmark = pytest.mark.quick


@st.composite
def weights(draw):
    """Draws a stack's sizes, a layer's sizes, and a permutation of its axes cut in three parts."""
    stack = draw(st.lists(st.integers(1, 3), max_size=2))
    ndim = draw(st.integers(2, 5))
    order = draw(st.permutations(range(ndim)))
    first = draw(st.integers(0, ndim - 2))
    second = draw(st.integers(first + 1, ndim - 1))
    shape = draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim))
    return stack, shape, Axes(*map(tuple, (order[:first], order[first:second], order[second:])))


@settings(max_examples=25)
@given(weights())
def test_matrices_are_the_weight_in_another_order(made):
    stack, shape, axes = made
    w = np.arange(np.prod([*stack, *shape])).reshape(*stack, *shape)
    matrices = np.asarray(to_matrices(jnp.asarray(w), axes))
    assert matrices.shape == (*stack, *matrices_shape(axes, tuple(shape)))
    assert (np.asarray(from_matrices(jnp.asarray(matrices), axes, tuple(shape))) == w).all()
    assert axes.stack(w.shape) == tuple(stack)
    assert axes.own(w.shape) == tuple(shape)
    # the reference places entry by entry: K enumerates the contracted axes, N the kept ones
    for index in np.ndindex(*shape):
        batch, k, n = ([index[i] for i in part] for part in (axes.batch, axes.contract, axes.keep))
        sizes = [[shape[i] for i in part] for part in (axes.contract, axes.keep)]
        row, column = np.ravel_multi_index(k, sizes[0]), np.ravel_multi_index(n, sizes[1])
        assert (matrices[(..., *batch, row, column)] == w[(..., *index)]).all()


@pytest.mark.parametrize(
    "equation",
    [
        "bk,kn->bn",
        "BTD,NDH->BTNH",
        "BTNH,NHD->BTD",
        "...k,kn->...n",
        "te,cke->tkc",
        "ebk, enk -> ebn",
    ],
)
def test_an_equation_is_einsum(equation):
    axes = from_equation(equation, "w")
    inputs, result = equation.replace(" ", "").split("->")
    x_names, w_names = inputs.split(",")
    sizes = {c: 2 + i for i, c in enumerate(sorted(set(equation) - set(" ,->.")))}
    random = np.random.default_rng(0)
    x = random.normal(size=[sizes[c] for c in x_names.replace("...", "")])
    w = random.normal(size=[sizes[c] for c in w_names])
    if "..." in equation:
        x = x[None]
    matrices = np.asarray(to_matrices(jnp.asarray(w, jnp.float32), axes))
    # the axes of x in the order of the matrices: [*batch, rows, K]
    names = "".join(w_names[i] for i in axes.batch), "".join(w_names[i] for i in axes.contract)
    free = "".join(c for c in x_names.replace("...", "z") if c not in names[0] + names[1])
    moved = np.einsum(f"{x_names.replace('...', 'z')}->{names[0]}{free}{names[1]}", x)
    k = matrices.shape[-2]
    y = moved.reshape(*(sizes[c] for c in names[0]), -1, k) @ matrices
    kept = "".join(w_names[i] for i in axes.keep)
    back = y.reshape(
        [sizes[c] for c in names[0]]
        + [1 if c == "z" else sizes[c] for c in free]
        + [sizes[c] for c in kept]
    )
    expected = np.einsum(equation, x, w)
    got = np.einsum(f"{names[0]}{free}{kept}->{result.replace('...', 'z')}", back)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("equation", ["bk,kn", "bk->kb", "a,b,c->abc", "bk,kk->bk", "bk,k->b", ""])
def test_an_equation_that_is_no_product_is_an_error(equation):
    with pytest.raises(UserError, match=r"layers\.0\.w: .*register_kernel"):
        from_equation(equation, "layers.0.w")


@pytest.mark.parametrize(
    ("axes", "ndim"),
    [
        (Axes((), (0,), (0,)), 2),
        (Axes((), (0,), ()), 1),
        (Axes((), (), (0, 1)), 2),
        (Axes((), (0,), (2,)), 3),
        (Axes((0,), (1,), (2,)), 2),
        (Axes((), (-1,), (0,)), 2),
    ],
)
def test_axes_that_are_no_product_are_an_error(axes, ndim):
    with pytest.raises(UserError, match=r"^w: .*register_kernel"):
        checked(axes, "w", ndim)


def test_what_is_checked_is_returned():
    assert checked(MATRIX, "w", 3) is MATRIX
    assert checked(TABLE, "w", 2) is TABLE

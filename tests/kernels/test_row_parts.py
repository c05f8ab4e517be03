"""Products split into parts along the rows, with Triton kernels in interpret mode."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.kernels import matmul, row_parts, triton
from qlora_jax.quant import quantize
from qlora_jax.quant.qtensor import QTensor

K, N = 64, 96
ROWS = 700


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "INTERPRET", True)


BOUNDED = jax.make_user_context(False)
"""Part of jax's cache keys, so that no program is reused under another bound than its own."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Sets a bound that two row tiles of the wider side stay below, and three do not."""
    with pytest.MonkeyPatch.context() as patch, BOUNDED(True):
        patch.setattr(row_parts, "LIMIT", 3 * row_parts.TILE * N * 2)
        yield


@pytest.fixture
def narrow() -> Iterator[None]:
    with bounded():
        yield


def whole_and_divided(function: Callable[..., Any], *arguments: Any) -> Iterator[tuple[Any, Any]]:
    """Returns pairs of a function's results, without and with the narrow bound."""
    whole = function(*arguments)
    with bounded():
        divided = function(*arguments)
    return zip(jax.tree.leaves(whole), jax.tree.leaves(divided), strict=True)


def make(lead: tuple[int, ...] = ()) -> QTensor:
    return quantize(np.random.default_rng(0).normal(size=(*lead, K, N)).astype(np.float32))


def random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.bfloat16)


def both_directions(q: QTensor) -> Callable[..., Any]:
    def product_and_gradient(x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pull = jax.vjp(lambda x: matmul(x, q, "triton"), x)
        return y, pull(g)[0]

    return product_and_gradient


def calls(jaxpr, times: int = 1) -> int:
    """Counts how often the kernels of a program run."""
    found = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found += times
        length = equation.params.get("length", 1)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns") and equation.primitive.name != "pallas_call":
                found += calls(inner, times * length)
    return found


@pytest.mark.quick
def test_parts_have_the_bits_of_the_whole() -> None:
    function, x, g = both_directions(make()), random(7, 100, K), random(7, 100, N)
    for whole, divided in whole_and_divided(function, x, g):
        assert divided.shape == whole.shape
        np.testing.assert_array_equal(np.asarray(divided), np.asarray(whole))


@pytest.mark.parametrize("rows", [1, 256, 257, ROWS, 1024, 1025])
def test_the_number_of_parts(narrow, rows: int) -> None:
    program = jax.make_jaxpr(both_directions(make()))(random(rows, K), random(rows, N))
    assert calls(program.jaxpr) == 2 * math.ceil(rows / (2 * row_parts.TILE))


def test_below_the_bound_there_is_one_kernel() -> None:
    program = jax.make_jaxpr(both_directions(make()))(random(ROWS, K), random(ROWS, N))
    assert calls(program.jaxpr) == 2
    assert not any(equation.primitive.name == "scan" for equation in program.jaxpr.eqns)


@pytest.mark.quick
def test_a_batch_over_one_weight_is_divided_as_its_rows() -> None:
    function, xs, gs = jax.vmap(both_directions(make())), random(7, 100, K), random(7, 100, N)
    for whole, divided in whole_and_divided(function, xs, gs):
        np.testing.assert_array_equal(np.asarray(divided), np.asarray(whole))


@pytest.mark.quick
def test_a_batch_of_weights_is_done_one_by_one() -> None:
    stack = make((3,))

    def function(x, g):
        return jax.vmap(lambda x, g, q: both_directions(q)(x, g))(x, g, stack)

    xs, gs = random(3, 200, K), random(3, 200, N)
    for whole, divided in whole_and_divided(function, xs, gs):
        np.testing.assert_array_equal(np.asarray(divided), np.asarray(whole))
    shared = jax.vmap(lambda q: matmul(xs[0], q, "triton"))
    for whole, divided in whole_and_divided(shared, stack):
        np.testing.assert_array_equal(np.asarray(divided), np.asarray(whole))


def test_each_of_a_batch_of_weights_is_one_kernel(narrow) -> None:
    stack, xs = make((3,)), random(3, 200, K)
    each = jax.make_jaxpr(jax.vmap(lambda x, q: matmul(x, q, "triton")))(xs, stack)
    assert calls(each.jaxpr) == 3


@pytest.mark.parametrize("rows", [80_000, 37_450, 10**6, 2**24 + 1])
@pytest.mark.parametrize(("k", "n"), [(8192, 28672), (28672, 8192), (100, 99)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_parts_are_equal_whole_tiles_below_the_bound(rows, k, n, itemsize) -> None:
    q = jax.eval_shape(quantize, jax.ShapeDtypeStruct((k, n), jnp.float32))
    count, each = row_parts.split(rows, q, itemsize)
    assert each % row_parts.TILE == 0
    assert (count - 1) * each < rows <= count * each
    assert each * max(k, n) * itemsize < 2**31
    # fewer parts would exceed the bound
    largest = (2**31 - 1) // (max(k, n) * itemsize) // 128 * 128
    assert count == math.ceil(rows / largest)


def test_all_tiles_divide_the_tallest() -> None:
    for table in (row_parts.mosaic_tiles.TILES, row_parts.triton_tiles.TILES):
        assert all(row_parts.TILE % tile.m == 0 for tiles in table.values() for tile in tiles)


def test_xla_is_not_divided(narrow) -> None:
    x, q = random(ROWS, K), make()
    program = jax.make_jaxpr(lambda x: matmul(x, q, "xla"))(x)
    assert "while" not in str(program)
    assert "scan" not in str(program)

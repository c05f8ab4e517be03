"""Functions of a lazy weight, against the same functions of the whole weight as an array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selection import mostly_slow

from qlora_jax.modules.axes import MATRIX, TABLE, Axes
from qlora_jax.modules.kernel import of_array
from qlora_jax.modules.trace import run
from qlora_jax.modules.uses import Use

pytestmark = pytest.mark.quick

KINDS = {
    "4 bits": {"quantized": True},
    "4 bits, lora": {"quantized": True, "variant": "lora"},
    "4 bits, dora": {"quantized": True, "variant": "dora"},
    "array, lora": {"quantized": False, "variant": "lora"},
    "array, dora": {"quantized": False, "variant": "dora"},
}
E, K, M, N = 3, 40, 2, 24
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, K)), jnp.float32)


def few(names, often=(), kinds=("4 bits, lora", "array, dora", "4 bits, dora", "array, lora")):
    """Pairs each name with one kind of kernel in turn; names in `often` with every kind."""
    turns = [(name, kinds[i % len(kinds)]) for i, name in enumerate(names)]
    more = [(name, kind) for name in often for kind in KINDS]
    return list(dict.fromkeys([*turns, *more]))


def draw(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def check(made, function, x=X, kinds=("product",), tolerance=2e-5):
    """Compares values, gradients of x and of the trained arrays, and the kinds of uses."""
    uses: list[Use] = []

    def value(x, trained):
        return run(lambda ws, x: function(ws["w"], x), {"w": made.with_trained(trained)}, (x,))

    def expected(x, trained):
        return function(made.whole(trained).astype(made.kernel.dtype), x)

    def loss(x, trained, f):
        y = f(x, trained)
        terms = jnp.sin(y.astype(jnp.float32)) * jnp.arange(y.size).reshape(y.shape)
        return jnp.sum(terms) / y.size, y

    called = lambda x: run(lambda ws, x: function(ws["w"], x), {"w": made.kernel}, (x,), uses)  # noqa: E731
    jax.eval_shape(called, x)
    assert {use.kind for use in uses} == set(kinds), uses
    assert {use.name for use in uses} == {"w"}
    where = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else (1,)
    both = jax.jit(jax.grad(loss, where, has_aux=True), static_argnums=2)
    (grads, y), (exact, wanted) = (both(x, made.trained, f) for f in (value, expected))
    assert (y.shape, y.dtype) == (wanted.shape, wanted.dtype)
    near(y, wanted, tolerance)
    jax.tree.map(functools.partial(near, tolerance=5 * tolerance), grads, exact)


def near(x, y, tolerance):
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    scale = max(1.0, float(np.abs(y[np.isfinite(y)]).max(initial=0)))
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale)


def checkpointed(w, x):
    return jax.checkpoint(lambda x: jax.checkpoint(lambda y: jnp.tanh(y @ w))(x) + x[:, :N])(x)


def branched(w, x):
    return jax.lax.cond(x[0, 0] > 0, lambda y: y @ w, lambda y: 2 * (y @ w), x)


def switched(w, x):
    return jax.lax.switch(
        jnp.int32(1), [lambda y: y[:, :N], lambda y: y @ w, lambda y: (2 * y) @ w], x
    )


def constant_of_a_scan(w, x):
    def body(carry, one):
        return carry + jnp.sum(one @ w), jnp.tanh(one @ w)

    total, ys = jax.lax.scan(body, jnp.zeros(()), x, reverse=True)
    return ys + total


def constant_of_a_loop(w, x):
    # a fixed number of steps, so that the loop has a gradient
    return jax.lax.fori_loop(0, 3, lambda i, y: y.at[:, :N].add(jnp.tanh(y @ w)), x)


@jax.custom_jvp
def doubled(x):
    return 2 * x


doubled.defjvp(lambda primals, tangents: (doubled(*primals), 3 * tangents[0]))


@jax.custom_vjp
def tripled(x):
    return 3 * x


tripled.defvjp(lambda x: (3 * x, None), lambda _, g: (5 * g,))

PRODUCTS = {
    "x @ w": lambda w, x: x @ w,
    "w first": lambda w, x: (w.T @ x.T).T,
    "einsum": lambda w, x: jnp.einsum("bk,kn->nb", x, w),
    "einsum, w first": lambda w, x: jnp.einsum("kn,bk->bn", w, x),
    "three axes of x": lambda w, x: jnp.einsum("abk,kn->anb", x.reshape(5, 1, K), w),
    "one row": lambda w, x: x[0] @ w,
    "no row": lambda w, x: (x[:0] @ w).sum() + x @ w,
    "jit": lambda w, x: jax.jit(lambda w, x: jax.jit(jnp.matmul)(x, w))(w, x),
    "checkpoint": checkpointed,
    "checkpoint of w": lambda w, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w.astype(x.dtype)))(
        w, x
    ),
    "cond": branched,
    "switch": switched,
    "scan": constant_of_a_scan,
    "fori_loop": constant_of_a_loop,
    "vmap of x": lambda w, x: jax.vmap(lambda one: one @ w)(x),
    "vmap of x over columns": lambda w, x: jax.vmap(lambda one: w.T @ one, out_axes=1)(x),
    "custom_jvp of x": lambda w, x: doubled(doubled(x) @ w),
    "custom_vjp of x": lambda w, x: tripled(tripled(x) @ w),
    "twice": lambda w, x: jnp.tanh(x @ w) @ jnp.ones((N, K)) @ w,
    "precision": lambda w, x: jnp.matmul(x, w, precision="highest"),
}


@pytest.mark.parametrize(
    ("name", "kind"), mostly_slow(few(PRODUCTS, ["x @ w"]), *few(["x @ w"], ["x @ w"]))
)
def test_products_leave_the_weight_as_it_is(make_kernel, kind, name):
    check(make_kernel((K, N), **KINDS[kind]), PRODUCTS[name])


EINSUMS = {
    "ebk,ekn->ebn": ((E, K, N), Axes((0,), (1,), (2,)), (E, 5, K)),
    "ekn,bek->bne": ((E, K, N), Axes((0,), (1,), (2,)), (5, E, K)),
    "bek,nek->nbe": ((N, E, K), Axes((1,), (2,), (0,)), (5, E, K)),
    "bmk,knm->bn": ((K, N, M), Axes((), (0, 2), (1,)), (5, M, K)),
    "efbk,fekn->febn": ((M, E, K, N), Axes((0, 1), (2,), (3,)), (E, M, 4, K)),
    "ebk,enkm->benm": ((E, N, K, M), Axes((0,), (2,), (1, 3)), (E, 5, K)),
    "feb,nefm->bfmn": ((N, E, M, 4), Axes((2,), (1,), (0, 3)), (M, E, 5)),
}


@pytest.mark.parametrize(("equation", "kind"), mostly_slow(few(EINSUMS), few(EINSUMS)[0]))
def test_einsums_of_any_axes(make_kernel, kind, equation):
    shape, axes, x = EINSUMS[equation]
    made = make_kernel(shape, axes, **KINDS[kind])
    w_first = equation.split("->")[0].split(",")[0].startswith("ekn")

    def function(w, x):
        return jnp.einsum(equation, *((w, x) if w_first else (x, w)))

    check(made, function, draw(*x))


@pytest.mark.parametrize("kind", ["4 bits, lora", "array, dora"])
@pytest.mark.parametrize(
    ("x_dtype", "wide"), [("bfloat16", True), ("bfloat16", False), ("float16", 0)]
)
def test_products_in_16_bits_are_products(make_kernel, kind, x_dtype, wide):
    """Checks also sums in float32, if the caller asks for them (`wide`)."""
    made = make_kernel((K, N), dtype="bfloat16", **KINDS[kind])

    def function(w, x):
        preferred = jnp.float32 if wide else x.dtype
        return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=preferred)

    check(made, function, X.astype(x_dtype), tolerance=2e-2)


def test_a_wide_sum_is_not_rounded_on_the_way(make_kernel):
    made = make_kernel((K, N))
    x = X.astype(jnp.bfloat16)
    f = lambda ws, x: jnp.matmul(x, ws["w"].astype(x.dtype), preferred_element_type="float32")  # noqa: E731
    wide = run(f, {"w": made.kernel}, (x,))
    exact = x.astype(jnp.float32) @ made.whole({})
    # allows weights rounded to bfloat16; sums in bfloat16 alone would be off by a relative 2e-3
    assert np.abs(wide - exact).mean() < 1e-3 * np.abs(exact).mean()


STACKED = {
    "scan": lambda w, x: jax.lax.scan(lambda y, w: (y.at[:, :N].add(jnp.tanh(y @ w)), y), x, w)[0],
    "reversed": lambda w, x: jax.lax.scan(
        lambda y, w: (y.at[:, :N].add(jnp.tanh(y @ w)), y[0]), x, w, reverse=True, unroll=2
    )[1],
    "with other inputs": lambda w, x: jax.lax.scan(
        lambda y, wi: (y.at[:, :N].add(jnp.tanh(y @ wi[0]) * wi[1]), None),
        x,
        (w, jnp.arange(4.0)),
    )[0],
    "checkpointed": lambda w, x: jax.lax.scan(
        jax.checkpoint(lambda y, w: (y.at[:, :N].add(jnp.tanh(y @ w)), None)), x, w
    )[0],
    "cast before": lambda w, x: jax.lax.scan(
        lambda y, w: (y.at[:, :N].add(jnp.tanh(y @ w)), None), x, w.astype(jnp.float32)
    )[0],
}


@pytest.mark.parametrize(
    ("name", "kind"), mostly_slow(few(STACKED, ["scan"]), ("scan", "4 bits, lora"))
)
def test_a_stack_that_is_scanned(make_kernel, kind, name):
    check(make_kernel((K, N), stack=(4,), **KINDS[kind]), STACKED[name], tolerance=5e-5)


def test_a_stack_of_stacks(make_kernel):
    made = make_kernel((K, N), stack=(2, 3), **KINDS["4 bits, lora"])

    def inner(y, w):
        return y.at[:, :N].add(jnp.tanh(y @ w)), None

    check(made, lambda w, x: jax.lax.scan(lambda y, w: jax.lax.scan(inner, y, w), x, w)[0])


def test_a_stack_of_experts(make_kernel):
    made = make_kernel((E, K, N), Axes((0,), (1,), (2,)), stack=(2,), **KINDS["4 bits, dora"])

    def layer(y, w):
        return y.at[:, :, :N].add(jnp.einsum("ebk,ekn->ebn", y, w)), None

    check(made, lambda w, x: jax.lax.scan(layer, x, w)[0], draw(E, 2, K))


WHILES = {
    "while": lambda w, x: jax.lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(s[1] @ w) @ w.T), (0, x)
    )[1],
    "tested by a product": lambda w, x: jax.lax.while_loop(
        lambda y: jnp.abs(y @ w).max() > 1, lambda y: y / 2, x
    ),
}


@pytest.mark.parametrize("name", mostly_slow(WHILES))
def test_while_loops(make_kernel, name):
    """Compares the forward pass only: JAX has no reverse gradient of a while loop."""
    made, uses = make_kernel((K, N), quantized=True, variant="lora"), []
    function = WHILES[name]
    y = run(lambda ws, x: function(ws["w"], x), {"w": made.kernel}, (X,), uses)
    near(y, function(made.whole(made.trained), X), 2e-5)
    assert uses[0] == Use("w", "product", "dot_general")


DECODED = {
    "w * 2": lambda w, x: x @ (w * 2),
    "sum": lambda w, x: x * w.sum(),
    "first row": lambda w, x: x[:, :N] * w[0],
    "returned": lambda w, x: w,
    "a custom_jvp of it": lambda w, x: x @ jax.nn.relu(w),
    "its own rule": lambda w, x: x @ tripled(w),
    "contracted over other axes": lambda w, x: x[:, :N] @ w.T,
    "a product with itself": lambda w, x: x @ (w @ w.T),
    "reshaped": lambda w, x: x @ w.reshape(K, 2, N // 2).reshape(K, N),
    "carried": lambda w, x: jax.lax.scan(lambda w, y: (w + 1, y @ w), w, x)[1],
    "scanned by rows": lambda w, x: jax.lax.scan(lambda y, row: (y + row, row), x[0, :N], w)[0],
    "returned by a branch": lambda w, x: x @ jax.lax.cond(x[0, 0] > 0, lambda w: w, jnp.exp, w),
    "integers": lambda w, x: jnp.ones((2, K), int) @ w,
}


@pytest.mark.parametrize(
    ("name", "kind"), mostly_slow(few(DECODED), few(DECODED)[0], few(DECODED)[1])
)
def test_what_needs_the_whole_weight_gets_it(make_kernel, kind, name):
    check(make_kernel((K, N), **KINDS[kind]), DECODED[name], kinds={"decoded"})


def test_both_uses_are_told(make_kernel):
    made, uses = make_kernel((K, N)), []
    run(lambda ws, x: x @ ws["w"] + jnp.sum(ws["w"] * 2), {"w": made.kernel}, (X,), uses)
    assert uses == [Use("w", "product", "dot_general"), Use("w", "decoded", "mul")]


INDEX = jnp.asarray([[0, 3, 3], [23, 1, 0]])
OUT = jnp.asarray([[0, -1, -24], [24, 100, -25]])
LOOKUPS = {
    "take": lambda w, i: jnp.nan_to_num(jnp.take(w, i, axis=0)),
    "clip": lambda w, i: jnp.take(w, i, axis=0, mode="clip"),
    "fill": lambda w, i: jnp.take(w, i, axis=0, mode="fill", fill_value=7),
    "wrap": lambda w, i: jnp.take(w, i, axis=0, mode="wrap"),
    "index": lambda w, i: w[i],
    "at": lambda w, i: w.at[i].get(mode="fill", fill_value=-3),
    "at, from the start": lambda w, i: w.at[i].get(mode="clip", wrap_negative_indices=False),
    "small integers": lambda w, i: w[jnp.clip(i, 0, 23).astype(jnp.uint8)],
    "vmap": lambda w, i: jax.vmap(lambda i: w[i])(i),
    "jit": lambda w, i: jax.jit(lambda w, i: w[i])(w, i),
    "then a product": lambda w, i: jnp.nan_to_num(jnp.take(w, i, axis=0)) @ w.T,
}
PROMISED = {"index", "vmap", "jit"}
"""Lookups for which JAX does not define the gradient of rows out of range."""


@pytest.mark.parametrize("index", [INDEX, OUT], ids=["inside", "outside"])
@pytest.mark.parametrize(
    ("name", "kind"),
    mostly_slow(
        [
            *((name, "4 bits, lora") for name in LOOKUPS),
            ("fill", "4 bits"),
            ("fill", "array, lora"),
        ],
        ("fill", "4 bits"),
        ("fill", "array, lora"),
    ),
)
def test_rows_of_a_table(make_kernel, kind, index, name):
    if index is OUT and name in PROMISED:
        return
    kinds = {"rows", "product"} if name == "then a product" else {"rows"}
    check(make_kernel((N, K), TABLE, **KINDS[kind]), LOOKUPS[name], index, kinds)


def test_a_row_out_of_range_is_nan_as_jax_has_it(make_kernel):
    made = make_kernel((N, K), TABLE, quantized=True, variant="lora")
    y = run(lambda ws, i: jnp.take(ws["w"], i, axis=0), {"w": made.kernel}, (OUT,))
    expected = jnp.take(made.whole(made.trained), OUT, axis=0)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    assert np.isnan(y).any()


def test_no_row_at_all(make_kernel):
    made = make_kernel((N, K), TABLE, quantized=True, variant="lora")
    y = run(lambda ws, i: ws["w"][i], {"w": made.kernel}, (INDEX[:0],))
    assert y.shape == (0, 3, K)


@pytest.mark.parametrize(
    ("function", "x", "kind", "axes"),
    [
        (lambda w, x: x @ w, X, "product", MATRIX),
        (lambda w, x: jnp.einsum("kn,bk->bn", w, x), X, "product", MATRIX),
        (lambda w, x: x[:, :N] @ w.T, X, "product", TABLE),
        (lambda w, x: w[x], INDEX, "rows", TABLE),
        (lambda w, x: w * 2, X, "decoded", None),
    ],
)
def test_axes_are_found(function, x, kind, axes):
    uses = []
    run(lambda ws, x: function(ws["w"], x), {"w": of_array(draw(K, N), None)}, (x,), uses)
    assert [(use.kind, use.axes) for use in uses] == [(kind, axes)]


def test_axes_of_one_layer_of_a_stack_are_found():
    uses = []
    stack = of_array(draw(3, K, N), None)
    function = lambda ws, x: STACKED["scan"](ws["w"], x)  # noqa: E731
    y = run(function, {"w": stack}, (X,), uses)
    assert set(uses) == {Use("w", "product", "dot_general", MATRIX)}
    near(y, STACKED["scan"](stack.value, X), 1e-5)


def test_two_weights_and_pytrees(make_kernel):
    made = make_kernel((K, N), quantized=True, variant="lora")
    ws = {"b": made.kernel, "a": make_kernel((N, K)).kernel}
    tree = {"x": X, "more": (jnp.ones(N), [])}
    y = run(lambda ws, t: {"y": [(t["x"] @ ws["b"] + t["more"][0]) @ ws["a"], None]}, ws, (tree,))
    w, other = made.whole(made.trained), make_kernel((N, K)).whole({})
    near(y["y"][0], (X @ w + 1) @ other, 2e-5)
    assert y["y"][1] is None

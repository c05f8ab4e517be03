"""Linen modules with kernels in their params, against the same modules with plain weights."""

import functools
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from selection import mostly_slow

import qlora_jax as qj
from qlora_jax.modules.axes import from_matrices, to_matrices
from qlora_jax.modules.kernel import Kernel
from qlora_jax.modules.linen.params import kernels_of, replaced

# the random numbers of this kind of key take a tenth of the time to compile
key = functools.partial(jax.random.key, impl="unsafe_rbg")
D = 32
X = jax.random.normal(key(1), (2, 3, D))
TOKENS = jnp.array([[1, 5, 2], [10, 0, 1]])
DROPOUT = {"dropout": key(2)}

# ".*" also matches the biases of a stack: they have two axes, but no product
pytestmark = pytest.mark.filterwarnings("ignore:where matches weights that no product")


class Einsum(nn.Module):
    """An einsum in the style of gemma: the caller passes the equation."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        w = self.param("w", nn.initializers.normal(0.2), self.shape)
        return jnp.einsum(equation, x, w)


class Gemma(nn.Module):
    @nn.compact
    def __call__(self, x):
        q = Einsum((4, D, 8), name="q")("BTD,NDH->BTNH", x)
        k, v = Einsum((2, 4, D, 8), name="kv")("BSD,CKDH->CBSKH", x)
        scores = jax.nn.softmax(jnp.einsum("BTNH,BSNH->BNTS", q, k))
        read = jnp.einsum("BNTS,BSNH->BTNH", scores, v)
        return Einsum((4, 8, D), name="out")("BTNH,NHD->BTD", read)


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(0.2), (3, D, 8))
        return jnp.einsum("btd,edh->ebth", x, w)


class PerExpert(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(0.2), (2, D, 8))
        return jnp.einsum("etd,edh->eth", x, w)


class Tied(nn.Module):
    def setup(self):
        self.embed = nn.Embed(11, D)
        self.dense = nn.Dense(D)

    def __call__(self, tokens):
        return self.embed.attend(self.encode(tokens))

    def encode(self, tokens):
        return jnp.tanh(self.dense(self.embed(tokens)))


class Layer(nn.Module):
    """Two dense layers, the body of an `nn.scan`."""

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(D, name="down")(jnp.tanh(nn.Dense(64, name="up")(x))), None


class Stack(nn.Module):
    transform: Any = lambda layer: layer

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            self.transform(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return stack(name="layers")(x, None)[0]


class Transformed(nn.Module):
    transform: Any

    @nn.compact
    def __call__(self, x):
        return self.transform(Layer)(name="layer")(x)[0]


class Ensemble(nn.Module):
    @nn.compact
    def __call__(self, x):
        vmapped = nn.vmap(
            nn.Dense,
            in_axes=None,
            axis_size=3,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        return vmapped(8, name="dense")(x)


class Convolved(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.Conv(D, (3,))(x))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        h = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(64)(x))
        h = nn.Dropout(0.5, deterministic=not train)(h)
        return nn.Dense(8)(h)


class Inner(nn.Module):
    """Has a weight, a submodule, a counter, random noise and a sown intermediate."""

    @nn.compact
    def __call__(self, x, times=1, scaled=False):
        w = self.param("w", nn.initializers.normal(0.2), (D, D))
        count = self.variable("state", "count", lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing():
            count.value += times
        h = nn.Dropout(0.5, deterministic=False)(x @ w)
        h += jax.random.normal(self.make_rng("dropout"), h.shape)
        self.sow("intermediates", "h", h)
        return nn.Dense(D)(h) * (0.5 if scaled else 1.0)


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        inner = Inner()
        return inner(inner(x), times=2, scaled=True)


class Holder(nn.Module):
    """Keeps its weight as an attribute that other modules read."""

    def setup(self):
        self.table = self.param("table", nn.initializers.normal(0.2), (8, D))
        self.dense = nn.Dense(D)

    def __call__(self, x):
        return self.dense(x) @ self.table.T


class Reader(nn.Module):
    """Has a weight, and calls another module that it holds as an attribute."""

    holder: Any

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(0.2), (8, D))
        return self.holder(self.holder(x) @ w)


class Reads(nn.Module):
    def setup(self):
        self.holder = Holder()
        self.reader = Reader(self.holder)

    def __call__(self, x):
        return self.reader(x) + self.holder.dense(x) @ self.holder.table.T


class Case(NamedTuple):
    """A module, the arguments of a call, and further arguments of `module.apply`."""

    module: nn.Module
    args: tuple[Any, ...] = (X,)
    more: Any = MappingProxyType({})
    kernels: int = 1


def boxed():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    return nn.Dense(8, kernel_init=init)


CASES = {
    "dense": Case(nn.Dense(8)),
    "general": Case(nn.DenseGeneral((4, 2), axis=(-2, -1)), (X,)),
    "batched": Case(nn.DenseGeneral((4,), axis=-1, batch_dims=(0,)), (X,)),
    "einsum": Case(nn.Einsum((D, 2, 4), "btd,dnh->btnh")),
    "attention": Case(nn.MultiHeadDotProductAttention(4), (X, X), kernels=4),
    "tied": Case(Tied(), (TOKENS,), kernels=2),
    "encode": Case(Tied(), (TOKENS,), {"method": "encode"}, kernels=2),
    "conv": Case(Convolved()),
    "scan": Case(Stack(), kernels=2),
    "scan of remat": Case(Stack(nn.remat), kernels=2),
    "remat": Case(Transformed(nn.remat), kernels=2),
    "jit": Case(Transformed(nn.jit), kernels=2),
    "vmap": Case(Ensemble()),
    "lstm": Case(nn.RNN(nn.LSTMCell(8)), kernels=8),
    "norm and dropout": Case(Normed(), (X,), {"mutable": ["batch_stats"], "rngs": DROPOUT}, 2),
    "evaluated": Case(Normed(), (X,), {"train": False}, 2),
    "writes": Case(Outer(), (X,), {"mutable": ["state", "intermediates"], "rngs": DROPOUT}, 2),
    "reads": Case(Reads(), (X,), kernels=3),
    "gemma": Case(Gemma(), kernels=3),
    "experts": Case(Experts()),
    "per expert": Case(PerExpert()),
    "boxed": Case(boxed()),
    "half": Case(nn.Dense(8, dtype="bfloat16", param_dtype="bfloat16")),
}


@functools.cache
def initial(name):
    """Returns the variables of a case: its params, and all other collections."""
    case = CASES[name]
    keys = {"params": key(0), **DROPOUT}
    shapes = dict(jax.eval_shape(case.module.init, keys, *case.args))
    shapes.pop("intermediates", None)
    random = np.random.default_rng(4)
    draw = lambda x: jnp.asarray(0.2 * random.normal(size=x.shape), x.dtype)  # noqa: E731
    params = jax.tree.map(draw, shapes.pop("params"))
    return params, jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)


def call(name, params):
    case, others = CASES[name], initial(name)[1]
    return qj.linen.apply(case.module, params, *case.args, variables=others, **case.more)


def base(name, params):
    case, others = CASES[name], initial(name)[1]
    return case.module.apply({"params": params, **others}, *case.args, **case.more)


def with_adapters(name, quantized):
    """Returns the params of a case with fresh adapters on every weight."""
    case, (params, others) = CASES[name], initial(name)
    more = {k: v for k, v in case.more.items() if k != "mutable"}
    axes = qj.linen.discover(case.module, params, *case.args, variables=others, **more)

    if quantized:
        params = qj.linen.quantize(case.module, params, ".*", axes=axes, embeddings=True)
    settings = {"rank": 2, "alpha": 3, "key": key(3)}
    return qj.linen.add_lora(case.module, params, ".*", axes=axes, **settings)


def decoded(name, params):
    case, others = CASES[name], initial(name)[1]
    more = {"variables": others, **case.more}
    return qj.linen.summary(case.module, params, *case.args, **more).decoded


def filled(params):
    """Returns the params with random values of A and B."""
    random = np.random.default_rng(5)
    trained, frozen = qj.linen.split(params)
    values = {k: jnp.float32(0.2 * random.normal(size=x.shape)) for k, x in trained.items()}
    return qj.linen.join(values, frozen)


def whole(params, trained):
    """Returns the params as plain arrays W + s * A @ B: the reference, a function of A and B."""

    def one(path, kernel):
        if not isinstance(kernel, Kernel):
            return kernel
        a, b = trained[f"{path}.default.a"], trained[f"{path}.default.b"]
        scale = kernel.adapters["default"].scale.get_value()[..., None, None]
        plain = to_matrices(kernel.plain(), kernel.axes)
        whole = from_matrices(plain + scale * (a @ b), kernel.axes, kernel.shape)
        return whole.astype(kernel.dtype)

    return replaced(params, one)


def total(out):
    """Sums all floats of a result, each times a different factor."""
    floats = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)) for x in floats)


def near(a, b, tolerance):
    """Asserts that arrays differ by at most `tolerance` times the largest expected magnitude."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.float32(x), np.float32(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * abs(y).max())


OFTEN = ("scan",)
# run without jit: with adapters XLA fuses other operations and would add in another order
UNFUSED = ("norm and dropout", "reads")


@pytest.mark.parametrize("name", mostly_slow(CASES, *OFTEN))
def test_fresh_adapters_change_no_bit(name):
    params, fresh = initial(name)[0], with_adapters(name, quantized=False)
    compiled = (lambda function: function) if name in UNFUSED else jax.jit
    expected = compiled(functools.partial(base, name))(params)
    out = compiled(functools.partial(call, name))(fresh)
    jax.tree.map(np.testing.assert_array_equal, out, expected)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "quantized"),
    mostly_slow(
        [
            *((name, True) for name in CASES),
            *((name, False) for name in ("tied", "scan", "batched")),
        ],
        *((name, True) for name in OFTEN),
    ),
)
def test_results_and_gradients_are_those_of_whole_weights(name, quantized):
    params = filled(with_adapters(name, quantized))
    assert len(kernels_of(params)) == CASES[name].kernels
    assert decoded(name, params) == {}
    trained, frozen = qj.linen.split(params)

    def ours(trained):
        out = call(name, qj.linen.join(trained, frozen))
        return total(out), out

    def plain(trained):
        out = base(name, whole(params, trained))
        return total(out), out

    (_, out), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(trained)
    (_, expected), expected_grads = jax.jit(jax.value_and_grad(plain, has_aux=True))(trained)
    assert jax.tree.structure(out) == jax.tree.structure(expected)
    tolerance = 2**-5 if name == "half" else 2**-19
    near(out, expected, tolerance)
    near(grads, expected_grads, 2 * tolerance)
    near(jax.jit(functools.partial(base, name))(qj.linen.merge(params)), expected, tolerance)

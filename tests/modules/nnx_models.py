"""Small NNX models of every kind that the tests quantize and adapt."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

D, H = 32, 2
"""Size of the last axis of an input; number of heads."""


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Case(NamedTuple):
    """A model and a call of it.

    Attributes:
      make: makes the model from `nnx.Rngs`.
      call: function that calls the model, its only argument, and returns a pytree.
      where: patterns of the weights to adapt.
      embeddings: whether embedding tables are among these weights.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    call: Callable[[Any], Any]
    where: Any = r".*(kernel|embedding|w)"
    embeddings: bool = False


X = draw(3, 5, D)
TOKENS = jnp.asarray([[1, 2, 2], [0, 9, 4]])


class Tied(nnx.Module):
    """An embedding whose table is also the head."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(10, D, rngs=rngs)
        self.hidden = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(jnp.tanh(self.hidden(self.embed(tokens))))


class Attend(nnx.Module):
    def __init__(self, rngs, **settings):
        self.attention = nnx.MultiHeadAttention(H, D, rngs=rngs, **settings)

    def __call__(self, x, other=None):
        return self.attention(x, other)

    def decode(self, x):
        self.attention.init_cache((x.shape[0], x.shape[1], D))
        return jnp.stack([self.attention(x[:, i : i + 1]) for i in range(x.shape[1])])


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, 2 * D, rngs=rngs)
        self.down = nnx.Linear(2 * D, D, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


class Remat(Block):
    @nnx.remat
    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


class Jitted(Block):
    @nnx.jit
    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


class Layers(nnx.Module):
    def __init__(self, rngs, block=Block):
        self.layers = nnx.List([block(rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Scanned(nnx.Module):
    """A stack of layers that nnx.scan calls one after the other."""

    def __init__(self, rngs, block=Block):
        made = nnx.split_rngs(splits=3)(nnx.vmap(block, in_axes=(0,), out_axes=0))
        self.layers = made(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, layer):
            return layer(x)

        return through(x, self.layers)


class Ensemble(Scanned):
    def __call__(self, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, x)


class Twice(nnx.Module):
    """One module under two attributes; both are called."""

    def __init__(self, rngs):
        self.first = nnx.Linear(D, D, rngs=rngs)
        self.second = self.first

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class OneVariable(nnx.Module):
    """Two modules that share one variable."""

    def __init__(self, rngs):
        self.first = nnx.Linear(D, D, rngs=rngs)
        self.second = nnx.Linear(D, D, rngs=rngs)
        self.second.kernel = self.first.kernel

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class Einsum(nnx.Module):
    """A custom module with an einsum equation and a weight, in the style of tunix."""

    def __init__(self, einsum_str, shape, rngs):
        self.einsum_str, self.shape = einsum_str, shape
        self.w = nnx.Param(0.1 * jax.random.normal(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


class Tunix(nnx.Module):
    def __init__(self, rngs):
        self.q = Einsum("BTD,NDH->BTNH", (H, D, 8), rngs)
        self.o = Einsum("BTNH,NHD->BTD", (H, 8, D), rngs)

    def __call__(self, x):
        return self.o(jnp.tanh(self.q(x)))


class Experts(nnx.Module):
    """Bare parameters with an axis of experts; only `discover` can find their axes."""

    def __init__(self, rngs):
        self.router = nnx.Linear(D, 3, rngs=rngs)
        self.w_up = nnx.Param(0.1 * jax.random.normal(rngs.params(), (3, D, 16)))
        self.w_down = nnx.Param(0.1 * jax.random.normal(rngs.params(), (3, 16, D)))

    def __call__(self, x):
        gates = jax.nn.softmax(self.router(x))
        up = jax.nn.silu(jnp.einsum("btd,edf->btef", x, self.w_up[...]))
        return jnp.einsum("btef,efd,bte->btd", up, self.w_down[...], gates)


class Looped(nnx.Module):
    """A module whose method scans over the stacked parameters of the module."""

    def __init__(self, rngs):
        self.w = nnx.Param(0.2 * jax.random.normal(rngs.params(), (3, D, D)))
        self.b = nnx.Param(0.2 * jax.random.normal(rngs.params(), (3, D)))

    def __call__(self, x):
        def body(x, layer):
            w, b = layer
            return jnp.tanh(x @ w + b), jnp.sum(x)

        return jax.lax.scan(body, x, (self.w[...], self.b[...]))


class Busy(nnx.Module):
    """A bare kernel beside everything that a call can change: statistics, keys, counters."""

    def __init__(self, rngs):
        self.w = nnx.Param(0.2 * jax.random.normal(rngs.params(), (D, D)))
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.calls = 0

    def __call__(self, x):
        self.count[...] += 1
        y = self.norm(x @ self.w[...])
        self.sow(nnx.Intermediate, "hidden", y.mean())
        return self.drop(y)


class Pair(NamedTuple):
    left: Any
    right: Any


class Gelu:
    """A callable object: as a class attribute it does not become a method, unlike a function."""

    def __call__(self, x):
        return jax.nn.gelu(x)


class Structured(nnx.Module):
    """A module whose methods take and return arguments of all kinds."""

    act = Gelu()

    def __init__(self, rngs):
        self.w = nnx.Param(0.2 * jax.random.normal(rngs.params(), (D, D)))
        self.out = nnx.Linear(D, D, rngs=rngs)

    def encode(self, inputs, *, scale=1.0, name="none", rngs=None, skip=False):
        y = self.act(inputs["x"] @ self.w[...]) * scale
        if rngs is not None:
            y = y + jax.random.normal(rngs.noise(), y.shape)
        return Pair(y if skip else self.out(y), {"name": name, "n": y.shape[0], "more": None})

    def __call__(self, inputs):
        first = self.encode(inputs, name="first", rngs=nnx.Rngs(noise=3))
        return self.encode({"x": first.left}, scale=2, skip=True)


class Mixin:
    """A class with a method that reads `self.kernel`, although the class is no module."""

    def doubled(self, x):
        return 2 * (x @ self.kernel[...])


class Mixed(Mixin, nnx.Linear):
    def __call__(self, x):
        return self.doubled(x)


class Outside(nnx.Module):
    """A module that multiplies its input by the kernel of another module."""

    def __init__(self, rngs):
        self.inner = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        return x @ self.inner.kernel[...] + (x @ self.inner.kernel.T) * self.inner.kernel.sum()


def rnn(cell):
    return Case(lambda rngs: nnx.RNN(cell(D, 8, rngs=rngs)), lambda m: m(X), r".*kernel")


CASES = {
    "Linear": Case(lambda r: nnx.Linear(D, 8, rngs=r), lambda m: m(X)),
    "no bias": Case(lambda r: nnx.Linear(D, 8, use_bias=False, rngs=r), lambda m: m(X[0, 0])),
    "bfloat16": Case(
        lambda r: nnx.Linear(D, 8, rngs=r, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
        lambda m: m(X),
    ),
    "LinearGeneral": Case(
        lambda r: nnx.LinearGeneral((5, D), (4, 2), axis=(-2, -1), rngs=r), lambda m: m(X)
    ),
    "LinearGeneral, batch": Case(
        lambda r: nnx.LinearGeneral(D, (4, 2), batch_axis={0: 3}, rngs=r), lambda m: m(X)
    ),
    "Einsum": Case(
        lambda r: nnx.Einsum("abd,dhn->abhn", (D, 2, 4), (2, 4), rngs=r), lambda m: m(X)
    ),
    "Einsum, at the call": Case(
        lambda r: nnx.Einsum("abd,dn->abn", (D, 4), None, rngs=r), lambda m: m(X, "abd,dn->anb")
    ),
    "Embed": Case(lambda r: nnx.Embed(10, D, rngs=r), lambda m: m(TOKENS), embeddings=True),
    "Embed.attend": Case(lambda r: nnx.Embed(10, D, rngs=r), lambda m: m.attend(X), ".*", True),
    "Tied": Case(Tied, lambda m: m(TOKENS), embeddings=True),
    "MultiHeadAttention": Case(lambda r: Attend(r, decode=False), lambda m: m(X)),
    "cross attention": Case(
        lambda r: Attend(r, decode=False), lambda m: m(X, draw(3, 4, D, seed=2))
    ),
    "decoding": Case(lambda r: Attend(r, decode=True), lambda m: m.decode(X)),
    "LSTM": rnn(nnx.LSTMCell),
    "OptimizedLSTM": rnn(nnx.OptimizedLSTMCell),
    "GRU": rnn(nnx.GRUCell),
    "layers": Case(Layers, lambda m: m(X)),
    "remat": Case(lambda r: Layers(r, Remat), lambda m: m(X)),
    "inner jit": Case(lambda r: Layers(r, Jitted), lambda m: m(X)),
    "scan": Case(Scanned, lambda m: m(X)),
    "scan of remat": Case(lambda r: Scanned(r, Remat), lambda m: m(X)),
    "ensemble": Case(Ensemble, lambda m: m(X)),
    "twice": Case(Twice, lambda m: m(X)),
    "one variable": Case(OneVariable, lambda m: m(X)),
    "tunix": Case(Tunix, lambda m: m(X)),
    "experts": Case(Experts, lambda m: m(X), r"w_.*"),
    "looped": Case(Looped, lambda m: m(X), "w"),
    "structured": Case(Structured, lambda m: m({"x": X}), r"w|out\.kernel"),
    "mixin": Case(lambda r: Mixed(D, D, rngs=r), lambda m: m(X)),
    "vmap of the model": Case(Layers, lambda m: jax.vmap(m)(X)),
    "sequential": Case(
        lambda r: nnx.Sequential(nnx.Linear(D, 8, rngs=r), jnp.tanh, nnx.Linear(8, 4, rngs=r)),
        lambda m: m(X),
    ),
}

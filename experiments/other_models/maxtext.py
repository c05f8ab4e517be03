"""A small network of maxtext's layers (NNX)."""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.other_models.cases import HIDDEN, LENGTH, VOCABULARY, Case, drawn, tokens

HEADS, HEAD = 4, 16


class Layer(nnx.Module):
    """Attention and a gated MLP; every linear is maxtext's `DenseGeneral`."""

    def __init__(self, rngs: nnx.Rngs):
        from maxtext.layers.linears import DenseGeneral

        self.norm = nnx.RMSNorm(HIDDEN, rngs=rngs)
        self.query = DenseGeneral(HIDDEN, (HEADS, HEAD), rngs=rngs)
        self.key = DenseGeneral(HIDDEN, (HEADS, HEAD), rngs=rngs)
        self.value = DenseGeneral(HIDDEN, (HEADS, HEAD), use_bias=True, rngs=rngs)
        self.out = DenseGeneral((HEADS, HEAD), HIDDEN, axis=(-2, -1), rngs=rngs)
        self.wi = DenseGeneral(HIDDEN, (2, 128), rngs=rngs)
        self.wo = DenseGeneral(128, HIDDEN, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm(x)
        scores = jnp.einsum("btnh,bsnh->bnts", self.query(h), self.key(h)) / HEAD**0.5
        causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e30))
        x = x + self.out(jnp.einsum("bnts,bsnh->btnh", weights, self.value(h)))
        gates = self.wi(self.norm(x))
        return x + self.wo(jax.nn.silu(gates[:, :, 0]) * gates[:, :, 1])


class Network(nnx.Module):
    """Two layers between an embedding and a head."""

    def __init__(self, rngs: nnx.Rngs):
        from maxtext.layers.linears import DenseGeneral

        self.embed = nnx.Embed(VOCABULARY, HIDDEN, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(2)])
        self.head = DenseGeneral(HIDDEN, VOCABULARY, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


CASES = (
    Case(
        "maxtext DenseGeneral",
        "maxtext",
        lambda seed: drawn(Network(nnx.Rngs(seed)), seed),
        lambda: (tokens(),),
        lambda result: result,
        r"layers\.\d+\.\w+\.kernel",
        r"layers\.\d+\.(query|value)\.kernel",
    ),
)

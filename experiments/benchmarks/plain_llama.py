"""A Llama made of flax's own layers, without code of this project: a model for benchmarks."""

import jax
import jax.numpy as jnp
from flax import nnx

Shape = tuple[int, int, int, int, int, int]

SHAPES: dict[str, Shape] = {
    "tiny": (2, 256, 4, 2, 768, 1000),
    "135m": (30, 576, 9, 3, 1536, 49152),
    "1.1b": (22, 2048, 32, 4, 5632, 32000),
}
"""Name to (layers, hidden size, heads, KV heads, MLP size, vocabulary size)."""


class Attention(nnx.Module):
    """Grouped-query attention with RoPE."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, rngs: nnx.Rngs):
        self.heads, self.kv_heads, self.size = heads, kv_heads, hidden // heads
        kv = kv_heads * self.size
        self.query, self.out = linear(hidden, hidden, rngs), linear(hidden, hidden, rngs)
        self.key, self.value = linear(hidden, kv, rngs), linear(hidden, kv, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        rows, length, _ = x.shape
        q = self.query(x).reshape(rows, length, self.heads, self.size)
        k = self.key(x).reshape(rows, length, self.kv_heads, self.size)
        v = self.value(x).reshape(rows, length, self.kv_heads, self.size)
        y = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        return self.out(y.reshape(rows, length, -1))


class Layer(nnx.Module):
    """One layer: attention and a gated MLP, each after a norm and with a residual."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, inner: int, rngs: nnx.Rngs):
        self.attn = Attention(hidden, heads, kv_heads, rngs)
        self.gate, self.up = linear(hidden, inner, rngs), linear(hidden, inner, rngs)
        self.down = linear(inner, hidden, rngs)
        self.norms = nnx.List([norm(hidden, rngs), norm(hidden, rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norms[0](x))
        y = self.norms[1](x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class PlainLlama(nnx.Module):
    """The model, in bfloat16."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs):
        layers, hidden, heads, kv_heads, inner, tokens = shape
        self.embed = nnx.Embed(
            tokens, hidden, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs
        )
        self.layers = nnx.List([Layer(hidden, heads, kv_heads, inner, rngs) for _ in range(layers)])
        self.norm = norm(hidden, rngs)
        self.head = linear(hidden, tokens, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        inputs, outputs, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs
    )


def norm(size: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(size, dtype=jnp.bfloat16, rngs=rngs)


def rotated(x: jax.Array) -> jax.Array:
    """Rotates pairs of features by their positions (RoPE with base 10,000)."""
    half = x.shape[-1] // 2
    rate = 10_000.0 ** (-jnp.arange(half) / half)
    angle = (jnp.arange(x.shape[1])[:, None] * rate)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)

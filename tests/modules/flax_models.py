"""Small models in the style of other packages, for the tests of this folder."""

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.modules.nnx_model import all_adapters


class Block(nnx.Module):
    """Attention and an MLP, made of flax's layers."""

    def __init__(self, features: int, rngs: nnx.Rngs):
        self.attn = nnx.MultiHeadAttention(
            num_heads=2, in_features=features, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(features, 2 * features, rngs=rngs)
        self.down = nnx.Linear(2 * features, features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(x)
        return x + self.down(jax.nn.gelu(self.up(x)))


class Language(nnx.Module):
    """A language model with a list of blocks and a tied head."""

    def __init__(self, features: int = 64, layers: int = 2, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(50, features, rngs=rngs)
        self.blocks = nnx.List([Block(features, rngs) for _ in range(layers)])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(x)


TOKENS = jnp.arange(12).reshape(2, 6)


def language(seed: int = 0, **sizes: int) -> Language:
    """Returns a small language model."""
    return Language(**sizes, rngs=nnx.Rngs(seed))


def trained(model: nnx.Module, seed: int = 0) -> nnx.Module:
    """Fills B of every adapter with random values, in place, and returns the model."""
    for i, (_, _, adapter) in enumerate(all_adapters(model)):
        b = adapter.b.get_value()
        key = jax.random.fold_in(jax.random.key(seed), i)
        adapter.b.set_value(0.1 * jax.random.normal(key, b.shape).astype(b.dtype))
    return model

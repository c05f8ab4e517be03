"""Stores Adam's moments between updates in float32, bfloat16 or 8 bits.

An update decodes the moments, computes in float32 and encodes the results. The stored form of an
array depends only on its values and the count of updates. So any part of a tree can be updated
alone, and a resumed run computes the same moments as a run without interruption.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qlora_jax.quant.dynamic8 import Dynamic8, decode8, encode8

MIN_8BIT_SIZE = 4096
"""Smallest number of elements of an array stored in 8 bits; the value of bitsandbytes."""


def stored(adam: optax.GradientTransformation, moments: str) -> optax.GradientTransformation:
    """Returns the transformation `adam` with its moments stored in the format `moments`.

    Args:
      adam: `optax.scale_by_adam`; its state has count, mu and nu.
      moments: key of `ENCODERS`.
    """
    encoder = ENCODERS[moments]

    def pack(state: Any) -> Any:
        mu = jax.tree.map(lambda x: encoder(x, True, state.count), state.mu)
        nu = jax.tree.map(lambda x: encoder(x, False, state.count), state.nu)
        return state._replace(mu=mu, nu=nu)

    def unpack(state: Any) -> Any:
        mu, nu = jax.tree.map(_wide, (state.mu, state.nu), is_leaf=_is_encoded)
        return state._replace(mu=mu, nu=nu)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, after = adam.update(grads, unpack(state), params)
        return updates, pack(after)

    return optax.GradientTransformation(lambda params: pack(adam.init(params)), update)


def dithered(x: jax.Array, step: jax.Array) -> jax.Array:
    """Rounds x to bfloat16 stochastically, so that the expected value is x.

    Rounding to nearest would lose every relative change below 1/512: a second moment with a decay
    of 0.999 would not decay at all. The random bits are a hash of `step` and the position, because
    jax.random takes many times longer on a CPU than the whole other update.

    Args:
      x: array to round, float32 of any shape.
      step: count of updates, integer scalar; the same step rounds equal arrays to equal results.
    """
    position = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
    chance = _hash(position ^ _hash(step.astype(jnp.uint32))) >> 16
    upper = (jax.lax.bitcast_convert_type(x, jnp.uint32) + chance) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def _block_wise(x: jax.Array, signed: bool, step: jax.Array) -> Any:
    return encode8(x, signed) if x.size >= MIN_8BIT_SIZE else x


ENCODERS: dict[str, Callable[[jax.Array, bool, jax.Array], Any]] = {
    "float32": lambda x, signed, step: x,
    "bfloat16": lambda x, signed, step: dithered(x, step),
    "int8": _block_wise,
}
"""Map from `optimizer.moments` to a function (float32 array, signed, updates) -> stored array."""


def _is_encoded(x: Any) -> bool:
    return isinstance(x, Dynamic8)


def _wide(x: Any) -> jax.Array:
    return decode8(x) if _is_encoded(x) else x.astype(jnp.float32)


def _hash(x: jax.Array) -> jax.Array:
    # finalizer of MurmurHash3: every bit of the result depends on every bit of x
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

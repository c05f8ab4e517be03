"""What is kept of Adam's moments between updates: float32, bfloat16 or 8 bits.

An update decodes them, computes in float32 and encodes the results. Each array is stored by
itself, from its values and the count of updates alone, so any part of a tree can be updated
without the rest, and a resumed run is the same run.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qlora_jax.quant.dynamic8 import Dynamic8, decode8, encode8

MIN_8BIT_SIZE = 4096
"""Elements from which an array is stored in 8 bits, as in bitsandbytes."""


def stored(adam: optax.GradientTransformation, moments: str) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, the moments of its state stored as `moments` says.

    Args:
      adam: the transformation; its state has count, mu and nu.
      moments: a key of `ENCODERS`.
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
    """Rounds to bfloat16, up or down by chance, so that the expected value is x.

    To the nearest, a change of less than 1/512 would be lost in every step anew: a second moment
    that decays by 0.999 would not decay at all. Chance is a hash of `step` and the position,
    since jax.random takes many times what all else in an update does on a CPU.

    Args:
      x: float32, any shape.
      step: integer scalar; equal steps round equal arrays alike.
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
"""Setting to what stores a float32 array, given whether it has a sign and the count of updates."""


def _is_encoded(x: Any) -> bool:
    return isinstance(x, Dynamic8)


def _wide(x: Any) -> jax.Array:
    return decode8(x) if _is_encoded(x) else x.astype(jnp.float32)


def _hash(x: jax.Array) -> jax.Array:
    # MurmurHash3's finalizer: every bit of the result depends on every bit of x.
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

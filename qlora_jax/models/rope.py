"""Rotary position embedding in Hugging Face's half-split convention."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.models.config import Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angle per position of each pair of channels, float32[head_dim / 2]."""
    base = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        base = base / rope.factor
    if rope.kind == "llama3":
        # Llama 3.1: long wavelengths are divided by the factor, short ones kept, a ramp between.
        turns = rope.original_positions * base / (2 * math.pi)
        ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        ramp = np.clip(ramp, 0, 1)
        base = base * (ramp + (1 - ramp) / rope.factor)
    return base.astype(np.float32)


def rotation(positions: jax.Array, rope: Rope, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32[B, T, 1, head_dim / 2], of int32 positions[B, T]."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies(rope, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x[B, T, heads, head_dim] in float32 and returns it in its dtype."""
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)

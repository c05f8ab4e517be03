"""Rotary position embedding in Hugging Face's half-split convention."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.models.config import DecoderConfig, Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angle per position of each pair of rotated channels, float32[rotated / 2]."""
    head_dim = int(head_dim * rope.fraction)
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


def by_layer(config: DecoderConfig) -> np.ndarray | None:
    """The frequencies of every layer, float32[L, rotated / 2], or None where all layers share them.

    A layer without rotation turns by zero.
    """
    if config.rope is None or not (config.local_rope or config.unrotated):
        return None
    rows = []
    for layer, window in enumerate(config.windows):
        rope = config.local_rope if config.local_rope and window else config.rope
        row = frequencies(rope, config.head_dim)
        rows.append(0 * row if layer in config.unrotated else row)
    return np.stack(rows)


def rotation(positions: jax.Array, rope: Rope, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32[B, T, 1, rotated / 2], of int32 positions[B, T]."""
    return turns(positions, frequencies(rope, head_dim))


def turns(positions: jax.Array, frequencies: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of positions times frequencies."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first channels of x[B, T, heads, head_dim] in float32; x's dtype."""
    rotated = 2 * cos.shape[-1]
    if rotated < x.shape[-1]:
        rest = x[..., rotated:]
        return jnp.concatenate([rotate(x[..., :rotated], cos, sin), rest], axis=-1)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)

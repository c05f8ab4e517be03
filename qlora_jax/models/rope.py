"""Rotary position embedding in Hugging Face's half-split convention."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.models.config import DecoderConfig, Rope

Frequencies = np.ndarray | jax.Array

Rotation = tuple[jax.Array, jax.Array]
"""Cosine and sine."""


def frequencies(rope: Rope, head_dim: int, lengths: jax.Array | None = None) -> Frequencies:
    """Angle per position of each pair of rotated channels.

    Args:
      rope: its kind and settings.
      head_dim: channels of a head.
      lengths: int32[B, T], the length of the sequence that each position is in; None: none is
        longer than `rope.original_positions`.

    Returns:
      float32[rotated / 2], or float32[B, T, 1, rotated / 2] where they depend on the lengths.
    """
    found = KINDS[rope.kind](rope, int(head_dim * rope.fraction), lengths)
    return found.astype(np.float32)


def _default(rope: Rope, rotated: int, lengths: jax.Array | None) -> Frequencies:
    return 1.0 / rope.theta ** (np.arange(0, rotated, 2, dtype=np.float64) / rotated)


def _linear(rope: Rope, rotated: int, lengths: jax.Array | None) -> Frequencies:
    return _default(rope, rotated, lengths) / rope.factor


def _llama3(rope: Rope, rotated: int, lengths: jax.Array | None) -> Frequencies:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, a ramp between."""
    base = _default(rope, rotated, lengths)
    turns = rope.original_positions * base / (2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = np.clip(ramp, 0, 1)
    return base * (ramp + (1 - ramp) / rope.factor)


def _yarn(rope: Rope, rotated: int, lengths: jax.Array | None) -> Frequencies:
    """YaRN (arXiv 2309.00071): the same with a ramp that is linear in the channel."""

    def pair(turns: float) -> float:
        """Where a pair of channels would make so many turns over the original positions."""
        ratio = rope.original_positions / (turns * 2 * math.pi)
        return rotated * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001  # as transformers does, for a step in the place of a ramp
    base = _default(rope, rotated, lengths)
    divided = np.clip((np.arange(rotated // 2) - low) / (high - low), 0, 1)
    return base * ((1 - divided) + divided / rope.factor)


def _dynamic(rope: Rope, rotated: int, lengths: jax.Array | None) -> Frequencies:
    """NTK-aware: theta grows with the sequence, so that the slowest frequency keeps its turns."""
    base = _default(rope, rotated, lengths)
    if lengths is None:
        return base
    original = rope.original_positions
    beyond = jnp.maximum(lengths - original, 0)[..., None, None].astype(jnp.float32)
    growth = 1 + rope.factor * beyond / original
    return base * growth ** -(np.arange(0, rotated, 2, dtype=np.float32) / (rotated - 2))


def _longrope(rope: Rope, rotated: int, lengths: jax.Array | None) -> Frequencies:
    """LongRoPE (arXiv 2402.13753): each frequency has a divisor, and another in long sequences."""
    base = _default(rope, rotated, lengths)
    short, long = base / np.array(rope.short), base / np.array(rope.long)
    if lengths is None:
        return short
    is_long = (lengths > rope.original_positions)[..., None, None]
    return jnp.where(is_long, long.astype(np.float32), short.astype(np.float32))


KINDS: Mapping[str, Callable[[Rope, int, jax.Array | None], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""Kind to its frequencies, of a rope, its rotated channels and the lengths of `frequencies`."""


def by_layer(config: DecoderConfig) -> tuple[tuple[Rope | None, ...], np.ndarray]:
    """The different ropes of a decoder, and the index of each layer's, int32[L].

    None is a layer without rotation.
    """
    local = config.local_rope or config.rope
    layers = [local if window else config.rope for window in config.windows]
    layers = [None if i in config.unrotated else rope for i, rope in enumerate(layers)]
    different = tuple(dict.fromkeys(layers))
    return different, np.array([different.index(rope) for rope in layers], np.int32)


def rotations(
    config: DecoderConfig, positions: jax.Array, lengths: jax.Array | None
) -> Rotation | None:
    """The rotations of all layers, each computed once.

    Args:
      config: shapes and switches.
      positions: int32[B, T].
      lengths: as in `frequencies`.

    Returns:
      Cosine and sine float32[B, T, 1, rotated / 2] where all layers share them, or None where none
      is rotated. Otherwise stacks of them with a leading axis, in the order of `by_layer`.
    """
    ropes, _ = by_layer(config)
    turned = [
        None if rope is None else rotation(positions, rope, config.head_dim, lengths)
        for rope in ropes
    ]
    if len(turned) == 1:
        return turned[0]
    shape = next(t[0].shape for t in turned if t is not None)
    still = jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    cos, sin = zip(*(still if t is None else t for t in turned))
    return jnp.stack(cos), jnp.stack(sin)


def rotation(
    positions: jax.Array, rope: Rope, head_dim: int, lengths: jax.Array | None = None
) -> Rotation:
    """Cosine and sine, float32[B, T, 1, rotated / 2], of int32 positions[B, T]."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies(rope, head_dim, lengths)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def segment_lengths(segments: jax.Array, positions: jax.Array) -> jax.Array:
    """The length of the segment that each position is in, int32[B, T].

    Args:
      segments: int32[B, T]; a segment's places are neighbours.
      positions: int32[B, T], from 0 in each segment.
    """
    starts = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    runs = jnp.cumsum(starts, axis=1)

    def one(positions: jax.Array, runs: jax.Array) -> jax.Array:
        last = jax.ops.segment_max(positions, runs, num_segments=len(runs))
        return last[runs] + 1

    return jax.vmap(one)(positions, runs)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first channels of x[B, T, heads, head_dim] in float32; x's dtype."""
    rotated = 2 * cos.shape[-1]
    if rotated < x.shape[-1]:
        rest = x[..., rotated:]
        return jnp.concatenate([rotate(x[..., :rotated], cos, sin), rest], axis=-1)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)

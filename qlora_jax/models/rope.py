"""Rotary position embedding, in the convention of Hugging Face.

Channel i of the first half of the rotated channels forms a pair with channel i of the second half.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.models.config import DecoderConfig, Rope

Frequencies = np.ndarray | jax.Array

Rotation = tuple[jax.Array, jax.Array]
"""Cosine and sine of the angles, each times the attention factor."""


def frequencies(rope: Rope, head_dim: int, lengths: jax.Array | None = None) -> Frequencies:
    """Returns the frequency (angle per position) of each pair of rotated channels.

    Args:
      rope: kind and settings of the rope.
      head_dim: number of channels of a head.
      lengths: length of the sequence that each position belongs to, int32[B, T]; None: no sequence
        is longer than `rope.original_positions`.

    Returns:
      float32[rotated / 2]; float32[B, T, 1, rotated / 2] if the frequencies depend on `lengths`.
    """
    found = KINDS[rope.kind](rope, int(head_dim * rope.fraction), lengths)
    return found.astype(np.float32)


def _default(rope: Rope, rotated: int, lengths: jax.Array | None) -> Frequencies:
    return 1.0 / rope.theta ** (np.arange(0, rotated, 2, dtype=np.float64) / rotated)


def _linear(rope: Rope, rotated: int, lengths: jax.Array | None) -> Frequencies:
    return _default(rope, rotated, lengths) / rope.factor


def _llama3(rope: Rope, rotated: int, lengths: jax.Array | None) -> Frequencies:
    """Returns Llama 3.1's frequencies: low ones are divided by the factor, high ones are kept.

    Between the two limits, the factor on the frequency is linear in the frequency.
    """
    base = _default(rope, rotated, lengths)
    turns = rope.original_positions * base / (2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = np.clip(ramp, 0, 1)
    return base * (ramp + (1 - ramp) / rope.factor)


def _yarn(rope: Rope, rotated: int, lengths: jax.Array | None) -> Frequencies:
    """Returns YaRN's frequencies (arXiv 2309.00071): as Llama 3.1's, with a ramp in the channel."""

    def pair(turns: float) -> float:
        """Returns the (fractional) index of the pair that makes `turns` over original_positions."""
        ratio = rope.original_positions / (turns * 2 * math.pi)
        return rotated * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001  # as transformers; avoids a division by 0 and makes the ramp a step
    base = _default(rope, rotated, lengths)
    divided = np.clip((np.arange(rotated // 2) - low) / (high - low), 0, 1)
    return base * ((1 - divided) + divided / rope.factor)


def _dynamic(rope: Rope, rotated: int, lengths: jax.Array | None) -> Frequencies:
    """Returns NTK-aware frequencies: theta grows with the length of the sequence.

    The slowest frequency is divided by 1 + factor · beyond / original_positions, with beyond the
    number of positions above original_positions.
    """
    base = _default(rope, rotated, lengths)
    if lengths is None:
        return base
    original = rope.original_positions
    beyond = jnp.maximum(lengths - original, 0)[..., None, None].astype(jnp.float32)
    growth = 1 + rope.factor * beyond / original
    return base * growth ** -(np.arange(0, rotated, 2, dtype=np.float32) / (rotated - 2))


def _longrope(rope: Rope, rotated: int, lengths: jax.Array | None) -> Frequencies:
    """Returns LongRoPE's frequencies (arXiv 2402.13753): long sequences have other divisors."""
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
"""Kind of a rope to its function of (rope, number of rotated channels, lengths).

It returns the frequencies; `lengths` is the argument of `frequencies`."""


def by_layer(config: DecoderConfig) -> tuple[tuple[Rope | None, ...], np.ndarray]:
    """Returns the different ropes of a decoder, and the index of each layer's rope, int32[L].

    None instead of a rope means no rotation.
    """
    local = config.local_rope or config.rope
    layers = [local if window else config.rope for window in config.windows]
    layers = [None if i in config.unrotated else rope for i, rope in enumerate(layers)]
    different = tuple(dict.fromkeys(layers))
    return different, np.array([different.index(rope) for rope in layers], np.int32)


def rotations(
    config: DecoderConfig, positions: jax.Array, lengths: jax.Array | None
) -> Rotation | None:
    """Computes the rotations of all layers, each different rotation once.

    Args:
      config: shapes and switches of the decoder.
      positions: positions of the tokens, int32[B, T].
      lengths: length of each token's sequence, int32[B, T], or None, as for `frequencies`.

    Returns:
      Cosine and sine, float32[B, T, 1, rotated / 2], if all layers share one rotation; None if no
      layer has a rotation. If layers differ, two stacks with a leading axis, in the order of
      `by_layer`.
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
    """Returns cosine and sine, float32[B, T, 1, rotated / 2], for int32 positions[B, T]."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies(rope, head_dim, lengths)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def segment_lengths(segments: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns the length of the segment that each token belongs to, int32[B, T].

    Args:
      segments: segment number of each token, int32[B, T]; tokens of a segment are neighbours.
      positions: positions, int32[B, T], from 0 in each segment.
    """
    starts = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    runs = jnp.cumsum(starts, axis=1)

    def one(positions: jax.Array, runs: jax.Array) -> jax.Array:
        last = jax.ops.segment_max(positions, runs, num_segments=len(runs))
        return last[runs] + 1

    return jax.vmap(one)(positions, runs)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first channels of x[B, T, heads, head_dim]; the other channels are unchanged.

    Computes in float32 and returns the dtype of x.
    """
    rotated = 2 * cos.shape[-1]
    if rotated < x.shape[-1]:
        rest = x[..., rotated:]
        return jnp.concatenate([rotate(x[..., :rotated], cos, sin), rest], axis=-1)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)

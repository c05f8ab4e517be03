"""The inputs of a layer beside x and its weights: visible keys, rotations, dropout key, cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.lora import dropout
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.rope import Rotation, by_layer, rotations
from qlora_jax.models.visible import KeyRange


class KVCache(NamedTuple):
    """The KV cache: keys and values, [L, B, S, kv_heads, head_dim]; slot s holds position s."""

    k: jax.Array
    v: jax.Array


class Slots(NamedTuple):
    """One layer's part of the KV cache [B, S, ...], and the positions [B, T] of its input."""

    cache: KVCache
    positions: jax.Array

    def put(self, new: KVCache) -> KVCache:
        """Returns the layer's cache with `new` [B, T, kv_heads, head_dim] written to its slots."""
        rows = jnp.arange(new.k.shape[0])[:, None]
        return jax.tree.map(lambda all, x: all.at[rows, self.positions].set(x), self.cache, new)


class SharedInputs(NamedTuple):
    """The inputs that all layers share.

    Attributes:
      keys: range of keys that each token sees in a layer without a window.
      rotations: result of `rope.rotations`.
    """

    keys: KeyRange
    rotations: Rotation | None


class LayerInputs(NamedTuple):
    """The inputs of one layer, or of a stack of layers, with a leading axis on every array.

    Attributes:
      window: number of keys that a token sees, itself included, int32[]; None: no layer has a
        window.
      rotation: index of the layer's rotation in the shared rotations, int32[]; None: all layers
        share one rotation.
      key: dropout key; None: inference, no dropout.
    """

    window: jax.Array | None
    rotation: jax.Array | None
    key: jax.Array | None

    def keys(self, shared: SharedInputs) -> KeyRange:
        """Returns the range of keys that each token sees in this layer."""
        return shared.keys if self.window is None else shared.keys.within(self.window)

    def turns(self, shared: SharedInputs) -> Rotation | None:
        """Returns this layer's rotation."""
        if self.rotation is None:
            return shared.rotations
        return jax.tree.map(lambda all: all[self.rotation], shared.rotations)


def shared_inputs(
    config: DecoderConfig, keys: KeyRange, positions: jax.Array, lengths: jax.Array | None
) -> SharedInputs:
    """Computes the inputs that all layers share.

    Args:
      config: shapes and switches of the decoder.
      keys: range of keys that each token sees in a layer without a window.
      positions: positions of the tokens, int32[B, T].
      lengths: length of each token's sequence, int32[B, T], or None, as for `rope.frequencies`.
    """
    return SharedInputs(keys, rotations(config, positions, lengths))


def own_inputs(config: DecoderConfig, key: jax.Array | None) -> LayerInputs:
    """Computes the inputs of each layer, as one stack over all layers.

    Args:
      config: shapes and switches of the decoder.
      key: dropout key, one for all rows or one for each row [B]; None: inference, no dropout.
    """
    everything = np.iinfo(np.int32).max
    ropes, index = by_layer(config)
    return LayerInputs(
        jnp.array([w or everything for w in config.windows], jnp.int32)
        if any(config.windows)
        else None,
        jnp.asarray(index) if len(ropes) > 1 else None,
        None if key is None else dropout.split(key, config.num_layers),
    )

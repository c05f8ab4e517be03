"""What a layer reads beside its weights and its input."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.lora import dropout
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.rope import Rotation, by_layer, rotations
from qlora_jax.models.visible import KeyRange


class KVCache(NamedTuple):
    """Keys and values [L, B, S, kv_heads, head_dim]; slot s holds position s."""

    k: jax.Array
    v: jax.Array


class Slots(NamedTuple):
    """A layer's part of the cache [B, S, ...] and the positions [B, T] of its input."""

    cache: KVCache
    positions: jax.Array

    def put(self, new: KVCache) -> KVCache:
        """The layer's cache with keys and values [B, T, kv_heads, head_dim] in their slots."""
        rows = jnp.arange(new.k.shape[0])[:, None]
        return jax.tree.map(lambda all, x: all.at[rows, self.positions].set(x), self.cache, new)


class SharedInputs(NamedTuple):
    """What all layers read.

    Attributes:
      keys: what each token sees where there is no window.
      rotations: as `rope.rotations` returns them.
    """

    keys: KeyRange
    rotations: Rotation | None


class LayerInputs(NamedTuple):
    """What one layer reads, or a stack of layers with a leading axis.

    Attributes:
      window: int32[], how many keys back a token sees, itself included; None: no layer has one.
      rotation: int32[], which of the shared rotations; None: there is one for all.
      key: of dropout; None is inference.
    """

    window: jax.Array | None
    rotation: jax.Array | None
    key: jax.Array | None

    def keys(self, shared: SharedInputs) -> KeyRange:
        """Returns what each token sees in this layer."""
        return shared.keys if self.window is None else shared.keys.within(self.window)

    def turns(self, shared: SharedInputs) -> Rotation | None:
        """Returns this layer's rotation."""
        if self.rotation is None:
            return shared.rotations
        return jax.tree.map(lambda all: all[self.rotation], shared.rotations)


def shared_inputs(
    config: DecoderConfig, keys: KeyRange, positions: jax.Array, lengths: jax.Array | None
) -> SharedInputs:
    """Returns what all layers read.

    Args:
      config: shapes and switches.
      keys: what each token sees where there is no window.
      positions: int32[B, T].
      lengths: int32[B, T], as `rope.frequencies` takes them.
    """
    return SharedInputs(keys, rotations(config, positions, lengths))


def own_inputs(config: DecoderConfig, key: jax.Array | None) -> LayerInputs:
    """Returns what each layer reads, as one stack of all layers.

    Args:
      config: shapes and switches.
      key: of dropout, one or one for each row [B]; None is inference.
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

"""Masks and labels for optax that mark the trained leaves, to freeze the base.

A run does not need them: it differentiates the loss with respect to A and B alone, so the base has
no gradient, no moments and no update. They are for a user's own training loop that differentiates
with respect to the whole tree:

    tuned = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    groups = {masks.TRAIN: tuned, masks.FREEZE: optax.set_to_zero()}
    optimizer = optax.partition(groups, masks.labels(tree))

Both ways give the same adapters. `optax.masked` alone does not freeze the base: if the mask of a
leaf is False, its gradient is passed through unchanged, and would be added to the base.

The cost is the gradient of the whole base, which is computed and discarded: 13.5 GB for llama-7b in
16 bits, while the gradient of adapters of rank 64 has 0.6 GB in float32. This does not work for a
tree with a `QTensor`, because `jax.grad` rejects integer codes. A 4-bit base is therefore frozen by
not differentiating with respect to it.
"""

from typing import Any

import jax
from flax import nnx

from qlora_jax.lora.variables import LoraParam

TRAIN, FREEZE = "train", "freeze"


def is_variable(x: Any) -> bool:
    """Returns whether x is an `nnx.Variable`; use it as `is_leaf` of `jax.tree` functions."""
    return isinstance(x, nnx.Variable)


def trainable_mask(tree: Any) -> Any:
    """Returns the tree with True for every leaf of a `LoraParam` and False for the others.

    Args:
      tree: a model or its `nnx.State`; leaves may be arrays or `jax.ShapeDtypeStruct`.
    """
    return jax.tree.map(
        lambda x: jax.tree.map(lambda _: isinstance(x, LoraParam), x), tree, is_leaf=is_variable
    )


def labels(tree: Any) -> Any:
    """Returns the tree with `TRAIN` or `FREEZE` for every leaf, as labels for `optax.partition`.

    Args:
      tree: a model or its `nnx.State`; leaves may be arrays or `jax.ShapeDtypeStruct`.
    """
    return jax.tree.map(lambda trained: TRAIN if trained else FREEZE, trainable_mask(tree))

"""What is trained, as masks and labels for optax: the field's form of freezing a base.

A run needs neither: its loss is differentiated with respect to A and B alone, so the base has no
gradient, no moments and no update. They are for a loop of one's own, which differentiates with
respect to the whole tree:

    tuned = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    groups = {masks.TRAIN: tuned, masks.FREEZE: optax.set_to_zero()}
    optimizer = optax.partition(groups, masks.labels(tree))

Both ways give the same adapters. `optax.masked` alone does not freeze: it hands on the gradients of
what it leaves out, and they would be added to the base.

The price is a gradient of the whole base, which is thrown away: 13.5 GB for llama-7b in 16 bits,
where its adapters of rank 64 have one of 0.6 GB in float32. A tree with a `QTensor` has none:
`jax.grad` refuses its codes, which are integers. So a 4-bit base is frozen by being left out of
what is differentiated.
"""

from typing import Any

import jax
from flax import nnx

from qlora_jax.lora.variables import LoraParam

TRAIN, FREEZE = "train", "freeze"


def is_variable(x: Any) -> bool:
    """Whether x is a variable, whose class is its kind: where `jax.tree` functions may stop."""
    return isinstance(x, nnx.Variable)


def trainable_mask(tree: Any) -> Any:
    """Returns the tree with True for every leaf of a `LoraParam` and False for the others.

    Args:
      tree: a model, or an `nnx.State` of one; leaves may be arrays or `jax.ShapeDtypeStruct`.
    """
    return jax.tree.map(
        lambda x: jax.tree.map(lambda _: isinstance(x, LoraParam), x), tree, is_leaf=is_variable
    )


def labels(tree: Any) -> Any:
    """Returns the tree with `TRAIN` or `FREEZE` for every leaf, as `optax.partition` takes it.

    Args:
      tree: as `trainable_mask` takes it.
    """
    return jax.tree.map(lambda trained: TRAIN if trained else FREEZE, trainable_mask(tree))

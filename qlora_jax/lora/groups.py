"""Groups of what is trained that an optimizer may treat apart, as labels for `optax.partition`.

LoRA+ (arXiv 2402.12354) gives B a learning rate of its own, and vectors have no weight decay:

    rates = {"matrix": optax.adamw(1e-4), "b": optax.adamw(16e-4), "vector": optax.adam(1e-4)}
    tx = optax.partition(rates, group_labels)
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from qlora_jax.lora.masks import is_variable
from qlora_jax.lora.variables import LoraB, LoraParam, LoraVector, Vector, Weight

GROUPS: Mapping[type[nnx.Variable], str] = {
    LoraParam: "matrix",
    LoraB: "b",
    LoraVector: "vector",
    Weight: "matrix",
    Vector: "vector",
}
"""Kind of a trained variable to its group: `b` (an adapter's B), `vector` or `matrix`. Stacked, a
vector has two axes like a matrix, so shapes do not tell them apart."""


def group(variable: Any) -> str:
    """Returns the group of a trained variable, by its kind alone.

    Raises:
      TypeError: no group is for it, which is a bug: a new kind must be named in `GROUPS`.
    """
    if type(variable) not in GROUPS:
        raise TypeError(f"{type(variable).__name__}: no group of the optimizer is for this kind")
    return GROUPS[type(variable)]


def group_labels(tree: Any) -> Any:
    """Returns the tree with every leaf replaced by its group.

    Args:
      tree: any pytree whose leaves are in variables, such as an `nnx.State`.

    Raises:
      TypeError: a leaf is in no variable, or in one of another kind.
    """

    def each(variable: Any) -> Any:
        own = group(variable)
        return jax.tree.map(lambda _: own, variable)

    return jax.tree.map(each, tree, is_leaf=is_variable)

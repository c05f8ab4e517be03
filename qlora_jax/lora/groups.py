"""Groups of trained variables with their own optimizer settings, as labels for `optax.partition`.

LoRA+ (arXiv 2402.12354) trains B with a larger learning rate than A: rate_B = ratio * rate_A. In
the example the ratio is 16. Vectors have no weight decay:

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
"""Class of a trained variable to its group: `b` (an adapter's B), `vector` or `matrix`. The shape
cannot decide the group, because a stacked vector has two axes like a matrix."""


def group(variable: Any) -> str:
    """Returns the group of a trained variable; the class of the variable alone decides it.

    Raises:
      TypeError: `GROUPS` lacks the class. This is a bug: add a new class of variable to `GROUPS`.
    """
    if type(variable) not in GROUPS:
        raise TypeError(f"{type(variable).__name__}: no optimizer group for this class")
    return GROUPS[type(variable)]


def group_labels(tree: Any) -> Any:
    """Returns the tree with every leaf replaced by the name of its group.

    Args:
      tree: pytree whose leaves are inside variables, such as an `nnx.State`.

    Raises:
      TypeError: a leaf is not inside a variable, or `GROUPS` lacks the variable's class.
    """

    def each(variable: Any) -> Any:
        own = group(variable)
        return jax.tree.map(lambda _: own, variable)

    return jax.tree.map(each, tree, is_leaf=is_variable)

"""LoRA and 4-bit weights on plain trees of arrays, for functions of params that are not modules.

    adapters = lora.init(key, params, r".*(query|value).*kernel", rank=16)
    loss_fn = lambda adapters, batch: loss(lora.apply(params, adapters), batch)

A leaf [*stack, K, N] is a stack of matrices. `apply` makes arrays as large as the leaves. Where
weights are in 4 bits, `x @ W + scale * (x @ A) @ B` is computed instead (`LoraLinear`, or the
adapted modules of `qlora_jax.add_lora` and `qlora_jax.linen`).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.lora.initializers.random_init import INITS
from qlora_jax.lora.spec import SCALINGS
from qlora_jax.lora.where import Where, chosen
from qlora_jax.quant import QTensor, quantize
from qlora_jax.runtime.errors import UserError

FRESH = ("kaiming-uniform", "gaussian")
"""Keys of `INITS` that need no weight."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["alpha", "scale"]
)
@dataclasses.dataclass(frozen=True)
class LowRank:
    """What is added to a leaf: scale * a @ b. Its leaves, a and b, are what is trained.

    Attributes:
      a: [*stack, K, r].
      b: [*stack, r, N].
      alpha: the alpha from which `scale` is computed.
      scale: the factor.
    """

    a: jax.Array
    b: jax.Array
    alpha: float
    scale: float


def init(
    key: jax.Array,
    params: Any,
    where: Where,
    rank: int = 16,
    alpha: float = 32.0,
    *,
    scaling: str = "alpha/r",
    init: str = "kaiming-uniform",
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> dict[str, LowRank]:
    """Makes fresh adapters for leaves of a tree: A drawn at random, B zero.

    Args:
      key: key of the random numbers.
      params: a tree of arrays or QTensors.
      where: which leaves of two axes or more, by their dotted paths.
      rank: r.
      alpha: numerator of the scale.
      scaling: a key of `spec.SCALINGS`.
      init: "kaiming-uniform" or "gaussian".
      dtype: dtype of A and B.

    Returns:
      Adapters by the leaves' paths.

    Raises:
      UserError: `where` matches nothing, or a rank, scaling or init that is not allowed.
    """
    if rank < 1 or scaling not in SCALINGS or init not in FRESH:
        raise UserError(
            f"rank {rank}, scaling {scaling!r}, init {init!r}: give a rank of 1 or more, a scaling "
            f"of {', '.join(SCALINGS)} and an init of {', '.join(FRESH)}"
        )
    found = {}
    for path, leaf in chosen(where, _matrices(params), "leaves").items():
        *stack, k, n = leaf.shape
        key, own = jax.random.split(key)
        a = jax.vmap(INITS[init], in_axes=(0, None))(
            jax.random.split(own, math.prod(stack)), (k, rank)
        )
        a = a.reshape(*stack, k, rank).astype(dtype)
        b = jnp.zeros((*stack, rank, n), dtype)
        found[path] = LowRank(a, b, alpha, SCALINGS[scaling](alpha, rank))
    return found


def apply(params: Any, adapters: Mapping[str, LowRank]) -> Any:
    """Returns the tree with W + scale * A @ B in the place of each adapted leaf W.

    The sum is in float32 and rounded once, to the leaf's dtype.

    Raises:
      UserError: an adapter for a leaf that is not there, has another shape or is in 4 bits.
    """
    known = _matrices(params)
    for path, adapter in adapters.items():
        shape = (*adapter.a.shape[:-1], adapter.b.shape[-1])
        if path not in known:
            raise UserError(
                f"{path}: has an adapter and is not in the tree; give the adapters of this tree"
            )
        if isinstance(known[path], QTensor):
            raise UserError(
                f"{path}: is in 4 bits, and W + A @ B would be an array of floats; use "
                "qlora_jax.matmul(x, w) + scale * (x @ a) @ b, or qlora_jax.linen.apply"
            )
        if tuple(known[path].shape) != shape:
            own = tuple(known[path].shape)
            raise UserError(f"{path}: is {own}, its adapter is for {shape}; give the tree's own")

    def one(keys: Any, leaf: Any) -> Any:
        adapter = adapters.get(_path(keys))
        if adapter is None:
            return leaf
        a, b = adapter.a.astype(jnp.float32), adapter.b.astype(jnp.float32)
        change = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return (leaf.astype(jnp.float32) + adapter.scale * change).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=_is_q)


def quantize_tree(params: Any, where: Where, **quantization: Any) -> Any:
    """Returns the tree with leaves in 4 bits.

    Args:
      params: a tree of arrays.
      where: which leaves of two axes or more [*stack, K, N], by their dotted paths.
      quantization: arguments of `quant.quantize`.

    Raises:
      UserError: `where` matches nothing, or leaves that are in 4 bits already or not finite; an
        argument that cannot be used.
    """
    found = chosen(where, _matrices(params), "leaves")
    for path, leaf in found.items():
        if isinstance(leaf, QTensor):
            raise UserError(f"{path}: is in 4 bits already; leave it out of `where`")
    stored = {path: quantize(leaf, name=path, **quantization) for path, leaf in found.items()}
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: stored.get(_path(keys), leaf), params, is_leaf=_is_q
    )


def _matrices(params: Any) -> dict[str, Any]:
    """Returns the leaves of two axes or more by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_q)
    return {_path(keys): leaf for keys, leaf in leaves if getattr(leaf, "ndim", 0) > 1}


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")


def _is_q(x: Any) -> bool:
    return isinstance(x, QTensor)

"""LoRA and 4-bit weights for plain trees of arrays, for models that are functions of params.

    adapters = lora.init(key, params, r".*(query|value).*kernel", rank=16)
    loss_fn = lambda adapters, batch: loss(lora.apply(params, adapters), batch)

A leaf [*stack, K, N] is a stack of matrices. `apply` returns arrays as large as the leaves. For
weights in 4 bits, compute `x @ W + scale * (x @ A) @ B` instead of calling `apply` (`LoraLinear`,
or the adapted modules of `qlora_jax.add_lora` and `qlora_jax.linen`).
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


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["alpha", "scale"]
)
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The low-rank update scale * a @ b of a leaf; a and b are the trained pytree leaves.

    Attributes:
      a: A, [*stack, K, r].
      b: B, [*stack, r, N].
      alpha: the alpha from which `scale` is computed.
      scale: factor on the product.
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
    """Returns new adapters for leaves of a tree: A drawn at random, B zero.

    Args:
      key: random key from which each A is drawn.
      params: tree of arrays or QTensors.
      where: selection of the leaves by their dotted paths; a leaf needs two axes or more.
      rank: rank r of A and B.
      alpha: numerator of the scale.
      scaling: key of `spec.SCALINGS`.
      init: "kaiming-uniform" or "gaussian".
      dtype: dtype of A and B.

    Returns:
      Path of each selected leaf to its adapter.

    Raises:
      UserError: `where` matches nothing, or the rank, scaling or init is not allowed.
    """
    if rank < 1 or scaling not in SCALINGS or init not in INITS:
        raise UserError(
            f"rank {rank}, scaling {scaling!r}, init {init!r}: rank must be 1 or more, "
            f"scaling one of {', '.join(SCALINGS)}, init one of {', '.join(INITS)}"
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
    """Returns the tree with each adapted leaf W replaced by W + scale * A @ B.

    The sum is computed in float32 and rounded once, to the leaf's dtype.

    Args:
      params: tree of arrays.
      adapters: path of a leaf to its adapter.

    Raises:
      UserError: a leaf that has an adapter is missing, has another shape or is in 4 bits.
    """
    known = _matrices(params)
    for path, adapter in adapters.items():
        shape = (*adapter.a.shape[:-1], adapter.b.shape[-1])
        if path not in known:
            raise UserError(
                f"{path}: the tree has no such leaf, but there is an adapter for it; "
                "give the adapters of this tree"
            )
        if isinstance(known[path], QTensor):
            raise UserError(
                f"{path}: is in 4 bits, but W + A @ B would be an array of floats; use "
                "qlora_jax.matmul(x, w) + scale * (x @ a) @ b, or qlora_jax.linen.apply"
            )
        if tuple(known[path].shape) != shape:
            own = tuple(known[path].shape)
            raise UserError(
                f"{path}: this leaf has the shape {own}, but its adapter is for {shape}; "
                "give the adapters of this tree"
            )

    def one(keys: Any, leaf: Any) -> Any:
        adapter = adapters.get(_path(keys))
        if adapter is None:
            return leaf
        a, b = adapter.a.astype(jnp.float32), adapter.b.astype(jnp.float32)
        change = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return (leaf.astype(jnp.float32) + adapter.scale * change).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=_is_q)


def quantize_tree(params: Any, where: Where, **quantization: Any) -> Any:
    """Returns the tree with the selected leaves quantized to 4 bits.

    Args:
      params: tree of arrays.
      where: selection of the leaves [*stack, K, N] by their dotted paths.
      quantization: arguments of `quant.quantize`.

    Raises:
      UserError: `where` matches nothing, a selected leaf is in 4 bits already or not finite, or an
        argument of `quantize` is not allowed.
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
    """Returns the leaves with two axes or more, by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_q)
    return {_path(keys): leaf for keys, leaf in leaves if getattr(leaf, "ndim", 0) > 1}


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")


def _is_q(x: Any) -> bool:
    return isinstance(x, QTensor)

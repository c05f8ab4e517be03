"""Multiplies one x by several weights in 4 bits."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from qlora_jax.kernels.matmul import backward, check, kind, matmul, product_of, to_kernel_form
from qlora_jax.kernels.select import FUSED, module_of, pick
from qlora_jax.quant import QLayer, QTensor
from qlora_jax.quant.stack import is_sharded


def matmul_many(
    x: jax.Array, qs: Sequence[QTensor | QLayer], implementation: str | None = None
) -> list[jax.Array]:
    """Returns matmul(x, q, implementation) for each q, bit for bit, in one launch if possible.

    One launch is possible for the rows in `FusedProduct.together`, if all weights have the same K,
    block sizes and format of scales, and none is sharded. It saves time because a small product
    alone does not fill a GPU.

    Args:
      x: input, float [..., K].
      qs: matrices [K, N]; N may differ.
      implementation: name of an implementation, or None; see `matmul`.

    Returns:
      Product with each weight, [..., N] in x's dtype.

    Raises:
      UserError: the implementation is unknown, or the shapes do not match.
    """
    rows = math.prod(x.shape[:-1])
    name = implementation or pick(rows, x.dtype)
    if (
        any(map(is_sharded, qs))
        or len({kind(q) for q in qs}) != 1
        or name not in FUSED
        or rows not in FUSED[name].together
    ):
        return [matmul(x, q, implementation) for q in qs]
    for q in qs:
        check(x, q)
    return _several(name, x, list(qs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _several(implementation: str, x: jax.Array, qs: list[QTensor | QLayer]) -> list[jax.Array]:
    return _product_of_several(implementation)(x, qs)


def _several_forward(implementation: str, x: jax.Array, qs: list[QTensor | QLayer]) -> Any:
    return _several(implementation, x, qs), qs


def _several_backward(implementation: str, qs: list[QTensor | QLayer], gs: Any) -> Any:
    parts = [backward(implementation, q, g)[0] for q, g in zip(qs, gs)]
    return functools.reduce(jnp.add, reversed(parts)), None  # the order of separate products


_several.defvjp(_several_forward, _several_backward)


@functools.cache
def _product_of_several(implementation: str) -> Callable[..., list[jax.Array]]:
    kernel, module = FUSED[implementation], module_of(implementation)

    def function(x: jax.Array, qs: list[QTensor | QLayer]) -> list[jax.Array]:
        return module.several(x, [to_kernel_form(kernel, q) for q in qs])

    product = custom_vmap(function)

    @product.def_vmap
    def fold(size: int, batched: Any, x: jax.Array, qs: list[QTensor | QLayer]) -> Any:
        # one product per weight, because the batch makes more rows
        single = product_of(implementation, "forward")
        axes = jax.tree.map(lambda moves: 0 if moves else None, batched)
        found = [
            jax.vmap(single, in_axes=(axes[0], own), axis_size=size)(x, q)
            for q, own in zip(qs, axes[1])
        ]
        return found, [True] * len(found)

    return product

"""The entry point for x @ W with W in 4 bits."""

import dataclasses
import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from qlora_jax.kernels import row_parts
from qlora_jax.kernels.row_parts import Product
from qlora_jax.kernels.select import FUSED, IMPLEMENTATIONS, FusedProduct, module_of, pick
from qlora_jax.quant import QLayer, QTensor
from qlora_jax.quant.qtensor import with_plain_scales
from qlora_jax.quant.sharded import Sharded
from qlora_jax.quant.stack import Matrix, as_qtensor, is_sharded
from qlora_jax.runtime.errors import UserError


def matmul(x: jax.Array, q: Matrix, implementation: str | None = None) -> jax.Array:
    """Returns x @ dequantize(q, x.dtype), accumulated in float32; only x has a gradient.

        forward:  y  = x @ dequantize(q)        (QLoRA, section 3, equation 5, without the adapter)
        backward: dx = dy @ dequantize(q).T

    The backward pass saves the QTensor and decodes it again; the decoded weight is never saved.

    Args:
      x: input, float [..., K].
      q: one matrix [K, N]. For a stack, use `vmap`, `scan` or a QLayer. A sharded matrix is
        gathered in each pass, as codes and scales; only the shard is saved between the passes.
      implementation: "xla" decodes the weight, then multiplies; it runs on every device. "mosaic"
        (jax 0.11 or newer; x in 16 bits) and "triton" decode inside the product, on NVIDIA GPUs
        from sm_80 on, so the decoded weight is never in memory. None picks by device, dtype and
        rows, see `select.pick`.

    Returns:
      Product, [..., N] in x's dtype.

    Raises:
      UserError: the implementation is unknown, or the shapes do not match.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise UserError(
            f"implementation {implementation!r} is not known; known: {', '.join(IMPLEMENTATIONS)}"
        )
    check(x, q)
    return _matmul(implementation or pick(math.prod(x.shape[:-1]), x.dtype), x, q)


def kind(q: QTensor | QLayer) -> tuple[Any, ...]:
    """Returns the properties that weights of one kernel launch share; the last is scales.dtype."""
    stack = cast(QTensor, q.stack if isinstance(q, QLayer) else q)
    return q.shape[0], stack.block_size, stack.nested_block, stack.scales.dtype


def check(x: jax.Array, q: Matrix) -> None:
    """Checks that the shapes of x and q allow x @ W.

    Raises:
      UserError: they do not.
    """
    if q.ndim != 2 or x.shape[-1] != q.shape[0]:
        raise UserError(
            f"matmul: x {x.shape} and q {q.shape}: "
            "q must be one matrix [K, N] where K is the last axis of x"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(implementation: str, x: jax.Array, q: Matrix) -> jax.Array:
    return product_of(implementation, "forward")(x, _gathered(q))


def _gathered(q: Matrix) -> QTensor | QLayer:
    if isinstance(q, Sharded) or is_sharded(q):
        return as_qtensor(q)
    return q


def _forward(implementation: str, x: jax.Array, q: Matrix) -> tuple[jax.Array, Matrix]:
    return _matmul(implementation, x, q), q


def backward(implementation: str, q: Matrix, g: jax.Array) -> tuple[jax.Array, None]:
    """Returns g @ W.T [..., K] in g's dtype, and None for W, which has no gradient."""
    # with rematerialization, XLA merges this gather with the gather of the repeated forward pass
    q = _gathered(q)
    if isinstance(q, QLayer):
        # XLA would share one slice between both passes, which copies the codes. With this barrier
        # each pass has its own slice, and XLA fuses it with its use.
        q = dataclasses.replace(q, layer=jax.lax.optimization_barrier(q.layer))
    elif isinstance(q, QTensor):
        # Without a barrier XLA would keep the weight that the forward pass decoded. The barrier
        # ties this decoding to g, so it is separate and runs after g is known. It uses the codebook
        # because that is the smallest leaf that every QTensor has.
        _, codebook = jax.lax.optimization_barrier((g, q.codebook))
        q = dataclasses.replace(q, codebook=codebook)
    return product_of(implementation, "backward")(g, q), None


_matmul.defvjp(_forward, backward)


def to_kernel_form(kernel: FusedProduct | None, q: QTensor | QLayer) -> QTensor | QLayer:
    """Returns the weight in a form that the kernel accepts; None is xla, which takes a QTensor."""
    if kernel is None:
        return as_qtensor(q)
    if kind(q)[-1].name not in kernel.scales:
        return with_plain_scales(as_qtensor(q))
    return q if kernel.stacks else as_qtensor(q)


@functools.cache
def product_of(implementation: str, direction: str) -> Product:
    """Returns an implementation's "forward" or "backward" for any form and size, and for `vmap`."""
    kernel = FUSED.get(implementation)
    plain = getattr(module_of(implementation), direction)

    def whole(x: jax.Array, q: QTensor | QLayer) -> jax.Array:
        return plain(x, to_kernel_form(kernel, q))

    function = whole if kernel is None else row_parts.split_rows(whole)
    product = custom_vmap(function)

    @product.def_vmap
    def fold(
        size: int, batched: tuple[bool, Any], x: jax.Array, q: QTensor | QLayer
    ) -> tuple[Any, bool]:
        # If only x is batched, the batch becomes rows of x. (By the default rule a kernel would
        # decode the weight once per element of the batch.)
        if not any(jax.tree.leaves(batched[1])):
            return product(x, q), True

        def alone(x: jax.Array, q: QTensor | QLayer) -> jax.Array:
            return function(x, as_qtensor(q))

        rows = math.prod(x.shape[:-1]) * (1 if batched[0] else size)
        if kernel is not None and row_parts.split(rows, q, x.dtype.itemsize)[0] > 1:

            def one(i: jax.Array) -> jax.Array:
                xi, qi = jax.tree.map(
                    lambda moves, leaf: leaf[i] if moves else leaf, tuple(batched), (x, q)
                )
                return alone(xi, qi)

            return jax.lax.map(one, jnp.arange(size)), True
        axes = jax.tree.map(lambda moves: 0 if moves else None, batched)
        return jax.vmap(alone, in_axes=axes, axis_size=size)(x, q), True

    return product

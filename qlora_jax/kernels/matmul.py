"""The one entry point for x @ W with W in 4 bits."""

import functools
from collections.abc import Mapping
from types import ModuleType

import jax

from qlora_jax.errors import UserError
from qlora_jax.kernels import xla
from qlora_jax.quant import QTensor

IMPLEMENTATIONS: Mapping[str, ModuleType] = {"xla": xla}
"""Name to a module with `forward(x, q)` and `backward(g, q)`."""


def matmul(x: jax.Array, q: QTensor, implementation: str | None = None) -> jax.Array:
    """x @ dequantize(q, x.dtype), accumulated in float32, with a gradient for x alone.

    The backward pass keeps the QTensor and decodes it again; the weight in floats is never a
    residual.

    Args:
      x: float [..., K].
      q: one matrix [K, N]; map or scan over a stack.
      implementation: a key of `IMPLEMENTATIONS`; None picks.

    Returns:
      [..., N] in x's dtype.

    Raises:
      UserError: unknown implementation, or shapes that do not match.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise UserError(
            f"implementation {implementation!r} is not known; known: {', '.join(IMPLEMENTATIONS)}"
        )
    if q.ndim != 2 or x.shape[-1] != q.in_features:
        raise UserError(f"matmul: x {x.shape} does not match one matrix, q {q.shape}")
    return _matmul(implementation or "xla", x, q)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(implementation: str, x: jax.Array, q: QTensor) -> jax.Array:
    return IMPLEMENTATIONS[implementation].forward(x, q)


def _forward(implementation: str, x: jax.Array, q: QTensor) -> tuple[jax.Array, QTensor]:
    return IMPLEMENTATIONS[implementation].forward(x, q), q


def _backward(implementation: str, q: QTensor, g: jax.Array) -> tuple[jax.Array, None]:
    return IMPLEMENTATIONS[implementation].backward(g, q), None


_matmul.defvjp(_forward, _backward)

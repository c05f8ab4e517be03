"""Splits a weight W into a stored part plus a low-rank product; shared by the initializers."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qlora_jax.lora.spec import AdapterSpec
from qlora_jax.lora.weights import LoraWeights
from qlora_jax.quant import QTensor, to_float32

EXACT = 1024
"""Largest shorter side of a matrix for an exact SVD; above it, subspace iteration is used, which
takes a small fraction of the time."""

OVERSAMPLED, ITERATIONS = 16, 16

StoredWeight = jax.Array | QTensor


class InitInput(NamedTuple):
    """The input of an initializer.

    Attributes:
      weight: W, float32[in, out].
      spec: rank, alpha and scale of the adapter.
      dtype: dtype of A and B.
      store: function that rounds a float32[in, out] to the stored form: a dtype, or 4 bits.
      iterations: number of alternating steps, for LoftQ.
    """

    weight: jax.Array
    spec: AdapterSpec
    dtype: jnp.dtype
    store: Callable[[jax.Array], StoredWeight]
    iterations: int

    def weights(self, a: jax.Array, b: jax.Array) -> LoraWeights:
        """Returns a and b as an adapter with the alpha and scale of `spec`."""
        return LoraWeights(a, b, self.spec.alpha, self.spec.scale)


def error(weight: jax.Array, stored: StoredWeight, adapter: LoraWeights | None) -> float:
    """Returns ‖W − stored − scale · a @ b‖ / ‖W‖, in the Frobenius norm.

    Args:
      weight: W, float32[in, out].
      stored: stored part of W.
      adapter: a, b and scale; None leaves out the product, for the error of `stored` alone.
    """
    rest = weight
    if adapter is not None:
        rest = residual(weight, adapter.a, adapter.b, adapter.scale)
    norm = jnp.maximum(jnp.linalg.norm(weight), 1e-30)
    return float(jnp.linalg.norm(rest - to_float32(stored)) / norm)


@jax.jit
def residual(w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Returns w − scale · a @ b in float32."""
    return w - scale * _dot(a.astype(jnp.float32), b.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("rank", "dtype"))
def best_low_rank(
    w: jax.Array, rank: int, scale: float, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Returns a and b such that scale · a @ b is the best approximation of w of this rank.

    With the truncated SVD w ≈ U S Vᵀ of this rank, both factors get the root of S:

        a = U (S / scale)^(1/2),    b = (S / scale)^(1/2) Vᵀ

    The SVD is exact if the shorter side is at most max(`EXACT`, 2 · rank). Otherwise subspace
    iteration from fixed random numbers computes it (Halko, Martinsson and Tropp, arXiv 0909.4061,
    algorithm 4.4). This is accurate for large singular values, and mixes the directions of singular
    values that are nearly equal. If the rank exceeds the shorter side, zeros fill a and b.

    Args:
      w: matrix to approximate, float32[in, out].
      rank: rank of the approximation.
      scale: factor on the product.
      dtype: dtype of a and b.

    Returns:
      a [in, rank] and b [rank, out].
    """
    if min(w.shape) <= max(EXACT, 2 * rank):
        u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    else:
        u, s, vt = _subspace(w, rank + OVERSAMPLED)
    found = min(rank, s.shape[0])
    root = jnp.sqrt(s[:found] / scale)
    a, b = u[:, :found] * root, root[:, None] * vt[:found]
    short = rank - found
    a, b = jnp.pad(a, [(0, 0), (0, short)]), jnp.pad(b, [(0, short), (0, 0)])
    return a.astype(dtype), b.astype(dtype)


def _subspace(w: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    def turn(_: int, q: jax.Array) -> jax.Array:
        z = jnp.linalg.qr(_dot(w.T, q))[0]
        return jnp.linalg.qr(_dot(w, z))[0]

    first = _dot(w, jax.random.normal(jax.random.key(0), (w.shape[1], size)))
    q = jax.lax.fori_loop(0, ITERATIONS, turn, jnp.linalg.qr(first)[0])
    u, s, vt = jnp.linalg.svd(_dot(q.T, w), full_matrices=False)
    return _dot(q, u), s, vt


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

"""DoRA (arXiv 2402.09353): trains the magnitude m of each column of W + s·A·B.

    y = m / ‖W + s·A·B‖ · (x·W + s·x·A·B)          (section 4.1, equation 5)

‖·‖ is the norm of each column of a matrix [in, out], one per output feature, and s is the scale.
The gradient treats the norms as constants (section 4.3, equation 11). For a column w of W and the
same column b of B,

    ‖w + s·A·b‖² = ‖w‖² + 2s·(wᵀA)·b + s²·bᵀ(AᵀA)b

‖w‖ is stored, and Aᵀ·W is a product of r rows with W. So the norms need no decoded weight. At first
m is the norm of W + s·A·B. If B = 0, both norms equal ‖W‖ bit for bit, because the square root of a
rounded square is the original number. Then the adapted model equals the base exactly.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from qlora_jax.kernels import saved_for_backward
from qlora_jax.lora.adapter import Adapter, Multiply
from qlora_jax.lora.spec import AdapterSpec
from qlora_jax.lora.variables import LoraConstant, LoraVector
from qlora_jax.lora.weights import LoraWeights
from qlora_jax.quant import QTensor, to_float32
from qlora_jax.quant.sharded import whole
from qlora_jax.runtime.mesh import replicated_sharding


class DoraAdapter(Adapter):
    """A low-rank adapter with a trained magnitude for each column of the adapted weight.

    Attributes:
      magnitude: m, float32[L, out].
      norm: norm ‖W‖ of each column of the pretrained weights, float32[L, out].
    """

    def __init__(
        self,
        a: jax.Array,
        b: jax.Array,
        scale: jax.Array,
        specs: Sequence[AdapterSpec | None],
        dropout: float,
        freeze_a: bool,
        magnitude: jax.Array,
        norm: jax.Array,
    ):
        super().__init__(a, b, scale, specs, dropout, freeze_a)
        self.magnitude = LoraVector(magnitude)
        self.norm = LoraConstant(norm)

    def product(self, x: jax.Array, multiply: Multiply, key: jax.Array | None) -> jax.Array:
        """Returns y of one layer, [..., out]; dropout acts on the input of A alone."""
        a, b = (jax.lax.stop_gradient(whole(v.get_value())) for v in (self.a, self.b))
        scale = self.scale.get_value()
        cross = multiply(a.T.astype(x.dtype)).astype(jnp.float32)
        norms = adapted_norms(self.norm.get_value(), cross, a, b, scale)
        length = self.magnitude.get_value() / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)
        # saved, because the gradient of m needs y
        y = saved_for_backward(multiply(x) + self(x, key))
        return (y * jnp.where(scale != 0, length, 1)).astype(x.dtype)

    def sizes(self) -> tuple[int, int]:
        """Returns (trained, all) parameter counts over all layers; m counts in both."""
        trained, total = super().sizes()
        own = self.norm.get_value().shape[-1] * sum(spec is not None for spec in self.specs)
        return trained + own, total + own

    def weights(self, *layer: int) -> LoraWeights | None:
        """Returns the adapter of one layer with its magnitude; None if the layer has no adapter."""
        weights = super().weights(*layer)
        magnitude = np.asarray(self.magnitude.get_value()[layer])
        return weights and weights._replace(magnitude=magnitude)

    def weight_update(self, weight: jax.Array, *layer: int) -> jax.Array:
        """Returns m / ‖W + s·A·B‖ · (W + s·A·B) - W, the update of a layer's weight."""
        if self.spec(*layer) is None:
            return jnp.zeros_like(weight)
        a, b, scale, m = (
            v.get_value()[layer] for v in (self.a, self.b, self.scale, self.magnitude)
        )
        return jnp.where(scale != 0, merged_weight(weight, a, b, scale, m) - weight, 0)

    def fill_own(self, values: Sequence[LoraWeights | None]) -> None:
        """Copies the magnitudes from `values`, in place; None leaves a layer unchanged."""
        magnitude = np.array(self.magnitude.get_value())
        for i, value in enumerate(values):
            if value is not None and value.magnitude is not None:
                magnitude[i] = value.magnitude
        self.magnitude.set_value(jnp.asarray(magnitude))


def dora(adapter: Adapter, weight: jax.Array | QTensor) -> DoraAdapter:
    """Returns the adapter as a DoRA adapter, with m = ‖W + s·A·B‖.

    Only one layer's weight is decoded at a time.

    Args:
      adapter: adapter of a stack of layers.
      weight: stack of pretrained weights W, [L, in, out].
    """
    a, b, scale = (v.get_value() for v in (adapter.a, adapter.b, adapter.scale))
    norm, magnitude = _measure(weight, a, b, scale, replicated_sharding(weight))
    return DoraAdapter(
        a, b, scale, adapter.specs, adapter.dropout, adapter.freeze_a, magnitude, norm
    )


@functools.partial(jax.jit, static_argnames="home")
def _measure(
    weight: jax.Array | QTensor,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
    home: NamedSharding | None,
) -> tuple[jax.Array, jax.Array]:
    def one(
        layer: tuple[jax.Array | QTensor, jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        stored, a, b, scale = layer
        if home is not None:  # gather the stored form of a layer, before decoding
            stored = jax.lax.with_sharding_constraint(stored, home)
        w = to_float32(stored)
        norm = jnp.sqrt(jnp.sum(w**2, axis=0))
        cross = _dot(a.astype(jnp.float32).T, w)
        return norm, adapted_norms(norm, cross, a, b, scale)

    return jax.lax.map(one, (weight, a, b, scale))


def adapted_norms(
    norm: jax.Array, cross: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array
) -> jax.Array:
    """Returns the norm of each column of W + scale · a @ b, from the norms of W and aᵀ @ W.

    Args:
      norm: norm of each column of W, float32[out].
      cross: aᵀ @ W, float32[r, out].
      a: A, [in, r].
      b: B, [r, out].
      scale: factor on the product, float32 scalar.

    Returns:
      Norms, float32[out].
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    more = 2 * scale * jnp.sum(cross * b, axis=0)
    more += scale**2 * jnp.sum(_dot(_dot(a.T, a), b) * b, axis=0)
    return jnp.sqrt(jnp.maximum(norm**2 + more, 0))


def merged_weight(
    weight: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, magnitude: jax.Array
) -> jax.Array:
    """Returns the adapted weight of one layer, m / ‖W + s·A·B‖ · (W + s·A·B).

    Args:
      weight: decoded W, [in, out].
      a: A, [in, r].
      b: B, [r, out].
      scale: s, scalar.
      magnitude: m, [out].

    Returns:
      Adapted weight, float32[in, out].
    """
    w = weight.astype(jnp.float32) + scale * _dot(a.astype(jnp.float32), b.astype(jnp.float32))
    norms = jax.lax.stop_gradient(jnp.linalg.norm(w, axis=0))
    return w * (magnitude / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny))


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

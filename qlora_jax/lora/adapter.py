"""The A and B matrices of one (stacked) linear: their values at the start and their effect."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.kernels import dense, kept
from qlora_jax.lora.spec import AdapterSpec


class LoraParam(nnx.Param):
    """A trainable adapter matrix."""


class LoraScale(nnx.Variable):
    """The fixed factor of each layer's adapter; 0 where a layer has none."""


def kaiming_uniform(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """U(±1/√in), which is PEFT's kaiming_uniform_(a=√5)."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def gaussian(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """N(0, 1/r²), which is PEFT's init_lora_weights="gaussian"."""
    return jax.random.normal(key, shape) / shape[1]


INITS: Mapping[str, Callable[[jax.Array, tuple[int, int]], jax.Array]] = {
    "kaiming-uniform": kaiming_uniform,
    "gaussian": gaussian,
}
"""Distribution of A[in, r]; B starts at zero, so the adapted model starts as the base."""


class Adapter(nnx.Module):
    """Low-rank updates of a stack of linears.

    A layer of smaller rank than the stack's largest is padded with zeros in both matrices, whose
    gradients are then exactly zero; a layer without an adapter has rank 0 and scale 0.

    Attributes:
      a: [L, in, r].
      b: [L, r, out].
      scale: float32[L].
      specs: each layer's own rank, alpha and scale, None where a layer has no adapter.
      dropout: rate on the input of A.
    """

    def __init__(
        self,
        a: jax.Array,
        b: jax.Array,
        scale: jax.Array,
        specs: Sequence[AdapterSpec | None],
        dropout: float = 0.0,
    ):
        self.a = LoraParam(a)
        self.b = LoraParam(b)
        self.scale = LoraScale(scale)
        self.specs = tuple(specs)
        self.dropout = dropout

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """scale * (x @ A) @ B in x's dtype; one layer of the stack. Dropout needs a key."""
        if self.dropout and key is not None:
            keep = 1 - self.dropout
            x = jnp.where(jax.random.bernoulli(key, keep, x.shape), x / keep, 0).astype(x.dtype)
        low = dense(x, self.a.get_value()) * self.scale.get_value()
        return dense(kept(low.astype(x.dtype)), self.b.get_value())


def init_adapter(
    key: jax.Array,
    specs: Sequence[AdapterSpec | None],
    in_features: int,
    out_features: int,
    init: str,
    dropout: float,
    dtype: jax.typing.DTypeLike,
) -> Adapter:
    """Fresh adapters for a stack of layers; None stands for a layer without one."""
    top = max(spec.rank for spec in specs if spec is not None)
    keys = jax.random.split(key, len(specs))
    a = jnp.zeros((len(specs), in_features, top), jnp.float32)
    for i, spec in enumerate(specs):
        if spec is not None:
            a = a.at[i, :, : spec.rank].set(INITS[init](keys[i], (in_features, spec.rank)))
    b = jnp.zeros((len(specs), top, out_features), dtype)
    scale = jnp.array([spec.scale if spec else 0.0 for spec in specs], jnp.float32)
    return Adapter(a.astype(dtype), b, scale, specs, dropout)

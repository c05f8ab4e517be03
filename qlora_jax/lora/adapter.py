"""The A and B matrices of one (stacked) linear: their values at the start and their effect."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.kernels import dense, kept
from qlora_jax.lora.spec import AdapterSpec

Multiply = Callable[[jax.Array], jax.Array]
"""x [..., in] to x @ W [..., out] in x's dtype, W being one layer's pretrained weight."""


class LoraParam(nnx.LoRAParam):
    """A trained part of an adapter: A, or one of the kinds below."""


class LoraB(LoraParam):
    """B, which has a learning rate of its own under LoRA+."""


class LoraVector(LoraParam):
    """A trained vector of an adapter, such as DoRA's magnitude; it has no weight decay."""


class LoraConstant(nnx.Variable):
    """A part of an adapter that is never trained: it has no gradient and no moments."""


class LoraScale(nnx.Variable):
    """The fixed factor of each layer's adapter; 0 where a layer has none."""


class Values(NamedTuple):
    """One layer's adapter as plain arrays: a [in, r], b [r, out], DoRA's magnitude [out]."""

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None


def kaiming_uniform(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """U(±1/√in), which is PEFT's kaiming_uniform_(a=√5)."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def gaussian(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """N(0, 1/r²), which is PEFT's init_lora_weights="gaussian"."""
    return jax.random.normal(key, shape) / shape[1]


def absent(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Zeros, until the values that come with the weights are filled in."""
    return jnp.zeros(shape)


INITS: Mapping[str, Callable[[jax.Array, tuple[int, int]], jax.Array]] = {
    "kaiming-uniform": kaiming_uniform,
    "gaussian": gaussian,
    "pissa": absent,
    "loftq": absent,
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
      freeze_a: A stays as it is (LoRA-FA, arXiv 2308.03303).
    """

    def __init__(
        self,
        a: jax.Array,
        b: jax.Array,
        scale: jax.Array,
        specs: Sequence[AdapterSpec | None],
        dropout: float = 0.0,
        freeze_a: bool = False,
    ):
        self.a = LoraConstant(a) if freeze_a else LoraParam(a)
        self.b = LoraB(b)
        self.scale = LoraScale(scale)
        self.specs = tuple(specs)
        self.dropout = dropout
        self.freeze_a = freeze_a

    def product(self, x: jax.Array, multiply: Multiply, key: jax.Array | None) -> jax.Array:
        """x times the adapted weight, [..., out] in x's dtype; one layer of the stack."""
        return multiply(x) + self(x, key)

    def sizes(self) -> tuple[int, int]:
        """(trained, all) parameters of the stack, padding not counted."""
        k, n = self.a.get_value().shape[-2], self.b.get_value().shape[-1]
        ranks = sum(spec.rank for spec in self.specs if spec is not None)
        return ranks * (n if self.freeze_a else k + n), ranks * (k + n)

    def layer(self, i: int) -> Values | None:
        """Layer i's values without padding; None where it has no adapter."""
        spec = self.specs[i]
        if spec is None:
            return None
        a, b = self.a.get_value()[i, :, : spec.rank], self.b.get_value()[i, : spec.rank]
        return Values(np.asarray(a), np.asarray(b))

    def change(self, i: int, weight: jax.Array) -> jax.Array:
        """What layer i's adapter adds to its weight: scale * A @ B.

        Args:
          i: of the stack.
          weight: W float32[in, out].

        Returns:
          float32[in, out].
        """
        a, b = (x.get_value()[i].astype(jnp.float32) for x in (self.a, self.b))
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return self.scale.get_value()[i] * product

    def fill_own(self, values: Sequence[Values | None]) -> None:
        """Takes over, in place, what each layer's values hold beyond A and B."""

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
    freeze_a: bool = False,
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
    return Adapter(a.astype(dtype), b, scale, specs, dropout, freeze_a)


def filled(adapter: Adapter, values: Sequence[Values | None]) -> Adapter:
    """The adapter with each layer's A and B replaced; None leaves a layer as it is."""
    a, b = np.array(adapter.a.get_value()), np.array(adapter.b.get_value())
    for i, value in enumerate(values):
        if value is not None:
            rank = value.a.shape[1]
            a[i, :, :rank], b[i, :rank] = value.a, value.b
    adapter.a.set_value(jnp.asarray(a))
    adapter.b.set_value(jnp.asarray(b))
    return adapter

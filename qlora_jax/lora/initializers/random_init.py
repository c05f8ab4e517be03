"""Creates new adapters with a random A and a zero B; for an embedding, a zero A and a random B."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from qlora_jax.lora.adapter import Adapter
from qlora_jax.lora.spec import AdapterSpec


def kaiming_uniform(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Draws A[in, r] from U(−1/√in, 1/√in), which is PEFT's kaiming_uniform_(a=√5)."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def gaussian(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Draws A[in, r] from N(0, 1/r²), which is PEFT's init_lora_weights="gaussian"."""
    return jax.random.normal(key, shape) / shape[1]


def zeros(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Returns zeros: A before an initializer computes it from the weight."""
    return jnp.zeros(shape)


INITS: Mapping[str, Callable[[jax.Array, tuple[int, int]], jax.Array]] = {
    "kaiming-uniform": kaiming_uniform,
    "gaussian": gaussian,
}
"""Name to a function that draws A[in, r]; B is zero, so the adapted model first equals the base."""


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
    """Returns new adapters for a stack of layers.

    Args:
      key: random key from which A is drawn.
      specs: spec of each layer; None for a layer without an adapter.
      in_features: input features of each layer.
      out_features: output features of each layer.
      init: key of `INITS`; for any other name, A is zero until an initializer fills it.
      dropout: dropout rate on the input of A.
      dtype: dtype of A and B.
      freeze_a: True keeps A constant, so A is not trained (LoRA-FA).
    """
    ranks = [spec.rank if spec else 0 for spec in specs]
    top = max(ranks)
    keys = jax.random.split(key, len(specs))
    a = jnp.zeros((len(specs), in_features, top), jnp.float32)
    for rank in set(ranks) - {0}:
        places = jnp.array([i for i, own in enumerate(ranks) if own == rank])
        draw = jax.vmap(INITS.get(init, zeros), in_axes=(0, None))
        a = a.at[places, :, :rank].set(draw(keys[places], (in_features, rank)))
    b = jnp.zeros((len(specs), top, out_features), dtype)
    scale = jnp.array([spec.scale if spec else 0.0 for spec in specs], jnp.float32)
    return Adapter(a.astype(dtype), b, scale, specs, dropout, freeze_a)


def init_embedding(
    key: jax.Array,
    spec: AdapterSpec,
    tokens: int,
    features: int,
    dtype: jax.typing.DTypeLike,
) -> Adapter:
    """Returns the new adapter of an embedding: A is zero, B is drawn from N(0, 1), as in PEFT.

    Args:
      key: random key from which B is drawn.
      spec: rank, alpha and scale.
      tokens: rows of the embedding.
      features: features of a row.
      dtype: dtype of A and B.

    Returns:
      Adapter of a stack of one layer: A [1, tokens, r], B [1, r, features].
    """
    a = jnp.zeros((1, tokens, spec.rank), dtype)
    b = jax.random.normal(key, (1, spec.rank, features)).astype(dtype)
    return Adapter(a, b, jnp.array([spec.scale], jnp.float32), [spec])

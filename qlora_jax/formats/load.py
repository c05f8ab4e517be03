"""From an open checkpoint to a model, one tensor in memory at a time."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax import compilation
from qlora_jax.config import QuantConfig
from qlora_jax.errors import UserError
from qlora_jax.formats.checkpoint import Checkpoint
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.layers import LINEARS
from qlora_jax.quant import QTensor, quantize

PREFIX = "model.layers."

Stored = jax.Array | QTensor
Split = Callable[[str, jax.Array, Callable[[jax.Array], Stored]], Stored]
"""(module path, W float32[in, out], how W would be stored) to what is stored instead."""


def load(
    checkpoint: Checkpoint,
    *,
    quant: QuantConfig | None,
    dtype: jax.typing.DTypeLike,
    progress: Callable[[], None] = lambda: None,
    split: Split | None = None,
) -> Decoder:
    """Builds the model on the default device, quantizing each tensor as it arrives.

    Peak memory is the finished model plus a few tensors; the 16-bit model never exists.

    Args:
      checkpoint: where the weights come from.
      quant: how the layers' linears are stored; None keeps them in `dtype`. Embeddings, head,
        norms and biases are never quantized.
      dtype: of everything that is not quantized.
      progress: called once per tensor read.
      split: called for every linear of the layers while its weight is there in full.

    Raises:
      UserError: a weight with NaN or Inf, or a codebook or block size that is not allowed.
    """
    outer: dict[str, jax.Array] = {}
    stacks: dict[str, jax.Array | QTensor] = {}
    for name in checkpoint.names():
        array = checkpoint.read(name)
        if not name.startswith(PREFIX):
            outer[name] = _plain(name, array, name == "lm_head.weight", dtype)
        else:
            layer, key = name.removeprefix(PREFIX).split(".", 1)
            linear = key.removesuffix(".weight") in LINEARS
            value = _value(name, array, linear, quant, dtype, split)
            if key not in stacks:
                stacks[key] = _empty(value, checkpoint.config.num_layers)
            stacks[key] = _insert(stacks[key], value, int(layer))
        progress()
    compilation.trim()  # after many short compilations
    return Decoder(
        checkpoint.config,
        outer["model.embed_tokens.weight"],
        [stacks],
        outer["model.norm.weight"],
        outer.get("lm_head.weight"),
    )


def read_linear(checkpoint: Checkpoint, name: str) -> jax.Array:
    """A linear's weight as W float32[in, out]."""
    return _transposed(checkpoint.read(name), jnp.float32)


def storing(
    name: str, quant: QuantConfig | None, dtype: jax.typing.DTypeLike
) -> Callable[[jax.Array], Stored]:
    """How the model holds a linear's W float32[in, out]; `name` is for errors."""
    if quant is None:
        return lambda w: _plain(name, w, False, dtype)
    return functools.partial(
        quantize,
        codebook=quant.codebook,
        block_size=quant.block_size,
        double_quant=quant.double_quant,
        nested_block=quant.nested_block,
        name=name,
    )


def _value(
    name: str,
    array: np.ndarray,
    linear: bool,
    quant: QuantConfig | None,
    dtype: jax.typing.DTypeLike,
    split: Split | None,
) -> Stored:
    if not linear or array.ndim == 1 or (quant is None and split is None):
        return _plain(name, array, linear and array.ndim == 2, dtype)
    # float32 once, before the quantizer reads it several times
    w, store = _transposed(array, jnp.float32), storing(name, quant, dtype)
    return store(w) if split is None else split(name.removesuffix(".weight"), w, store)


def _plain(
    name: str, array: np.ndarray | jax.Array, transpose: bool, dtype: jax.typing.DTypeLike
) -> jax.Array:
    value = _transposed(array, dtype) if transpose else jnp.asarray(array, dtype)
    if not _all_finite(value):
        remedy = (
            ""
            if value.dtype == jnp.float32
            else (", or hold it in another dtype (model.storage_dtype; for method full lora.dtype)")
        )
        raise UserError(
            f"{name}: holds NaN or Inf as {value.dtype.name}; download it again{remedy}"
        )
    return value


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()  # XLA's max on a CPU leaves out NaN


@functools.partial(jax.jit, static_argnums=1)
def _transposed(array: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return array.T.astype(dtype)


def _empty(value: jax.Array | QTensor, layers: int) -> jax.Array | QTensor:
    return jax.tree.map(lambda x: jnp.zeros((layers, *x.shape), x.dtype), value)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(
    stack: jax.Array | QTensor, value: jax.Array | QTensor, layer: int
) -> jax.Array | QTensor:
    return jax.tree.map(lambda s, v: s.at[layer].set(v), stack, value)

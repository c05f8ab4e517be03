"""Builds a model from an open checkpoint, with one tensor in memory at a time."""

import functools
import itertools
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qlora_jax.config import QuantConfig
from qlora_jax.formats.checkpoint import Checkpoint
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families import Names
from qlora_jax.models.sharding import LAYERS, shardings
from qlora_jax.models.weight_shapes import linears
from qlora_jax.quant import QTensor, dequantize, quantize
from qlora_jax.quant.stack import empty_stack, with_layer
from qlora_jax.runtime import compilation
from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.mesh import put_on_devices

StoredWeight = jax.Array | QTensor
Split = Callable[[str, jax.Array, Callable[[jax.Array], StoredWeight]], StoredWeight]
"""Function of (module path, W float32[in, out], store) that returns the value to store for W.

`store` is the function that converts a matrix to its stored form."""


def load_model(
    checkpoint: Checkpoint,
    *,
    quant: QuantConfig | None,
    dtype: jax.typing.DTypeLike,
    progress: Callable[[], None] = lambda: None,
    split: Split | None = None,
    mesh: Mesh | None = None,
) -> Decoder:
    """Builds the model, and quantizes each tensor right after reading it.

    Each tensor is whole on the default device for a short time. The peak memory is the finished
    model plus a few tensors; the 16-bit model never exists. If the checkpoint has 4-bit weights,
    `quant` is ignored and no other weight is quantized. Consecutive layers with weights of equal
    shapes and formats become one stack.

    Args:
      checkpoint: checkpoint of the weights.
      quant: quantization of the layers' linears; None stores them in `dtype`. Embeddings, head,
        norms and biases are never quantized.
      dtype: dtype of all weights that are not quantized.
      progress: callback, called once per tensor that is read.
      split: function that is called for every linear of the layers, with its full-precision weight;
        not for weights that the checkpoint stores in 4 bits.
      mesh: devices over which the weights are split; None: the default device.

    Raises:
      UserError: a weight holds NaN or Inf, or a codebook or block size is not allowed.
    """
    config, names = checkpoint.config, checkpoint.config.names
    layers, head = f"{names.layers}.", f"{names.head}.weight"
    quant = None if checkpoint.quantization else quant
    outer: dict[str, jax.Array] = {}
    places, runs = _stacks(checkpoint)
    stacks: list[dict[str, jax.Array | QTensor]] = [{} for _ in runs]
    for name in checkpoint.names():
        array = checkpoint.read(name)
        if not name.startswith(layers):
            outer[name] = _outer(name, array, name == head, dtype)
            if mesh is not None:
                outer[name] = _split_outer(mesh, names, name, outer[name])
        else:
            layer, key = name.removeprefix(layers).split(".", 1)
            linear = key.removesuffix(".weight") in linears(config)
            value = _value(name, array, linear, quant, dtype, split)
            run, index = places[int(layer)]
            stack = stacks[run].get(key)
            stacks[run][key] = _put(mesh, stack, value, index, runs[run])
        progress()
    compilation.trim()  # frees the memory of many short compilations
    return Decoder(
        config,
        outer[f"{names.embed}.weight"],
        stacks,
        outer[f"{names.norm}.weight"],
        outer.get(head),
        outer.get(f"{names.norm}.bias"),
        outer.get(f"{names.positions}.weight"),
    )


def _put(
    mesh: Mesh | None, stack: StoredWeight | None, value: StoredWeight, index: int, layers: int
) -> StoredWeight:
    """Returns the stack with the layer at `index` set to `value`; makes the stack if it is None."""
    homes = None
    if mesh is not None:
        shapes = jax.eval_shape(functools.partial(empty_stack, layers=layers), value)
        homes = shardings(mesh, LAYERS, shapes, shapes)
        value = put_on_devices(value, shardings(mesh, LAYERS, shapes, value))
    if stack is None:
        stack = empty_stack(value, layers, homes)
    return with_layer(stack, value, index)


def _split_outer(mesh: Mesh, names: Names, name: str, value: jax.Array) -> jax.Array:
    """Places an array outside the layers on the devices of a mesh."""
    paths = {f"{names.embed}.weight": "embed", f"{names.head}.weight": "head"}
    return put_on_devices(value, shardings(mesh, paths.get(name, name), value, value))


def _stacks(checkpoint: Checkpoint) -> tuple[list[tuple[int, int]], list[int]]:
    """Returns (stack, index in the stack) of each layer, and the length of each stack."""
    layers: list[dict[str, Hashable]] = [{} for _ in range(checkpoint.config.num_layers)]
    stored = checkpoint.quantization.layouts if checkpoint.quantization else {}
    prefix = f"{checkpoint.config.names.layers}."
    for name in checkpoint.names():
        if name.startswith(prefix):
            layer, _, key = name.removeprefix(prefix).partition(".")
            layers[int(layer)][key] = checkpoint.shape(name), stored.get(name)
    lengths = [len(list(alike)) for _, alike in itertools.groupby(layers)]
    return [(run, i) for run, length in enumerate(lengths) for i in range(length)], lengths


def _outer(
    name: str,
    array: np.ndarray | jax.Array | QTensor,
    transpose: bool,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    if isinstance(array, np.ndarray):
        return _plain(name, array, transpose, dtype)
    return dequantize(array, dtype) if isinstance(array, QTensor) else array


def read_linear(checkpoint: Checkpoint, name: str) -> jax.Array:
    """Reads the weight of a linear as W float32[in, out]."""
    return _transposed(checkpoint.read(name), jnp.float32)


def storing(
    name: str, quant: QuantConfig | None, dtype: jax.typing.DTypeLike
) -> Callable[[jax.Array], StoredWeight]:
    """Returns the function that converts W float32[in, out] of a linear to its stored form.

    Args:
      name: name of the weight, for messages.
      quant: quantization; None: no quantization.
      dtype: dtype of a weight that is not quantized.
    """
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
    array: np.ndarray | jax.Array | QTensor,
    linear: bool,
    quant: QuantConfig | None,
    dtype: jax.typing.DTypeLike,
    split: Split | None,
) -> StoredWeight:
    if not isinstance(array, np.ndarray):
        return array
    if not linear or array.ndim == 1 or (quant is None and split is None):
        return _plain(name, array, linear and array.ndim == 2, dtype)
    # Convert to float32 once, because the quantizer reads the weight several times.
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
    return jnp.isfinite(array).all()  # not max(): XLA:CPU's max ignores NaN


@functools.partial(jax.jit, static_argnums=1)
def _transposed(array: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return array.T.astype(dtype)

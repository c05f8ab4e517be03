"""Gives an abstract model its values, one array at a time."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.lora.where import Where
from qlora_jax.modules.candidates import Candidate, check_model
from qlora_jax.modules.nnx_model import put_quantized, to_quantize
from qlora_jax.modules.quantizing import quantized
from qlora_jax.modules.sources import Read, Source, reader
from qlora_jax.runtime.display import counted
from qlora_jax.runtime.errors import UserError

Model = TypeVar("Model", bound=nnx.Module)


def fill(
    model: Model,
    source: Source,
    where: Where | None = None,
    *,
    embeddings: bool = False,
    **quantization: Any,
) -> Model:
    """Gives an abstract model its values, in place; the 16-bit model is never in memory.

    Each value is read, put on the device in the model's dtype or quantized, and let go of before
    the next.

    Args:
      model: an NNX model of shapes, from `nnx.eval_shape`.
      source: a function of (path, `jax.ShapeDtypeStruct`) that returns the array, or None if it
        has none; a .safetensors file or a folder of them; or the folder of an orbax checkpoint. In
        files the names are the paths of the variables.
      where: which weights are quantized, as in `quantize_model`; None quantizes nothing.
      embeddings: whether tables that are looked up are quantized, too.
      quantization: arguments of `quant.quantize`.

    Returns:
      The model. Keys of random numbers that the source does not have start at 0.

    Raises:
      UserError: a value that the source does not have, has in another shape, or that is not
        finite; what `quantize_model` raises for `where`. The model is then as it was.
    """
    chosen = {} if where is None else _chosen(check_model(model), where, embeddings)
    read = reader(source)
    values: list[tuple[nnx.Variable, Any]] = []
    variables = _abstract(model)
    with counted("filling the model", len(variables)) as advance:
        for path, variable in variables:
            value = _value(read, path, variable)
            if candidate := chosen.get(id(variable)):
                value = quantized(value, candidate.axes, path, **quantization)
            values.append((variable, value))
            del value
            advance()
    for variable, value in values:
        if candidate := chosen.get(id(variable)):
            put_quantized(candidate, value)
        else:
            variable.set_raw_value(value)
    return model


def _chosen(model: nnx.Module, where: Where, embeddings: bool) -> dict[int, Candidate]:
    return {id(c.variable): c for c in to_quantize(model, where, embeddings)}


def _abstract(model: nnx.Module) -> list[tuple[str, nnx.Variable]]:
    """Returns each variable that has no value yet, and its path."""
    found: dict[int, tuple[str, nnx.Variable]] = {}
    for parts, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Variable) and isinstance(
            variable.get_raw_value(), jax.ShapeDtypeStruct
        ):
            found.setdefault(id(variable), (".".join(map(str, parts)), variable))
    return list(found.values())


def _value(read: Read, path: str, variable: nnx.Variable) -> Any:
    """Returns a variable's value in the dtype of the model, on the host or the device."""
    shape = variable.get_raw_value()
    value = read(path, shape)
    if value is None and isinstance(variable, nnx.RngState):
        return _first(shape)
    if value is None:
        raise UserError(f"{path}: the source has no value for it; add it, or rename it there")
    if tuple(value.shape) != tuple(shape.shape):
        raise UserError(
            f"{path}: is {tuple(value.shape)} in the source and {tuple(shape.shape)} in the model; "
            "give the values of this model"
        )
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return value
    if isinstance(value, np.ndarray):
        return jnp.asarray(value.astype(shape.dtype, copy=False))
    return value.astype(shape.dtype)


def _first(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns keys of random numbers, or counts of those drawn, as they start."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), shape.shape)
    return jnp.zeros(shape.shape, shape.dtype)

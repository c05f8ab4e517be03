"""Fills an abstract model with values, one array at a time."""

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
    """Fills an abstract model with values, in place; the 16-bit model is never whole in memory.

    Reads one value at a time, puts it on the device in the model's dtype or quantizes it, and frees
    the value before it reads the next one.

    Args:
      model: NNX model of shapes, from `nnx.eval_shape`.
      source: function (path, `jax.ShapeDtypeStruct`) that returns an array, or None if it has no
        such value; .safetensors file or folder of them; or folder of an orbax checkpoint. In files
        the names are the paths of the variables.
      where: weights to quantize, as in `quantize_model`; None quantizes nothing.
      embeddings: True also quantizes tables whose rows are looked up, such as embeddings.
      quantization: arguments of `quant.quantize`, such as codebook and block_size.

    Returns:
      The same model. Keys of random numbers that the source does not have are made from seed 0.

    Raises:
      UserError: the source lacks a value, a value has another shape or cannot be quantized because
        it is not finite, or `where` is refused as in `quantize_model`. The model then stays
        unchanged.

    Example:
      ```python
      model = nnx.eval_shape(lambda: MyModel(rngs=nnx.Rngs(0)))
      qj.fill(model, "weights.safetensors", where=r".*kernel", codebook="nf4")
      ```
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
    """Returns the path and variable of each variable without a value."""
    found: dict[int, tuple[str, nnx.Variable]] = {}
    for parts, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Variable) and isinstance(
            variable.get_raw_value(), jax.ShapeDtypeStruct
        ):
            found.setdefault(id(variable), (".".join(map(str, parts)), variable))
    return list(found.values())


def _value(read: Read, path: str, variable: nnx.Variable) -> Any:
    """Reads a variable's value and converts it to the dtype of the model."""
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
    """Returns the initial value of an `nnx.RngState`: keys from seed 0, or counts of zero."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), shape.shape)
    return jnp.zeros(shape.shape, shape.dtype)

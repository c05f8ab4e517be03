"""From a model back to parameters under their Hugging Face names: the inverse of `load`."""

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.models.decoder import Decoder, run_length
from qlora_jax.models.layers import Layer
from qlora_jax.quant import QTensor, dequantize


def parameter(model: Decoder, name: str) -> np.ndarray:
    """One pretrained parameter, linears [out, in]; of adapters nothing is in it.

    Args:
      model: any.
      name: as `names.expected_shapes` has it.

    Returns:
      The stored dtype; float32 where the weight is quantized.

    Raises:
      KeyError: the model has no such parameter.
    """
    names = model.config.names
    if name == f"{names.head}.weight" and model.head is not None:
        return np.asarray(model.head.get_value()).T
    outer = {
        f"{names.embed}.weight": model.embed,
        f"{names.positions}.weight": model.positions,
        f"{names.norm}.weight": model.norm.weight,
        f"{names.norm}.bias": model.norm.bias,
    }
    if (found := outer.get(name)) is not None:
        return np.asarray(found.get_value())
    if not name.startswith(f"{names.layers}."):
        raise KeyError(name)
    number, key = name.removeprefix(f"{names.layers}.").split(".", 1)
    run, index = _place(model, int(number))
    module, _, leaf = key.rpartition(".")
    part = run.linears().get(module) or getattr(run, module.rpartition(".")[2])
    variable = getattr(part, leaf)
    if variable is None:
        raise KeyError(name)
    value = jax.tree.map(lambda x: x[index], variable.get_value())
    if isinstance(value, QTensor):
        value = dequantize(value, jnp.float32)
    return np.asarray(value).T


def _place(model: Decoder, layer: int) -> tuple[Layer, int]:
    for run in model.runs:
        if layer < run_length(run):
            return run, layer
        layer -= run_length(run)
    raise KeyError(f"layer {layer}")

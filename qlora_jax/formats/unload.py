"""From a model back to parameters under their Hugging Face names: the inverse of `load`."""

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.formats.load import PREFIX
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
    if name == "model.embed_tokens.weight":
        return np.asarray(model.embed.get_value())
    if name == "model.norm.weight":
        return np.asarray(model.norm.weight.get_value())
    if name == "lm_head.weight" and model.head is not None:
        return np.asarray(model.head.get_value()).T
    if not name.startswith(PREFIX):
        raise KeyError(name)
    number, key = name.removeprefix(PREFIX).split(".", 1)
    run, index = _place(model, int(number))
    module, _, leaf = key.rpartition(".")
    linear = run.linears().get(module)
    if linear is None:
        return np.asarray(getattr(run, module).weight.get_value()[index])
    if leaf == "bias":
        if linear.bias is None:
            raise KeyError(name)
        return np.asarray(linear.bias.get_value()[index])
    weight = jax.tree.map(lambda x: x[index], linear.weight.get_value())
    if isinstance(weight, QTensor):
        weight = dequantize(weight, jnp.float32)
    return np.asarray(weight).T


def _place(model: Decoder, layer: int) -> tuple[Layer, int]:
    for run in model.runs:
        if layer < run_length(run):
            return run, layer
        layer -= run_length(run)
    raise KeyError(f"layer {layer}")

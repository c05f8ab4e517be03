"""Reads a parameter of a model by its Hugging Face name: the inverse of `load_model`."""

import numpy as np

from qlora_jax.models.decoder import Decoder
from qlora_jax.models.stored import stored
from qlora_jax.quant import QTensor


def parameter(model: Decoder, name: str) -> np.ndarray:
    """Returns one pretrained parameter without its adapter; linears are [out, in].

    Args:
      model: the model.
      name: name of the parameter, a key of `names.expected_shapes`.

    Returns:
      An array in the stored dtype; float32 if the weight is quantized.

    Raises:
      KeyError: the model has no such parameter.
    """
    found = next((part for part in stored(model) if name in part.names), None)
    if found is None:
        raise KeyError(name)
    value, layer = found.value, found.names.index(name)
    if found.stacked:
        value = value[layer]
    if isinstance(value, QTensor):
        value = value.dequantize()
    return np.asarray(value).T if found.transposed else np.asarray(value)

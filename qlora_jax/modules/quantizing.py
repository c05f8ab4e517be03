"""Quantizes a weight with any number of axes, one matrix at a time."""

import math
from typing import Any

import jax
import numpy as np

from qlora_jax.modules.axes import Axes, matrices_shape, to_matrices
from qlora_jax.quant import QTensor, quantize
from qlora_jax.quant.stack import empty_stack, with_layer


def quantized(weight: jax.Array | np.ndarray, axes: Axes, name: str, **arguments: Any) -> QTensor:
    """Quantizes a weight to 4 bits; only one of its matrices at a time is in float32.

    Args:
      weight: array [*stack, *shape], on the device or the host.
      axes: axes of one layer's weight.
      name: path of the weight, for errors.
      arguments: arguments of `quant.quantize`: codebook, block_size, double_quant, nested_block.

    Returns:
      QTensor of matrices [*stack, *batch, K, N].

    Raises:
      UserError: as `quant.quantize`.
    """
    stack, own = axes.stack(weight.shape), axes.own(weight.shape)
    *batch, k, n = matrices_shape(axes, own)
    if not stack and not batch:
        return quantize(to_matrices(weight, axes), name=name, **arguments)
    layers, each = math.prod(stack), math.prod(batch)
    flat = weight.reshape(layers, *own)
    result: Any = None
    for i in range(layers):
        matrices = to_matrices(flat[i], axes).reshape(each, k, n)
        for j in range(each):
            q = quantize(matrices[j], name=name, **arguments)
            result = empty_stack(q, layers * each) if result is None else result
            result = with_layer(result, q, i * each + j)
    return jax.tree.map(lambda x: x.reshape(*stack, *batch, *x.shape[1:]), result)

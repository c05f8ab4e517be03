"""The storage formats of block scales (the absmax of each block).

The dtype of `QTensor.scales` names the format. The quantizer, the decoder and the kernels read the
table `SCALES`. To add a format, add an entry with its encoder and its decoder.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from qlora_jax.quant.double_quant import dequantize_scales, quantize_scales


class StoredScales(NamedTuple):
    """Block scales as a `QTensor` holds them.

    Attributes:
      scales: stored scales, [..., nb, N] in the format's dtype.
      nested: scales of `scales`, float32[..., ceil(nb*N / nested_block)]; or None.
      offset: number added to every scale, float32[...]; or None.
    """

    scales: jax.Array
    nested: jax.Array | None = None
    offset: jax.Array | None = None


class ScaleFormat(NamedTuple):
    """One way to store block scales.

    Attributes:
      encode: function of (absmax float32[..., nb, N], nested_block) that returns StoredScales.
      decode: function of (StoredScales, nested_block) that returns absmax, float32[..., nb, N].
    """

    encode: Callable[[jax.Array, int], StoredScales]
    decode: Callable[[StoredScales, int], jax.Array]


def _decode_double(stored: StoredScales, nested_block: int) -> jax.Array:
    assert stored.nested is not None
    assert stored.offset is not None
    return dequantize_scales(stored.scales, stored.nested, stored.offset, nested_block)


SCALES: Mapping[str, ScaleFormat] = {
    "float32": ScaleFormat(
        lambda absmax, nested_block: StoredScales(absmax), lambda stored, _: stored[0]
    ),
    "uint8": ScaleFormat(
        lambda absmax, nested_block: StoredScales(*quantize_scales(absmax, nested_block)),
        _decode_double,
    ),
}
"""Dtype of `QTensor.scales` to its format: float32 is absmax, uint8 is double quantization."""

PLAIN, DOUBLE = "float32", "uint8"

"""How the absmax of a weight's blocks is stored: one entry for each format.

The dtype of `QTensor.scales` names the format. The quantizer, the decoder and the kernels read this
table, so to add a format is to add an entry: what it stores, and how that is read back.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from qlora_jax.quant.double_quant import dequantize_scales, quantize_scales


class StoredScales(NamedTuple):
    """Block scales as a `QTensor` holds them.

    Attributes:
      scales: [..., nb, N] in the format's dtype.
      nested: float32[..., ceil(nb*N / nested_block)], scales of `scales`; or None.
      offset: float32[...], added to every scale; or None.
    """

    scales: jax.Array
    nested: jax.Array | None = None
    offset: jax.Array | None = None


class ScaleFormat(NamedTuple):
    """One way to store block scales.

    Attributes:
      encode: (absmax float32[..., nb, N], nested_block) to what is stored.
      decode: (what is stored, nested_block) to float32[..., nb, N].
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
"""Dtype of `QTensor.scales` to its format: absmax as it is, and double quantization."""

PLAIN, DOUBLE = "float32", "uint8"

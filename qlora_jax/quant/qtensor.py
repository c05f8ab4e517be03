"""A frozen weight in 4 bits as a pytree, and the functions `quantize` and `dequantize`."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.quant.codebooks import codebook as codebook_values
from qlora_jax.quant.scales import DOUBLE, PLAIN, SCALES, StoredScales
from qlora_jax.runtime.errors import UserError

GROUP = 64
"""Rows of W that are packed together: byte i holds the codes of rows i and i + 32."""

BLOCK_SIZES = tuple(2**i for i in range(5, 13))


@nnx.register_data_type
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "nested", "offset", "codebook"],
    meta_fields=["in_features", "block_size", "nested_block"],
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A stack of matrices W[K, N] in 4 bits; K = in_features is the contraction axis.

    Decoding (QLoRA, equations 2 and 6), in float32:

        W[k, n] = codebook[code[k, n]] * scale[b, n],    b = k // block_size

    Without double quantization scale = scales, the absmax of the block. With it
    scale[b, n] = map[scales[b, n]] * nested[(n*nb + b) // nested_block] + offset, where `map` is
    the 8-bit dynamic map (`dynamic8.dynamic_map`).

    Invariants, with Kp = K rounded up to a multiple of 64 and nb = ceil(K / block_size):

      * Byte row `g*32 + i` of `codes` holds element `g*64 + i` in its low nibble and element
        `g*64 + 32 + i` in its high nibble. Rows beyond K hold the code of zero.
      * `codebook` is non-decreasing within [-1, 1]; a code is an index into it.
      * The dtype of `scales` names their storage format (`scales.SCALES`).
      * All leaves have the same leading axes (layers). These axes are never static, so `scan` and
        `vmap` can run over a stack.

    Attributes:
      codes: packed codes, uint8[..., Kp/2, N].
      scales: stored scales, float32[..., nb, N]; uint8[..., nb, N] with double quantization.
      nested: scales of the scales, float32[..., ceil(nb*N / nested_block)]; or None.
      offset: mean of the scales, float32[...]; or None.
      codebook: values of the 16 codes, float32[..., 16].
      in_features: K.
      block_size: weights per scale along K, a power of two from 32 to 4096.
      nested_block: scales per nested scale.
    """

    codes: jax.Array
    scales: jax.Array
    nested: jax.Array | None
    offset: jax.Array | None
    codebook: jax.Array
    in_features: int
    block_size: int
    nested_block: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded weight, [..., K, N]."""
        return (*self.codes.shape[:-2], self.in_features, self.codes.shape[-1])

    @property
    def ndim(self) -> int:
        """Number of axes of the decoded weight."""
        return self.codes.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the decoding arithmetic, float32; the decoded values are rounded afterwards."""
        return jnp.dtype(jnp.float32)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.nested is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves: codes, scales and codebooks."""
        return nbytes(self)

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> "QTensor":
        """Takes a part of the stack, by its leading axes alone; `q[()]` is `q`.

        Raises:
          IndexError: the index has more axes than the stack.
        """
        axes = len(index) if isinstance(index, tuple) else 1
        if axes > self.ndim - 2:
            raise IndexError(f"a stack of {self.ndim - 2} axes was indexed with {axes}")
        return jax.tree.map(lambda x: x[index], self)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """Returns the weight as floats, dtype[..., K, N]: `dequantize(self, dtype)`."""
        return dequantize(self, dtype)


def quantize(
    w: jax.Array | np.ndarray,
    codebook: str | jax.Array | np.ndarray = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    nested_block: int = 256,
    name: str = "weight",
) -> QTensor:
    """Rounds a weight to 4 bits, block by block along its contraction axis.

    For block b of column n (QLoRA, section 2, equation 1 with a codebook in place of integers):

        absmax[b, n] = max |w[k, n]| over the rows k of block b
        code[k, n]   = index of the codebook value nearest to w[k, n] / absmax[b, n]

    If K is a multiple of `block_size`, the blocks, codes and scales equal those of bitsandbytes'
    CPU build bit for bit. (In bitsandbytes the weight is the transpose, [out, in].)

    Args:
      w: weight, float32, bfloat16 or float16 [..., K, N], with any leading axes.
      codebook: a name in `CODEBOOKS`, or sixteen non-decreasing values.
      block_size: weights per scale.
      double_quant: True stores the scales in 8 bits (`double_quant`).
      nested_block: scales per nested scale.
      name: name of the weight for error messages.

    Raises:
      UserError: the block size or the nested block is not allowed; the codebook is unknown or is
        not sixteen non-decreasing values from -1 to 1; the dtype is not a float; the weight has
        fewer than two axes; or it holds NaN or Inf (not checked under jit).
    """
    check_block_size(block_size)
    if nested_block < 1:
        raise UserError(f"nested_block {nested_block} is not allowed; give 1 or more")
    if isinstance(codebook, str):
        codebook = codebook_values(codebook, block_size)
    elif not isinstance(codebook, jax.core.Tracer):
        check_codebook(np.asarray(codebook))
    if not jnp.issubdtype(w.dtype, jnp.floating) or w.ndim < 2:
        raise UserError(
            f"{name}: a weight is a float array of two or more axes, not {w.dtype} {w.shape}"
        )
    q, finite = _quantize(
        jnp.asarray(w), jnp.asarray(codebook, jnp.float32), block_size, double_quant, nested_block
    )
    if not isinstance(finite, jax.core.Tracer) and not finite:
        raise UserError(f"{name}: holds NaN or Inf and cannot be quantized; check the checkpoint")
    return q


def dequantize(q: QTensor, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Decodes a weight: codebook[code] * scale in float32, rounded once to `dtype`.

    Returns:
      The weight, dtype[..., K, N].
    """
    *lead, rows, n = q.codes.shape
    # Both halves of a group are one elementwise expression, because XLA:CPU does not vectorize a
    # concatenation of two.
    grouped = q.codes.reshape(*lead, -1, 1, GROUP // 2, n)
    high = jnp.arange(2)[:, None, None] == 1
    values = look_up_codes(jnp.where(high, grouped >> 4, grouped & 15), q.codebook)
    values = (values * group_scales(block_scales(q), q)).astype(dtype)
    return values.reshape(*lead, 2 * rows, n)[..., : q.in_features, :]


def block_scales(q: QTensor) -> jax.Array:
    """Returns the decoded scale (absmax) of every block, float32[..., nb, N]."""
    stored = StoredScales(q.scales, q.nested, q.offset)
    return SCALES[q.scales.dtype.name].decode(stored, q.nested_block)


def to_float32(weight: jax.Array | QTensor) -> jax.Array:
    """Returns a weight in float32; a QTensor is decoded."""
    return dequantize(weight) if isinstance(weight, QTensor) else weight.astype(jnp.float32)


def with_plain_scales(x: Any) -> Any:
    """Returns a QTensor with its scales decoded to float32, and any other object unchanged."""
    if not isinstance(x, QTensor):
        return x
    return dataclasses.replace(x, scales=block_scales(x), nested=None, offset=None)


def group_scales(scales: jax.Array, q: QTensor) -> jax.Array:
    """Reshapes block scales so that they multiply values [..., group, half, row, n].

    Args:
      scales: result of `block_scales`, float32[..., nb, N].
      q: the QTensor that the scales belong to.

    Returns:
      float32[..., Kp/64, 1 or 2, 1, N]: one scale per group of 64 rows, or one per half of a group
      if the block size is 32.
    """
    *lead, _, n = scales.shape
    groups = q.codes.shape[-2] // (GROUP // 2)
    if q.block_size < GROUP:
        return _pad_rows(scales, 2 * groups).reshape(*lead, groups, 2, 1, n)
    repeated = jnp.repeat(scales, q.block_size // GROUP, axis=-2)
    return repeated[..., :groups, :].reshape(*lead, groups, 1, 1, n)


def look_up_codes(indices: jax.Array, codebook: jax.Array) -> jax.Array:
    """Returns codebook[..., indices].

    On a CPU this is a tree of selections, because XLA:CPU vectorizes selections but not look-ups.
    On a GPU look-ups are faster.

    Args:
      indices: codes below 16, uint8 with the codebook's leading axes.
      codebook: values of the codes, float32[..., 16].

    Returns:
      Values, float32 of the shape of `indices`.
    """
    return jax.lax.platform_dependent(indices, codebook, cpu=selected, default=_looked_up)


def selected(indices: jax.Array, codebook: jax.Array, shift: int = 0) -> jax.Array:
    """Returns codebook[..., indices >> shift & 15], computed by selections only.

    Args:
      indices: integers that hold the codes, with the codebook's leading axes.
      codebook: values of the codes, float32[..., 16].
      shift: position of the lowest of a code's four bits.

    Returns:
      Values, float32 of the shape of `indices`.
    """
    axes = (*codebook.shape[:-1], *[1] * (indices.ndim - codebook.ndim + 1))
    values = [codebook[..., i].reshape(axes) for i in range(16)]
    for bit in range(shift, shift + 4):
        # Do not write `!= 0`: XLA of jax 0.10 passes a constant with many uses to the loop as an
        # argument, and then the compiler does not see that this tests one bit.
        is_set = indices & (1 << bit) > (1 << bit) - 1
        values = [jnp.where(is_set, b, a) for a, b in zip(values[::2], values[1::2])]
    return values[0]


def _looked_up(indices: jax.Array, codebook: jax.Array) -> jax.Array:
    if codebook.ndim == 1:
        return codebook[indices]
    flat = indices.reshape(*codebook.shape[:-1], -1).astype(jnp.int32)
    return jnp.take_along_axis(codebook, flat, axis=-1).reshape(indices.shape)


def nbytes(tree: object) -> int:
    """Returns the bytes of a pytree's arrays (or of their abstract shapes)."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def bits_per_parameter(q: QTensor) -> float:
    """Returns the storage of a weight in bits per element, including scales and codebook."""
    return 8 * nbytes(q) / math.prod(q.shape)


def check_codebook(values: np.ndarray) -> None:
    """Checks that `values` are sixteen non-decreasing numbers within [-1, 1].

    Raises:
      UserError: they are not.
    """
    if values.shape != (16,) or not np.all(np.diff(values) >= 0) or np.abs(values).max() > 1:
        raise UserError("codebook: give sixteen non-decreasing values from -1 to 1")


def check_block_size(block_size: int) -> None:
    """Checks that `block_size` is a power of two from 32 to 4096.

    Raises:
      UserError: it is not.
    """
    if block_size not in BLOCK_SIZES:
        allowed = ", ".join(map(str, BLOCK_SIZES))
        raise UserError(f"block_size {block_size} is not allowed; allowed: {allowed}")


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _quantize(
    w: jax.Array, codebook: jax.Array, block_size: int, double_quant: bool, nested_block: int
) -> tuple[QTensor, jax.Array]:
    *lead, k, n = w.shape
    nb = -(-k // block_size)
    x = _pad_rows(w.astype(jnp.float32), nb * block_size).reshape(*lead, nb, block_size, n)
    absmax = jnp.max(jnp.abs(x), axis=-2)
    safe = jnp.where(absmax > 0, absmax, 1.0)[..., None, :]
    # bitsandbytes multiplies full blocks by the reciprocal and divides a short last one.
    scaled = x * (1.0 / safe)
    if k % block_size:
        # XLA turns a division by a broadcast array into a product with the reciprocal. A divisor
        # that depends on x prevents this. Zero stays zero in both cases.
        divided = x / jnp.where(x == 0, 1.0, safe)
        scaled = jnp.where(jnp.arange(nb)[:, None, None] == nb - 1, divided, scaled)
    # XLA:CPU flushes subnormals to zero. In a codebook with two zeros one midpoint is zero, and a
    # positive weight must stay above it.
    positive = jax.lax.bitcast_convert_type(x, jnp.int32) > 0
    scaled = jnp.where(positive, jnp.maximum(scaled, jnp.finfo(jnp.float32).tiny), scaled)
    scaled = scaled.reshape(*lead, nb * block_size, n)
    middle = (codebook[1:] + codebook[:-1]) / 2
    above = [(scaled > middle[i]).astype(jnp.uint8) for i in range(15)]
    index = functools.reduce(jnp.add, above)
    index = _pad_rows(
        index[..., :k, :], -(-k // GROUP) * GROUP, jnp.sum(middle < 0).astype(jnp.uint8)
    )
    pairs = index.reshape(*lead, -1, 2, GROUP // 2, n)
    codes = (pairs[..., 0, :, :] | pairs[..., 1, :, :] << 4).reshape(*lead, -1, n)
    stored = SCALES[DOUBLE if double_quant else PLAIN].encode(absmax, nested_block)
    books = jnp.broadcast_to(codebook, (*lead, 16))
    q = QTensor(codes, *stored, books, k, block_size, nested_block)
    # absmax cannot replace this check: max on XLA:CPU may ignore NaN
    return q, jnp.isfinite(w).all()


def _pad_rows(x: jax.Array, rows: int, value: jax.Array | float = 0.0) -> jax.Array:
    pad = [(0, 0)] * (x.ndim - 2) + [(0, rows - x.shape[-2]), (0, 0)]
    return jnp.pad(x, pad, constant_values=value)

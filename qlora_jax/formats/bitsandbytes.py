"""Converts 4-bit weights of bitsandbytes to a QTensor and back, without rounding any value again.

bitsandbytes numbers the elements of W[out, in] row by row and cuts this list into blocks; a block
can cross the end of a row. One byte holds two codes, the first in the high 4 bits. Each `weight`
has further tensors: `absmax` (8-bit codes with double quantization), `quant_map`, with double
quantization `nested_absmax` and `nested_quant_map`, and `quant_state`, a JSON text. The value of a
code is quant_map[code]. FP4's codes are not in the order of their values.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qlora_jax.config import QuantConfig
from qlora_jax.quant import QTensor, quantize
from qlora_jax.quant.dynamic8 import dynamic_map
from qlora_jax.quant.qtensor import BLOCK_SIZES as HELD_BLOCKS
from qlora_jax.quant.qtensor import GROUP, with_plain_scales
from qlora_jax.quant.scales import DOUBLE, PLAIN
from qlora_jax.runtime import json_files
from qlora_jax.runtime.errors import UserError

CODEBOOKS = {"nf4": "nf4", "fp4": "fp4_bnb"}
"""quant_type of bitsandbytes to the name of the codebook in this project."""
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that bitsandbytes supports."""
NESTED_BLOCK = 256
SCALE_FORMATS = (PLAIN, DOUBLE)
"""Formats of block scales (`quant.scales`) that bitsandbytes supports."""
STATE = re.compile(r"(.+\.weight)\.quant_state\.bitsandbytes__(\w+)")
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
DTYPES: Mapping[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}

_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
_ORDER = {
    "nf4": np.arange(16, dtype=np.uint8),
    "fp4": np.argsort(np.append(_FP4, -_FP4), kind="stable").astype(np.uint8),
}
"""quant_type to its codes, sorted by value. FP4 has two zeros, of which code 0 comes first."""


@dataclasses.dataclass(frozen=True)
class StoredLayout:
    """The storage format of one 4-bit weight. Layers with equal formats can form one stack.

    Attributes:
      kind: quant_type, a key of `CODEBOOKS`.
      block: block size, in weights per scale.
      dtype: dtype of the weight before quantization, a key of `DTYPES`. bitsandbytes rounds
        dequantized values to it; a QTensor does not.
      shape: shape of the weight, (out, in).
      nested_block: scales per nested scale; None without double quantization.
      own_map: whether the 8-bit map of the scales differs from `dynamic_map`. If it does, the
        QTensor has float32 scales.
    """

    kind: str
    block: int
    dtype: str
    shape: tuple[int, int]
    nested_block: int | None
    own_map: bool = False

    @property
    def held_block(self) -> int | None:
        """Block size of a QTensor with exactly these values; None if a QTensor cannot hold them.

        A block of a QTensor lies within one column of W[in, out], but a stored block can cross the
        end of a row of W[out, in]. gcd(block, in) is the largest size whose blocks lie within both.
        """
        block = math.gcd(self.block, self.shape[1])
        return block if block in HELD_BLOCKS else None


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The 4-bit weights of a checkpoint.

    Attributes:
      config: quantization settings of the weights; of the first weight if they differ.
      layouts: parameter name to the storage format, for each weight that is stored in 4 bits.
    """

    config: QuantConfig
    layouts: Mapping[str, StoredLayout]

    @property
    def dequantized(self) -> list[str]:
        """Names of the weights that the model holds as floats, because no QTensor fits them."""
        return [name for name, layout in self.layouts.items() if layout.held_block is None]


def quantization(layouts: Mapping[str, StoredLayout]) -> Quantization | None:
    """Returns the `Quantization` with these layouts; None if `layouts` is empty."""
    if not layouts:
        return None
    first = next(iter(layouts.values()))
    config = QuantConfig(
        codebook=CODEBOOKS[first.kind],
        block_size=first.block,
        double_quant=first.nested_block is not None,
        nested_block=first.nested_block or NESTED_BLOCK,
    )
    return Quantization(config, layouts)


def read_layout(name: str, kind: str, state: bytes, nested_map: np.ndarray | None) -> StoredLayout:
    """Reads the storage format of a weight from its `quant_state`.

    Args:
      name: name of the weight, for messages.
      kind: quant_type in the name of the `quant_state` tensor.
      state: content of the `quant_state` tensor.
      nested_map: 8-bit map of the scales; None without double quantization.

    Raises:
      UserError: bitsandbytes does not have this quantization, or the text is not a `quant_state`.
    """
    if kind not in CODEBOOKS:
        raise UserError(
            f"{name}: quant_type {kind!r} is not known; known: {', '.join(CODEBOOKS)}. "
            "Give the 16-bit checkpoint"
        )
    raw = _state(name, state)
    try:
        out, inner = (int(size) for size in raw["shape"])
        nested = "nested_blocksize" in raw
        layout = StoredLayout(
            kind=raw["quant_type"],
            block=int(raw["blocksize"]),
            dtype=str(raw["dtype"]),
            shape=(out, inner),
            nested_block=int(raw["nested_blocksize"]) if nested else None,
            own_map=nested_map is not None and not np.array_equal(nested_map, dynamic_map()),
        )
        offset_is_there = not nested or math.isfinite(raw["nested_offset"])
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{name}: its quant_state has a missing or wrong value: {e}; download it again"
        ) from None
    sizes_are_known = layout.block in HELD_BLOCKS and (layout.nested_block or 1) > 0
    if layout.kind != kind or layout.dtype not in DTYPES or not sizes_are_known:
        raise UserError(
            f"{name}: quant_type {layout.kind!r}, blocksize {layout.block}, dtype "
            f"{layout.dtype!r} are not values that bitsandbytes writes for kind {kind}; "
            "give the 16-bit checkpoint"
        )
    if not offset_is_there:
        raise UserError(f"{name}: holds NaN or Inf; download it again")
    return layout


def check_parts(
    name: str, layout: StoredLayout, found: Mapping[str, tuple[tuple[int, ...], str, int]]
) -> None:
    """Checks that a weight and its further tensors have the dtypes and sizes of its layout.

    Args:
      name: name of the weight, for messages.
      layout: storage format of the weight.
      found: `weight` or one of `PARTS`, if the file has it, to its shape, dtype in safetensors and
        number of bytes.

    Raises:
      UserError: a tensor is missing or has another dtype or size. The message names the tensor.
    """
    count = math.prod(layout.shape)
    scales = -(-count // layout.block)
    nested = layout.nested_block
    sizes = {"weight": -(-count // 2), "absmax": scales * (1 if nested else 4), "quant_map": 64}
    if nested:
        sizes |= {"nested_absmax": 4 * -(-scales // nested), "nested_quant_map": 1024}
    for part, size in sizes.items():
        whole = name if part == "weight" else f"{name}.{part}"
        if part not in found:
            raise UserError(f"{whole}: missing beside its 4-bit weight; download it again")
        shape, dtype, held = found[part]
        if part != "weight" and dtype != ("U8" if part == "absmax" and nested else "F32"):
            raise UserError(f"{whole}: is stored as {dtype}; save it again with bitsandbytes")
        if held != size:
            raise UserError(
                f"{whole}: {held} bytes ({list(shape)}), not the {size} of a {layout.kind} "
                f"weight {list(layout.shape)} in blocks of {layout.block}; download it again"
            )


def read_weight(
    name: str,
    layout: StoredLayout,
    packed: np.ndarray,
    parts: Mapping[str, np.ndarray],
    state: bytes,
) -> QTensor | jax.Array:
    """Returns the weight W[in, out] for the model, with exactly the values of bitsandbytes.

    Args:
      name: name of the weight, for messages.
      layout: storage format of the weight.
      packed: packed codes, the bytes of an array of any dtype.
      parts: tensors of `PARTS` that belong to the weight.
      state: content of its `quant_state`.

    Returns:
      A QTensor. If a QTensor cannot hold such blocks (`StoredLayout.held_block` is None): a float
      array in the layout's dtype.

    Raises:
      UserError: scales or tables hold NaN or Inf.
    """
    if not all(np.isfinite(x).all() for x in parts.values()):
        raise UserError(f"{name}: holds NaN or Inf; download it again")
    packed = packed.reshape(-1).view(np.uint8)
    order = np.argsort(parts["quant_map"], kind="stable").astype(np.uint8)
    scales, nested, offset, block = parts["absmax"], None, None, layout.held_block
    if layout.nested_block is not None:
        nested, offset = parts["nested_absmax"], np.float32(_state(name, state)["nested_offset"])
        if layout.own_map or block is None:
            spread = np.repeat(nested, layout.nested_block)[: scales.size]
            scales, nested = parts["nested_quant_map"][scales] * spread + offset, None
    out, inner = layout.shape
    if block is None:
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: out * inner]
        values = parts["quant_map"][codes] * np.repeat(scales, layout.block)[: codes.size]
        return jnp.asarray(values.astype(DTYPES[layout.dtype]).reshape(out, inner).T)
    values = parts["quant_map"][order]
    times = layout.block // block
    scales = np.repeat(scales, times)[: out * inner // block].reshape(out, -1)
    return QTensor(
        codes=_planar(_renumbered(packed, np.argsort(order)), layout.shape, _zero(values)),
        scales=jnp.asarray(scales.T),
        nested=None if nested is None else jnp.asarray(nested),
        offset=None if nested is None else jnp.asarray(offset),
        codebook=jnp.asarray(values),
        in_features=inner,
        block_size=block,
        nested_block=(layout.nested_block or NESTED_BLOCK) * times,
    )


def encode(q: QTensor, layout: StoredLayout) -> dict[str, np.ndarray]:
    """Returns bitsandbytes' tensors of a weight. The keys are suffixes to the weight's name.

    This is the inverse of `read_weight` if `layout.held_block` is the block size of the QTensor. A
    weight whose blocks cross the ends of rows may be one column of all elements in the order of
    bitsandbytes. If bitsandbytes does not support the format of the scales, they are written as
    float32 absmax.

    Args:
      q: weight, [in, out] or [in * out, 1].
      layout: storage format of the weight.
    """
    if q.scales.dtype.name not in SCALE_FORMATS:
        q = with_plain_scales(q)
    order, every = _ORDER[layout.kind], layout.block // q.block_size
    values = np.empty(16, np.float32)
    values[order] = np.asarray(q.codebook) + 0.0  # + 0.0 changes -0 to 0
    state: dict[str, Any] = {
        "quant_type": layout.kind,
        "blocksize": layout.block,
        "dtype": layout.dtype,
        "shape": layout.shape,
    }
    flat = _flat(q.codes, q.in_features, _zero(np.asarray(q.codebook)))
    tensors = {
        "": _renumbered(np.asarray(flat), order)[:, None],
        ".absmax": np.asarray(q.scales).T.reshape(-1)[::every].copy(),
        ".quant_map": values,
    }
    if q.nested is not None and q.offset is not None:
        tensors[".nested_absmax"] = np.asarray(q.nested)
        tensors[".nested_quant_map"] = dynamic_map()
        state |= {
            "nested_blocksize": q.nested_block // every,
            "nested_dtype": "float32",
            "nested_offset": float(q.offset),
        }
    text = json.dumps(state).encode()
    tensors[f".quant_state.bitsandbytes__{layout.kind}"] = np.frombuffer(text, np.uint8)
    return tensors


def pack(name: str, weight: np.ndarray, quant: QuantConfig, dtype: str) -> dict[str, np.ndarray]:
    """Quantizes a weight as bitsandbytes does; a block can cross the end of a row.

    Args:
      name: name of the weight, for messages.
      weight: weight, float[out, in].
      quant: codebook, block size and double quantization.
      dtype: dtype to which the reader dequantizes; it is recorded in `quant_state`.

    Returns:
      Suffix to the weight's name, to the tensor.

    Raises:
      UserError: the weight holds NaN or Inf.
    """
    out, inner = weight.shape
    wide = jnp.asarray(weight, jnp.float32)
    q = quantize(
        wide.reshape(-1, 1) if inner % quant.block_size else wide.T,
        quant.codebook,
        quant.block_size,
        quant.double_quant,
        NESTED_BLOCK,
        name=name,
    )
    nested = NESTED_BLOCK if quant.double_quant else None
    return encode(
        q, StoredLayout(kind_of(quant.codebook), quant.block_size, dtype, (out, inner), nested)
    )


def quantization_config(quant: QuantConfig, compute_dtype: str) -> dict[str, Any]:
    """Returns the `quantization_config` of a config.json: all linears but the head are in 4 bits.

    Args:
      quant: quantization settings of the linears.
      compute_dtype: compute dtype that transformers uses.
    """
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind_of(quant.codebook),
        "bnb_4bit_use_double_quant": quant.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
    }


def kind_of(codebook_name: str) -> str:
    """Returns the quant_type of a codebook; raises UserError if bitsandbytes does not have it."""
    for kind, name in CODEBOOKS.items():
        if name == codebook_name:
            return kind
    raise UserError(
        f"codebook {codebook_name!r}: not in bitsandbytes; give {' or '.join(CODEBOOKS.values())}"
    )


def check_writable(quant: QuantConfig) -> None:
    """Raises UserError if bitsandbytes cannot read weights with these settings."""
    kind_of(quant.codebook)
    if quant.block_size not in BLOCK_SIZES:
        allowed = ", ".join(map(str, BLOCK_SIZES))
        raise UserError(f"block size {quant.block_size}: not in bitsandbytes; give {allowed}")


def _state(name: str, text: bytes) -> dict[str, Any]:
    try:
        raw = json_files.parse(text)
    except ValueError as e:
        raise UserError(f"{name}: its quant_state is not JSON ({e}); download it again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{name}: its quant_state is not a JSON object; download it again")
    return raw


def _zero(values: np.ndarray) -> int:
    """Returns the code of zero; of two zeros, the one to which bitsandbytes rounds."""
    return int(np.sum(values[1:] + values[:-1] < 0))


def _renumbered(packed: np.ndarray, codes: np.ndarray) -> np.ndarray:
    byte = np.arange(256)
    table = codes[byte >> 4] << 4 | codes[byte & 15]
    return table.astype(np.uint8)[packed]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _planar(packed: jax.Array, shape: tuple[int, int], zero: int) -> jax.Array:
    """Returns packed codes [ceil(out*in/2)] in the order of a QTensor, uint8[Kp/2, out]."""
    out, inner = shape
    codes = jnp.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: out * inner]
    codes = jnp.pad(codes.reshape(shape).T, ((0, -inner % GROUP), (0, 0)), constant_values=zero)
    pairs = codes.reshape(-1, 2, GROUP // 2, out)
    return (pairs[:, 0] | pairs[:, 1] << 4).reshape(-1, out)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _flat(codes: jax.Array, in_features: int, zero: int) -> jax.Array:
    """Computes the inverse of `_planar`. An odd last code is paired with the code of zero."""
    rows = codes.reshape(-1, GROUP // 2, codes.shape[-1])
    flat = jnp.stack([rows & 15, rows >> 4], axis=1).reshape(-1, codes.shape[-1])
    flat = flat[:in_features].T.reshape(-1)
    pairs = jnp.pad(flat, (0, flat.size % 2), constant_values=zero).reshape(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]

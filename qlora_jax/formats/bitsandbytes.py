"""bitsandbytes' 4-bit weights: its bytes to a QTensor and back, with nothing rounded again.

It numbers the elements of W[out, in] row by row, cuts that list into blocks, across the ends of
rows, and packs two codes a byte, the earlier one in the high nibble. Beside `weight` lie `absmax`
(8-bit codes with double quantization), `quant_map`, the two nested tables and `quant_state`, a
JSON text. A code's value is quant_map[code]; FP4's codes are not in the order of their values.
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
"""bitsandbytes' quant_type to the name of our codebook."""
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""The block sizes that bitsandbytes writes and computes with."""
NESTED_BLOCK = 256
SCALE_FORMATS = (PLAIN, DOUBLE)
"""The formats of block scales that bitsandbytes has (`quant.scales`)."""
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
"""Codes by ascending value; of FP4's two zeros code 0 comes first."""


@dataclasses.dataclass(frozen=True)
class StoredLayout:
    """How one weight is stored; layers whose weights are stored alike can be stacked.

    Attributes:
      kind: a key of `CODEBOOKS`.
      block: weights per scale.
      dtype: the dtype that the weight had before it was quantized, a key of `DTYPES`.
        bitsandbytes rounds to it on dequantizing; a QTensor does not.
      shape: [out, in].
      nested_block: scales per nested scale; None without double quantization.
      own_map: whether the scales' 8-bit map is another than `dynamic_map`, so that the scales
        are held in float32.
    """

    kind: str
    block: int
    dtype: str
    shape: tuple[int, int]
    nested_block: int | None
    own_map: bool = False

    @property
    def held_block(self) -> int | None:
        """Block size of a QTensor of these very values; None where there is none.

        Blocks of a QTensor stay within a column of W[in, out]. Where the stored ones do not, the
        largest power of two that divides both gives blocks that lie within stored ones.
        """
        block = math.gcd(self.block, self.shape[1])
        return block if block in HELD_BLOCKS else None


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The 4-bit weights of a checkpoint.

    Attributes:
      config: the settings that describe them, those of the first where they differ.
      layouts: by parameter name, each weight that is stored in 4 bits.
    """

    config: QuantConfig
    layouts: Mapping[str, StoredLayout]

    @property
    def dequantized(self) -> list[str]:
        """Weights whose blocks no QTensor has, and which are held as floats therefore."""
        return [name for name, layout in self.layouts.items() if layout.held_block is None]


def quantization(layouts: Mapping[str, StoredLayout]) -> Quantization | None:
    """What a checkpoint of these weights is; None where there are none."""
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
    """The layout that a `quant_state` tells.

    Args:
      name: of the weight, for messages.
      kind: what the tensor's own name says.
      state: its content.
      nested_map: the scales' 8-bit map, where there is one.

    Raises:
      UserError: a quantization that bitsandbytes does not have, or text that is not its state.
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
            f"{name}: its quant_state lacks or garbles {e}; download it again"
        ) from None
    sizes_are_known = layout.block in HELD_BLOCKS and (layout.nested_block or 1) > 0
    if layout.kind != kind or layout.dtype not in DTYPES or not sizes_are_known:
        raise UserError(
            f"{name}: quant_type {layout.kind!r}, blocksize {layout.block}, dtype "
            f"{layout.dtype!r} are not a weight of kind {kind} that bitsandbytes writes; "
            "give the 16-bit checkpoint"
        )
    if not offset_is_there:
        raise UserError(f"{name}: holds NaN or Inf; download it again")
    return layout


def check_parts(
    name: str, layout: StoredLayout, found: Mapping[str, tuple[tuple[int, ...], str, int]]
) -> None:
    """Compares the tensors beside a weight, and its bytes, with what its layout asks for.

    Args:
      name: of the weight.
      layout: of the weight.
      found: `weight` and each of `PARTS` that the file has, to shape, safetensors dtype and bytes.

    Raises:
      UserError: naming the tensor that is missing or of another size.
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
                f"{whole}: {held} bytes ({list(shape)}) and not the {size} of a {layout.kind} "
                f"weight {list(layout.shape)} in blocks of {layout.block}; download it again"
            )


def read_weight(
    name: str,
    layout: StoredLayout,
    packed: np.ndarray,
    parts: Mapping[str, np.ndarray],
    state: bytes,
) -> QTensor | jax.Array:
    """The weight [in, out] as the model holds it, with bitsandbytes' very values.

    Args:
      name: of the weight, for messages.
      layout: of the weight.
      packed: its bytes, in an array of any dtype.
      parts: the tensors of `PARTS` beside it.
      state: content of its `quant_state`.

    Returns:
      A QTensor; a float array in the layout's dtype where no QTensor has such blocks.

    Raises:
      UserError: scales or tables with NaN or Inf.
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
    """A QTensor as bitsandbytes' tensors, by what follows the name of the weight.

    The inverse of `read_weight` where `layout.held_block` is the QTensor's. A weight whose blocks cross
    the ends of rows may come as one column of all elements in bitsandbytes' order. Scales of a
    format that bitsandbytes lacks are written as absmax in float32.

    Args:
      q: W[in, out], or [in * out, 1].
      layout: how to store it.
    """
    if q.scales.dtype.name not in SCALE_FORMATS:
        q = with_plain_scales(q)
    order, every = _ORDER[layout.kind], layout.block // q.block_size
    values = np.empty(16, np.float32)
    values[order] = np.asarray(q.codebook) + 0.0  # no zero with a sign
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
    """Quantizes a weight as bitsandbytes does, blocks across the ends of rows included.

    Args:
      name: of the weight, for messages.
      weight: floats [out, in].
      quant: codebook, block size and double quantization.
      dtype: to record as what the weight dequantizes to.

    Returns:
      Tensors by what follows the name of the weight.

    Raises:
      UserError: NaN or Inf in it.
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
    """config.json's `quantization_config`: all linears but the head in 4 bits.

    Args:
      quant: how they are stored.
      compute_dtype: in which transformers is to multiply.
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
    """bitsandbytes' name of a codebook; UserError where it has none."""
    for kind, name in CODEBOOKS.items():
        if name == codebook_name:
            return kind
    raise UserError(
        f"codebook {codebook_name!r}: bitsandbytes has none; give {' or '.join(CODEBOOKS.values())}"
    )


def check_writable(quant: QuantConfig) -> None:
    """Raises UserError unless bitsandbytes can read what these settings give."""
    kind_of(quant.codebook)
    if quant.block_size not in BLOCK_SIZES:
        allowed = ", ".join(map(str, BLOCK_SIZES))
        raise UserError(f"block size {quant.block_size}: bitsandbytes has none; give {allowed}")


def _state(name: str, text: bytes) -> dict[str, Any]:
    try:
        raw = json_files.parse(text)
    except ValueError as e:
        raise UserError(f"{name}: its quant_state is not JSON ({e}); download it again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{name}: its quant_state is not a JSON object; download it again")
    return raw


def _zero(values: np.ndarray) -> int:
    """The code of zero: with two zeros, the one that bitsandbytes rounds to."""
    return int(np.sum(values[1:] + values[:-1] < 0))


def _renumbered(packed: np.ndarray, codes: np.ndarray) -> np.ndarray:
    byte = np.arange(256)
    table = codes[byte >> 4] << 4 | codes[byte & 15]
    return table.astype(np.uint8)[packed]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _planar(packed: jax.Array, shape: tuple[int, int], zero: int) -> jax.Array:
    """Flat codes [ceil(out*in/2)] in a QTensor's order, uint8[Kp/2, out]."""
    out, inner = shape
    codes = jnp.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: out * inner]
    codes = jnp.pad(codes.reshape(shape).T, ((0, -inner % GROUP), (0, 0)), constant_values=zero)
    pairs = codes.reshape(-1, 2, GROUP // 2, out)
    return (pairs[:, 0] | pairs[:, 1] << 4).reshape(-1, out)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _flat(codes: jax.Array, in_features: int, zero: int) -> jax.Array:
    """The inverse of `_planar`; a last half byte holds the code of zero."""
    rows = codes.reshape(-1, GROUP // 2, codes.shape[-1])
    flat = jnp.stack([rows & 15, rows >> 4], axis=1).reshape(-1, codes.shape[-1])
    flat = flat[:in_features].T.reshape(-1)
    pairs = jnp.pad(flat, (0, flat.size % 2), constant_values=zero).reshape(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]

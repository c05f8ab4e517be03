"""Reads the tensors of a .gguf file as floats, and puts their rows in Hugging Face's order."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, dequantize

from qlora_jax.formats.gguf.architectures import Architecture
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.weight_shapes import norms
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.gguf_header import GgufTensor

Layout = Callable[[np.ndarray], np.ndarray]
"""Function that converts a tensor of the file to Hugging Face's values and order of rows."""

FLOATS: dict[GGMLQuantizationType, Any] = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.BF16: ml_dtypes.bfloat16,
}


def read_tensor(tensor: GgufTensor) -> np.ndarray:
    """Reads one tensor as floats. A quantized tensor becomes float32."""
    # No memory map: its pages would stay in memory beside the dequantized copy.
    data = np.fromfile(tensor.file, np.uint8, tensor.nbytes, offset=tensor.offset)
    if tensor.type in FLOATS:
        return data.view(FLOATS[tensor.type]).reshape(tensor.shape)
    return dequantize(data.reshape(*tensor.shape[:-1], -1), tensor.type)


def check_dequantizable(name: str, tensor: GgufTensor, path: Path) -> None:
    """Raises UserError unless `read_tensor` can read a tensor of this type."""
    if tensor.type in FLOATS:
        return
    block = tensor.nbytes // math.prod(tensor.shape[:-1])
    try:
        dequantize(np.zeros((1, block), np.uint8), tensor.type)
    except NotImplementedError:
        raise UserError(
            f"{path}: {name} has type {tensor.type.name}, which cannot be dequantized; "
            "give a Q4, Q5, Q6, Q8, F16 or BF16 file"
        ) from None


def layouts(kind: Architecture, config: DecoderConfig, tensors: Iterable[str]) -> dict[str, Layout]:
    """Returns the conversion of each tensor that is not stored as Hugging Face stores it, by name.

    Args:
      kind: architecture of the file.
      config: the model's config.
      tensors: Hugging Face names of all tensors.
    """
    names, inside = config.names, dict[str, Layout]()
    if kind.permuted:
        inside[names.q_proj] = functools.partial(unpermute, heads=config.num_heads)
        inside[names.k_proj] = functools.partial(unpermute, heads=config.num_kv_heads)
    if config.fused_qkv == "interleaved":
        inside[names.qkv_proj] = functools.partial(interleave, heads=config.num_heads)
    if kind.norms_above_one:
        inside |= dict.fromkeys(norms(config), _less_one)
    layers = range(config.num_layers)
    modules = {f"{names.layers}.{i}.{p}": f for i in layers for p, f in inside.items()}
    if kind.norms_above_one:
        modules[names.norm] = _less_one
    return {name: modules[m] for name in tensors if (m := name.rpartition(".")[0]) in modules}


def _less_one(weight: np.ndarray) -> np.ndarray:
    return weight - 1


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rows of q or k back in Hugging Face's order.

    llama.cpp rotates pairs of neighbouring rows of a head. Hugging Face rotates pairs of rows that
    are half a head apart. So row 2i + j of a head in the file (j = 0 or 1) is row
    i + j·head_dim/2 in Hugging Face.

    Args:
      weight: weight or bias, [heads · head_dim, ...].
      heads: number of heads in the rows.
    """
    rows = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Changes the row order from (q, k, v) of all heads to (q, k, v) head by head (GPT-NeoX).

    Args:
      weight: weight or bias, [3 · heads · head_dim, ...].
      heads: number of heads of q, which k and v have too.
    """
    rows = weight.reshape(3, heads, weight.shape[0] // heads // 3, *weight.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(0, 1)).reshape(weight.shape)


def describe(tensors: Mapping[str, GgufTensor]) -> str:
    """Returns, in words, the type that stores most of the layers' weights."""
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        if ".layers." in name and len(tensor.shape) == 2:
            sizes[tensor.type.name] += math.prod(tensor.shape)
    kind = max(sizes, key=lambda k: sizes[k])
    return f"GGUF {kind}" if GGMLQuantizationType[kind] in FLOATS else f"dequantized {kind}"

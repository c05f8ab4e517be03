"""Reads a llama.cpp .gguf file as a Hugging Face checkpoint, dequantizing its weights."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, dequantize

from qlora_jax.errors import UserError
from qlora_jax.formats.gguf_header import GgufHeader, GgufTensor, read_header
from qlora_jax.formats.names import check_shapes
from qlora_jax.models.config import DecoderConfig, Rope, from_hugging_face

ARCHITECTURES = {"llama": True, "qwen2": False}
"""Supported values of `general.architecture`, and whether the rows of q and k are permuted."""

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_TABLE = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every Llama 3.1 to 3.3 has; a GGUF file holds only the table that follows from it."""

FLOATS: dict[GGMLQuantizationType, Any] = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.BF16: ml_dtypes.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class GgufCheckpoint:
    """A `Checkpoint` in a .gguf file. `permuted` holds the head counts of the permuted tensors."""

    path: Path
    config: DecoderConfig
    description: str
    tensors: dict[str, GgufTensor]
    permuted: dict[str, int]
    quantization: None = None

    @property
    def tokenizer_path(self) -> Path:
        return self.path

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        weight = _read(self.path, self.tensors[name])
        return unpermute(weight, self.permuted[name]) if name in self.permuted else weight


def open_gguf(path: Path) -> GgufCheckpoint:
    """Opens a .gguf file of one of `ARCHITECTURES`.

    Raises:
      UserError: not a whole GGUF file, an architecture, rope scaling or tensor that is not
        supported, or tensors that do not agree with the metadata.
    """
    header = read_header(path)
    architecture = header.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: architecture {architecture!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    found = {_hugging_face_name(n, path): t for n, t in header.tensors.items() if n != ROPE_TABLE}
    config = _config(header, found, path)
    expected = check_shapes({name: t.shape for name, t in found.items()}, config, path)
    tensors = {name: found[name] for name in expected}
    for name, tensor in tensors.items():
        if tensor.type not in FLOATS:
            _check_dequantizable(name, tensor, path)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    permuted = {n: heads[m] for n in tensors if (m := n.split(".")[-2]) in heads}
    return GgufCheckpoint(
        path=path,
        config=config,
        description=_describe(tensors),
        tensors=tensors,
        permuted=permuted if ARCHITECTURES[architecture] else {},
    )


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rows of q or k back in Hugging Face's order.

    llama.cpp rotates neighbouring rows of a head, Hugging Face rows that are half a head apart:
    file row 2i + j of a head is Hugging Face's row i + j·head_dim/2.

    Args:
      weight: [heads · head_dim, ...], a weight or a bias.
      heads: how many heads share the rows.
    """
    rows = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)


def _read(path: Path, tensor: GgufTensor) -> np.ndarray:
    # Not a memory map: its pages would stay resident beside the dequantized copy.
    data = np.fromfile(path, np.uint8, tensor.nbytes, offset=tensor.offset)
    if tensor.type in FLOATS:
        return data.view(FLOATS[tensor.type]).reshape(tensor.shape)
    return dequantize(data.reshape(*tensor.shape[:-1], -1), tensor.type)


def _check_dequantizable(name: str, tensor: GgufTensor, path: Path) -> None:
    block = tensor.nbytes // math.prod(tensor.shape[:-1])
    try:
        dequantize(np.zeros((1, block), np.uint8), tensor.type)
    except NotImplementedError:
        raise UserError(
            f"{path}: {name} has type {tensor.type.name}, which cannot be dequantized; "
            "give a Q4, Q5, Q6, Q8, F16 or BF16 file"
        ) from None


def _hugging_face_name(name: str, path: Path) -> str:
    stem, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer and layer[2] in LAYER:
        return f"model.layers.{layer[1]}.{LAYER[layer[2]]}.{kind}"
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    raise UserError(f"{path}: tensor {name} is not part of the decoders supported here")


def _config(header: GgufHeader, found: dict[str, GgufTensor], path: Path) -> DecoderConfig:
    architecture = header.metadata["general.architecture"]
    metadata = {
        key.removeprefix(f"{architecture}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{architecture}.")
    }

    def number(key: str, default: Any = None) -> Any:
        value = metadata.get(key, default)
        if not isinstance(value, int | float) or not value > 0:
            raise UserError(
                f"{path}: metadata {architecture}.{key} is {value!r}; expected a positive number"
            )
        return value

    heads = number("attention.head_count")
    head_dim = number("attention.key_length", number("embedding_length") // heads)
    rotated = metadata.get("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise UserError(
            f"{path}: {rotated} of {head_dim} dimensions per head are rotated; "
            "only decoders that rotate all of them are supported"
        )
    if metadata.get("attention.sliding_window"):
        raise UserError(
            f"{path}: sliding windows in GGUF files are not supported; give a Hugging Face folder"
        )
    embedding = found.get("model.embed_tokens.weight")
    if embedding is None:
        raise UserError(f"{path}: no token_embd.weight in it; a split file is not supported")
    config = from_hugging_face(
        {
            "model_type": architecture,
            "vocab_size": embedding.shape[0],
            "hidden_size": number("embedding_length"),
            "intermediate_size": number("feed_forward_length"),
            "num_hidden_layers": number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": number("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": number("context_length"),
            "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "lm_head.weight" not in found,
        },
        str(path),
    )
    first = "model.layers.0"
    return dataclasses.replace(
        config,
        rope=_rope(number, metadata.get("rope.scaling.type", "none"), header, head_dim, path),
        qkv_bias=f"{first}.self_attn.q_proj.bias" in found,
        output_bias=f"{first}.self_attn.o_proj.bias" in found,
        mlp_bias=f"{first}.mlp.down_proj.bias" in found,
    )


def _rope(
    number: Callable[..., Any], kind: Any, header: GgufHeader, head_dim: int, path: Path
) -> Rope:
    theta = float(number("rope.freq_base", 10000.0))
    if ROPE_TABLE in header.tensors:
        return _llama3_rope(theta, _read(path, header.tensors[ROPE_TABLE]), head_dim, path)
    if kind == "none":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=float(number("rope.scaling.factor")))
    raise UserError(
        f"{path}: rope scaling {kind!r} is not supported; supported: none, linear, llama3"
    )


def _llama3_rope(theta: float, table: np.ndarray, head_dim: int, path: Path) -> Rope:
    factor = max(round(float(table.max(initial=1)), 4), 1.0)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    length = LLAMA3["original_max_position_embeddings"]
    turns = length / (2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
    blend = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - blend) / factor + blend)
    if table.shape != expected.shape or not np.allclose(table, expected, rtol=1e-4):
        raise UserError(
            f"{path}: {ROPE_TABLE} is not Llama 3.1's rope scaling; give a Hugging Face folder"
        )
    return Rope(
        theta=theta,
        kind="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_positions=int(length),
    )


def _describe(tensors: dict[str, GgufTensor]) -> str:
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        if ".layers." in name and len(tensor.shape) == 2:
            sizes[tensor.type.name] += math.prod(tensor.shape)
    # Mixtures such as Q4_K_M are named by the type that holds the most weights.
    kind = max(sizes, key=lambda k: sizes[k])
    return f"GGUF {kind}" if GGMLQuantizationType[kind] in FLOATS else f"dequantized {kind}"

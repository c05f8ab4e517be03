"""Reads a llama.cpp .gguf file as a Hugging Face checkpoint, dequantizing its weights."""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, dequantize

from qlora_jax.formats.names import check_shapes
from qlora_jax.models.config import DecoderConfig, Rope, from_hugging_face
from qlora_jax.models.families import FAMILIES, Family
from qlora_jax.models.parts import norms
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.gguf_header import GgufHeader, GgufTensor, read_header


class Architecture(NamedTuple):
    """What llama.cpp's converter makes of a family.

    Attributes:
      family: the `model_type`.
      permuted: the rows of q and k are in another order (`unpermute`).
      norms_above_one: norm weights are stored with one added.
      wide_scale: number of layers of the one published model whose query_pre_attn_scalar is
        hidden / heads and not head_dim; the file says neither.
    """

    family: str
    permuted: bool = False
    norms_above_one: bool = False
    wide_scale: int = 0


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "smollm3": Architecture("smollm3", permuted=True),
    "olmo2": Architecture("olmo2"),
    "gemma": Architecture("gemma", norms_above_one=True),
    "gemma2": Architecture("gemma2", norms_above_one=True, wide_scale=46),
    "gemma3": Architecture("gemma3_text", norms_above_one=True, wide_scale=62),
    "phi3": Architecture("phi3"),
    "gptneox": Architecture("gpt_neox"),
}
"""Supported values of `general.architecture`."""

TOP = {"token_embd": "embed", "output_norm": "norm", "output": "head"}
LAYER = {
    "attn_norm": "attention_norm",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_qkv": "qkv_proj",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "attn_output": "o_proj",
    "post_attention_norm": "attention_post_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
    "post_ffw_norm": "mlp_post_norm",
}
"""A tensor's name to the part of `families.Names` it is."""

ROPE_TABLE = "rope_freqs.weight"
LONGROPE_TABLE = "rope_factors_long.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every Llama 3.1 to 3.3 has; a GGUF file holds only the table that follows from it."""

OPTIONS = {
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base_swa": "rope_local_base_freq",
    "use_parallel_residual": "use_parallel_residual",
}
"""Metadata to the key of a config.json; a family reads those it has."""

FLOATS: dict[GGMLQuantizationType, Any] = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.BF16: ml_dtypes.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class GgufCheckpoint:
    """A `Checkpoint` in a .gguf file. `layouts` hold what makes a tensor Hugging Face's."""

    path: Path
    config: DecoderConfig
    description: str
    tensors: dict[str, GgufTensor]
    layouts: dict[str, Callable[[np.ndarray], np.ndarray]]
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
        return self.layouts[name](weight) if name in self.layouts else weight


def open_gguf(path: Path) -> GgufCheckpoint:
    """Opens a .gguf file of one of `ARCHITECTURES`.

    Raises:
      UserError: not a whole GGUF file, an architecture, rope scaling or tensor that is not
        supported, or tensors that do not agree with the metadata.
    """
    header = read_header(path)
    architecture = str(header.metadata.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: architecture {architecture!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    if LONGROPE_TABLE in header.tensors:
        raise UserError(
            f"{path}: rope scaling 'longrope' ({LONGROPE_TABLE}) is not supported; "
            "supported: none, linear, llama3"
        )
    kind = ARCHITECTURES[architecture]
    found = {
        _hugging_face_name(n, FAMILIES[kind.family], path): t
        for n, t in header.tensors.items()
        if n != ROPE_TABLE
    }
    config = _config(header, found, path)
    expected = check_shapes({name: t.shape for name, t in found.items()}, config, path)
    tensors = {name: found[name] for name in expected}
    for name, tensor in tensors.items():
        if tensor.type not in FLOATS:
            _check_dequantizable(name, tensor, path)
    return GgufCheckpoint(
        path=path,
        config=config,
        description=_describe(tensors),
        tensors=tensors,
        layouts=_layouts(kind, config, tensors),
    )


def _layouts(
    kind: Architecture, config: DecoderConfig, tensors: Iterable[str]
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    names, inside = config.names, dict[str, Callable[[np.ndarray], np.ndarray]]()
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

    llama.cpp rotates neighbouring rows of a head, Hugging Face rows that are half a head apart:
    file row 2i + j of a head is Hugging Face's row i + j·head_dim/2.

    Args:
      weight: [heads · head_dim, ...], a weight or a bias.
      heads: how many heads share the rows.
    """
    rows = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q, k and v head by head, as GPT-NeoX has them, of all of q, then k, then v.

    Args:
      weight: [3 · heads · head_dim, ...], a weight or a bias.
      heads: of each.
    """
    rows = weight.reshape(3, heads, weight.shape[0] // heads // 3, *weight.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(0, 1)).reshape(weight.shape)


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


def _hugging_face_name(name: str, family: Family, path: Path) -> str:
    stem, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    part = LAYER.get(layer[2]) if layer else TOP.get(stem)
    if part is None:
        raise UserError(f"{path}: tensor {name} is not part of the decoders supported here")
    if part == "up_proj" and family.fixed.get("fused_gate_up"):
        part = "gate_up_proj"
    module = getattr(family.names, part)
    return f"{family.names.layers}.{layer[1]}.{module}.{kind}" if layer else f"{module}.{kind}"


def _config(header: GgufHeader, found: dict[str, GgufTensor], path: Path) -> DecoderConfig:
    architecture = header.metadata["general.architecture"]
    metadata = {
        key.removeprefix(f"{architecture}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{architecture}.")
    }

    def number(key: str, default: Any = None) -> Any:
        value = metadata.get(key, default)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(
                f"{path}: metadata {architecture}.{key} is {value!r}; expected a positive number"
            )
        return value

    kind = ARCHITECTURES[architecture]
    window = metadata.get("attention.sliding_window") or None
    # Mistral is llama's architecture with a window
    model_type = "mistral" if window and kind.family == "llama" else kind.family
    family = FAMILIES[model_type]
    names = family.names
    heads, hidden = number("attention.head_count"), number("embedding_length")
    layers, head_dim = number("block_count"), number("attention.key_length", hidden // heads)
    rotated = number("rope.dimension_count", head_dim)
    partial = "partial_rotary_factor" in {*family.keys, *family.defaults}
    if rotated != head_dim and not partial:
        raise UserError(
            f"{path}: {rotated} of {head_dim} dimensions per head are rotated; "
            f"architecture {architecture} is supported with all of them"
        )
    embedding = found.get(f"{names.embed}.weight")
    if embedding is None:
        raise UserError(f"{path}: no token_embd.weight in it; a split file is not supported")
    norm = "layer_norm_epsilon" if family.fixed.get("norm") == "layer" else "layer_norm_rms_epsilon"
    raw = {
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number(f"attention.{norm}"),
        "tie_word_embeddings": f"{names.head}.weight" not in found,
        "query_pre_attn_scalar": hidden // heads if layers == kind.wide_scale else head_dim,
    } | {key: metadata[said] for said, key in OPTIONS.items() if said in metadata}
    pattern = raw.pop("sliding_window_pattern", None)
    if isinstance(pattern, list):
        kinds = {True: "sliding_attention", False: "full_attention"}
        raw["layer_types"] = [kinds[bool(local)] for local in pattern]
    elif pattern:
        raw["sliding_window_pattern"] = pattern
    config = from_hugging_face({family.keys.get(k, k): v for k, v in raw.items()}, str(path))
    if window and not family.defaults.get("use_sliding_window"):
        raise UserError(
            f"{path}: metadata {architecture}.attention.sliding_window is {window}; sliding "
            f"windows of architecture {architecture} are not supported"
        )
    rope = _rope(number, metadata.get("rope.scaling.type", "none"), header, head_dim, path)
    first = f"{names.layers}.0"
    qkv = names.qkv_proj if config.fused_qkv else names.q_proj
    return dataclasses.replace(
        config,
        rope=dataclasses.replace(rope, fraction=rotated / head_dim),
        qkv_bias=f"{first}.{qkv}.bias" in found,
        output_bias=f"{first}.{names.o_proj}.bias" in found,
        mlp_bias=f"{first}.{names.down_proj}.bias" in found,
    )


def _rope(
    number: Callable[..., Any], kind: Any, header: GgufHeader, head_dim: int, path: Path
) -> Rope:
    family = FAMILIES[ARCHITECTURES[header.metadata["general.architecture"]].family]
    theta = float(number("rope.freq_base", family.defaults.get("rope_theta", 10000.0)))
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

"""Writes random weights in the shapes of real models, for benchmarks without a download."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from qlora_jax.formats.fetch import cache_folder
from qlora_jax.runtime.errors import UserError

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "random-smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "random-tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
}
"""Name to the entries of config.json that are not in `COMMON`."""

COMMON: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
SPREAD = 0.02
"""Standard deviation of the weight matrices."""


FILES = "config.json", "model.safetensors"


def folder(name: str, say: Callable[[str], None]) -> Path:
    """Returns the Hugging Face folder of a shape; the first use writes it to the cache.

    The files have the same bytes on every machine.

    Args:
      name: a key of `SHAPES`.
      say: function that gets a message before gigabytes are written.

    Raises:
      UserError: the cache folder cannot be written to.
    """
    target = cache_folder() / name
    if all((target / file).is_file() for file in FILES):
        return target
    config = {**COMMON, **SHAPES[name]}
    say(f"making random weights once: {target} ({2e-9 * parameters(config):.1f} GB)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".random-") as scratch:
            write(Path(scratch) / name, config)
            # Another process may have written the folder first; it has the same bytes.
            if not target.is_dir():
                os.replace(Path(scratch) / name, target)
    except OSError as e:
        raise UserError(
            f"{target}: cannot be written: {e.strerror}; set QLORA_JAX_CACHE to another folder"
        ) from None
    return target


def write(out: Path, config: Mapping[str, Any], seed: int = 0) -> None:
    """Writes a checkpoint: config.json and bfloat16 weights."""
    random = np.random.default_rng(seed)
    tensors = {name: _values(random, shape) for name, shape in shapes(config)}
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")


def parameters(config: Mapping[str, Any]) -> int:
    """Returns the number of weights of a checkpoint of this shape."""
    return sum(int(np.prod(shape)) for _, shape in shapes(config))


def shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields name and shape of each parameter of a Llama; linears are [out, in]."""
    hidden, inner, vocabulary = (
        config[k] for k in ("hidden_size", "intermediate_size", "vocab_size")
    )
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocabulary, hidden)


def _values(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Returns bfloat16 values: ones for a norm, normally distributed numbers for a matrix."""
    if len(shape) == 1:
        return np.ones(shape, ml_dtypes.bfloat16)
    return (random.standard_normal(shape, np.float32) * SPREAD).astype(ml_dtypes.bfloat16)

"""The shapes of published models, which allow to plan a run without the weights.

Every row repeats the config.json of a hub id. Sources:

- LLaMA: arXiv 2302.13971, table 2. The MLP size is that of transformers' converter: 8/3 of the
  hidden size, rounded up to a multiple of 256.
- SmolLM2: public copies of its config.json.
- The others: `config.py` of Lightning-AI/litgpt. The builders of pytorch/torchtune agree with it
  for the models that they have.

The number of parameters of each row equals the published number.
"""

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from qlora_jax.models.config import DecoderConfig, from_hugging_face
from qlora_jax.runtime.errors import UserError


class _Row(NamedTuple):
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool


_ROWS = {
    "llama-7b": _Row("llama", 4096, 11008, 32, 32, 32, 32000, 2048, 1e-6, 1e4, False),
    "llama-13b": _Row("llama", 5120, 13824, 40, 40, 40, 32000, 2048, 1e-6, 1e4, False),
    "llama-33b": _Row("llama", 6656, 17920, 60, 52, 52, 32000, 2048, 1e-6, 1e4, False),
    "llama-65b": _Row("llama", 8192, 22016, 80, 64, 64, 32000, 2048, 1e-5, 1e4, False),
    "llama2-70b": _Row("llama", 8192, 28672, 80, 64, 8, 32000, 4096, 1e-5, 1e4, False),
    "llama3-8b": _Row("llama", 4096, 14336, 32, 32, 8, 128256, 8192, 1e-5, 5e5, False),
    "llama3-70b": _Row("llama", 8192, 28672, 80, 64, 8, 128256, 8192, 1e-5, 5e5, False),
    "mistral-7b": _Row("mistral", 4096, 14336, 32, 32, 8, 32000, 32768, 1e-5, 1e4, False),
    "qwen2.5-0.5b": _Row("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, 1e-6, 1e6, True),
    "qwen2.5-1.5b": _Row("qwen2", 1536, 8960, 28, 12, 2, 151936, 131072, 1e-6, 1e6, True),
    "qwen2.5-3b": _Row("qwen2", 2048, 11008, 36, 16, 2, 151936, 32768, 1e-6, 1e6, True),
    "qwen2.5-7b": _Row("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072, 1e-6, 1e6, False),
    "qwen2.5-14b": _Row("qwen2", 5120, 13824, 48, 40, 8, 152064, 131072, 1e-5, 1e6, False),
    "qwen2.5-32b": _Row("qwen2", 5120, 27648, 64, 40, 8, 152064, 131072, 1e-5, 1e6, False),
    "qwen2.5-72b": _Row("qwen2", 8192, 29568, 80, 64, 8, 152064, 131072, 1e-5, 1e6, False),
    "smollm2-135m": _Row("llama", 576, 1536, 30, 9, 3, 49152, 8192, 1e-5, 1e5, True),
    "smollm2-360m": _Row("llama", 960, 2560, 32, 15, 5, 49152, 8192, 1e-5, 1e5, True),
    "smollm2-1.7b": _Row("llama", 2048, 8192, 24, 32, 32, 49152, 8192, 1e-5, 1.3e5, True),
    "tinyllama-1.1b": _Row("llama", 2048, 5632, 22, 32, 4, 32000, 2048, 1e-5, 1e4, False),
}

SHAPES: Mapping[str, DecoderConfig] = {
    name: from_hugging_face(row._asdict(), name) for name, row in _ROWS.items()
}
"""Name of a published model to its config."""

HUB: Mapping[str, str] = {
    "huggyllama/llama-7b": "llama-7b",
    "huggyllama/llama-13b": "llama-13b",
    "huggyllama/llama-30b": "llama-33b",
    "huggyllama/llama-65b": "llama-65b",
    "meta-llama/Llama-2-70b-hf": "llama2-70b",
    "meta-llama/Meta-Llama-3-8B": "llama3-8b",
    "meta-llama/Meta-Llama-3-70B": "llama3-70b",
    "mistralai/Mistral-7B-v0.1": "mistral-7b",
    **{f"Qwen/Qwen2.5-{s}B": f"qwen2.5-{s}b" for s in ("0.5", "1.5", "3", "7", "14", "32", "72")},
    **{f"HuggingFaceTB/SmolLM2-{s}": f"smollm2-{s.lower()}" for s in ("135M", "360M", "1.7B")},
    "smollm2-135m-instruct": "smollm2-135m",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "tinyllama-1.1b",
}
"""Hub id or built-in model to its name in `SHAPES`. `find` also accepts an id with `-Instruct`,
because an Instruct model has the tensor names and shapes of its base model."""


def config_json(name: str) -> dict[str, Any]:
    """Returns the config.json of a model in `SHAPES`, for a program without `DecoderConfig`."""
    return _ROWS[name]._asdict()


def find(name: str) -> DecoderConfig:
    """Returns the config of a published model.

    Args:
      name: a name in `SHAPES`, or a hub id in `HUB`, with or without `-Instruct`.

    Raises:
      UserError: the name is not known. The message gives the nearest known name.
    """
    for known in (name, name.removesuffix("-Instruct")):
        if (model := HUB.get(known, known)) in SHAPES:
            return SHAPES[model]
    nearest = difflib.get_close_matches(name, [*SHAPES, *HUB], n=1, cutoff=0)[0]
    raise UserError(f"{name}: no published shape by that name; the nearest known one is {nearest}")

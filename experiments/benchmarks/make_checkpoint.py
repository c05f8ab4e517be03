"""Makes a random checkpoint of a real model's shape, to measure on without downloading one.

Command: python experiments/benchmarks/make_checkpoint.py OUT --shape smollm2-135m|tinyllama-1.1b
Cost: seconds and 270 MB, or half a minute and 2.2 GB. The same bytes for the same seed.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHAPES = {
    "smollm2-135m": {
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
    "tinyllama-1.1b": {
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
COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
SPREAD = 0.02
"""Standard deviation of the matrices."""


def shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's parameters, linears [out, in]."""
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


def values(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """bfloat16: ones for a norm, normal numbers for a matrix."""
    if len(shape) == 1:
        return np.ones(shape, ml_dtypes.bfloat16)
    return (random.standard_normal(shape, np.float32) * SPREAD).astype(ml_dtypes.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = COMMON | SHAPES[options.shape]
    random = np.random.default_rng(options.seed)
    tensors = {name: values(random, shape) for name, shape in shapes(config)}
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, options.out / "model.safetensors", metadata={"format": "pt"})
    (options.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{options.out}: {sum(t.size for t in tensors.values()):,} parameters")


if __name__ == "__main__":
    main()

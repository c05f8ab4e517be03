"""Random tiny models, loaded both by transformers and by us."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.config import LoraConfig, QuantConfig
from qlora_jax.formats import peft as peft_format
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.lora import Adapter, AdapterSpec, choose_adapters
from qlora_jax.models.decoder import Decoder, attach

REASON = "needs the parity extra (make parity)"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

torch.set_num_threads(2)
transformers.utils.logging.disable_progress_bar()

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
GEMMA = {
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 11,
    "tie_word_embeddings": True,
}
KINDS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-biases": (
        "llama",
        {"rope_parameters": LINEAR_ROPE, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": ("mistral", {"sliding_window": 11}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "pad_token_id": None}),
    "olmo2": ("olmo2", {}),
    "gemma": ("gemma", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 6.0}),
    "gemma3": ("gemma3_text", GEMMA | {"sliding_window_pattern": 2}),
    "phi3": (
        "phi3",
        {
            "sliding_window": 20,
            "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
        },
    ),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": 4}),
    "gpt_neox-serial": (
        "gpt_neox",
        {"num_key_value_heads": 4, "use_parallel_residual": False, "rotary_pct": 1.0},
    ),
    "opt": (
        "opt",
        {
            "ffn_dim": 128,
            "word_embed_proj_dim": 64,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
    ),
}
"""Name to `model_type` and the differences from `SHAPE`."""


def save(folder: Path, kind: str, seed: int) -> Path:
    """Writes a random model of a kind as a Hugging Face folder, in float32."""
    family, settings = KINDS[kind]
    random = torch.Generator().manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **SHAPE | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            # Norms differ from one and biases from zero, so that ignoring one changes the logits.
            fresh = 0.06 * noise if parameter.ndim == 2 else parameter + 0.1 * noise
            parameter.copy_(fresh)
    model.save_pretrained(folder)
    return folder


def theirs(folder: Path, **options: Any) -> Any:
    """Loads the model with transformers, in float32 and evaluation mode."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"} | options
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def ours(folder: Path, quant: QuantConfig | None = None) -> Decoder:
    """Loads the model with our loader, in float32."""
    return load_model(open_folder(folder), quant=quant, dtype=jnp.float32)


def tokens(model: Decoder, seed: int, rows: int = 2, length: int = 48) -> np.ndarray:
    """Returns random ids, int32[rows, length]."""
    random = np.random.default_rng(seed)
    return random.integers(0, model.config.vocab_size, (rows, length), dtype=np.int32)


def their_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Returns transformers' logits, float32[B, T, vocab]."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids).long()).logits.float().numpy()


def our_logits(model: Decoder, ids: np.ndarray) -> np.ndarray:
    """Returns our logits, float32[B, T, vocab]."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden = model.hidden(jnp.asarray(ids), jnp.ones_like(ids), positions, dtype=jnp.float32)
    return np.asarray(model.logits(hidden))


def adapt(model: Decoder, config: LoraConfig, seed: int, *, zero_b: bool = False) -> None:
    """Attaches adapters, in place; B is random, or zero if `zero_b`."""
    attach(model, choose_adapters(config, model.linears()), jax.random.key(seed), init=config.init)
    if zero_b:
        return
    random = np.random.default_rng(seed)
    for _, adapter, i, spec in adapters(model):
        b = adapter.b.get_value()
        fresh = 0.05 * random.standard_normal((spec.rank, b.shape[-1]), np.float32)
        adapter.b.set_value(b.at[i, : spec.rank].set(fresh))


def read_adapter(model: Decoder, folder: Path) -> None:
    """Attaches the adapters of a folder in PEFT's format, in place."""
    read = peft_format.read_adapter(folder)
    specs = {path: AdapterSpec(a.rank, a.alpha, a.scale) for path, a in read.adapters.items()}
    assert specs.keys() <= model.linears().keys()
    attach(model, specs, jax.random.key(0))
    for path, adapter, i, spec in adapters(model):
        stored = read.adapters[path]
        adapter.a.set_value(adapter.a.get_value().at[i, :, : spec.rank].set(stored.a))
        adapter.b.set_value(adapter.b.get_value().at[i, : spec.rank].set(stored.b))


def adapters(model: Decoder) -> Iterator[tuple[str, Adapter, int, AdapterSpec]]:
    """Yields, for every adapted linear, its path, the stacked adapter, its index and its spec."""
    for path, linear, i in model.walk():
        if linear.adapter is not None and (spec := linear.adapter.specs[i]) is not None:
            yield path, linear.adapter, i, spec

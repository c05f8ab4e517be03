"""Language models of google-tunix (NNX)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.other_models.cases import (
    BATCH,
    HIDDEN,
    LENGTH,
    VOCABULARY,
    Case,
    drawn,
    tokens,
)

# a down projection contracts 96 features, which is no multiple of the block size 64
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "embed_dim": HIDDEN,
    "hidden_dim": 96,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
}
ROTARY: dict[str, Any] = {"vocab_size": VOCABULARY, "rope_theta": 10_000, "norm_eps": 1e-6}
ATTENTION, DENSE = r"attn\.[qkvo]_proj\.w", r"mlp\.\w+_proj\.kernel"
QUERY_VALUE = r"layers\.\d+\.attn\.[qv]_proj\.w"


def qwen3(seed: int, **changes: Any) -> nnx.Module:
    """Returns Qwen 3 with an untied head."""
    from tunix.models.qwen3 import model as qwen

    config = qwen.ModelConfig(**SIZES | ROTARY | changes)
    return drawn(qwen.Qwen3(config, rngs=nnx.Rngs(seed)), seed)


def qwen3_moe(seed: int) -> nnx.Module:
    """Returns Qwen 3 with four experts, two for each token, and a tied head."""
    return qwen3(seed, num_experts=4, num_experts_per_tok=2, use_tied_embedding=True)


def llama3(seed: int, remat: str = "NONE") -> nnx.Module:
    """Returns Llama 3."""
    from tunix.models.llama3 import model as llama

    config = llama.ModelConfig(**SIZES, **ROTARY, remat_config=llama.RematConfig[remat])
    return drawn(llama.Llama3(config, rngs=nnx.Rngs(seed)), seed)


def gemma3(seed: int, **changes: Any) -> nnx.Module:
    """Returns Gemma 3; keys and values share one stacked kernel."""
    from tunix.models.gemma3 import model as gemma

    own = {"num_embed": VOCABULARY, "sliding_window_size": 8, "param_dtype": jnp.float32}
    config = gemma.ModelConfig(**SIZES | own | changes)
    return drawn(gemma.Gemma3(config, rngs=nnx.Rngs(seed)), seed)


def example() -> tuple[Any, ...]:
    """Returns tokens, positions, no cache and a causal mask."""
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (BATCH, LENGTH, LENGTH))
    return tokens(), positions, None, mask


def logits(result: Any) -> jax.Array:
    """Returns the logits, the first result of a call; the second is the cache."""
    return result[0]


def _case(name: str, build: Any, kernels: str, adapted: str, **more: Any) -> Case:
    kernels = rf"layers\.\d+\.({kernels})"
    return Case(f"tunix {name}", "tunix", build, example, logits, kernels, adapted, **more)


CASES = (
    _case("Qwen 3", qwen3, f"{ATTENTION}|{DENSE}", QUERY_VALUE),
    _case(
        "Qwen 3 MoE",
        qwen3_moe,
        rf"{ATTENTION}|mlp\.\w+_proj",
        r"layers\.\d+\.(attn\.[qv]_proj\.w|mlp\.\w+_proj)",
    ),
    _case("Llama 3", llama3, f"{ATTENTION}|{DENSE}", QUERY_VALUE),
    _case(
        "Llama 3, remat",
        lambda seed: llama3(seed, "DECODER"),
        f"{ATTENTION}|{DENSE}",
        QUERY_VALUE,
    ),
    _case(
        "Gemma 3",
        gemma3,
        r"attn\.\w+_einsum\.w|mlp\.\w+_proj\.kernel",
        r"layers\.\d+\.attn\.(q|kv)_einsum\.w",
    ),
    _case(
        "Gemma 3, bfloat16",
        lambda seed: gemma3(seed, param_dtype=jnp.bfloat16),
        r"attn\.\w+_einsum\.w|mlp\.\w+_proj\.kernel",
        r"layers\.\d+\.attn\.(q|kv)_einsum\.w",
        dtype=jnp.bfloat16,
    ),
    _case(
        "Gemma 3, one kernel for q, k and v",
        lambda seed: gemma3(seed, num_kv_heads=4),
        r"attn\.\w+_einsum\.w|mlp\.\w+_proj\.kernel",
        r"layers\.\d+\.attn\.qkv_einsum\.w",
    ),
)

"""The diffusion transformer of avitai-artifex (NNX)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.other_models.cases import BATCH, HIDDEN, Case, drawn


def dit(seed: int) -> nnx.Module:
    """Returns a DiT with classes for images of 8 x 8 pixels in 4 patches."""
    from artifex.generative_models.models.backbones.dit import DiffusionTransformer

    model = DiffusionTransformer(
        img_size=8,
        patch_size=4,
        hidden_size=HIDDEN,
        depth=2,
        num_heads=4,
        num_classes=10,
        rngs=nnx.Rngs(seed),
    )
    return drawn(model, seed)


def example() -> tuple[Any, ...]:
    """Returns images, times and classes."""
    images = jax.random.normal(jax.random.key(9), (BATCH, 8, 8, 3))
    return images, jnp.array([10.0, 500.0]), jnp.array([1, 7])


ATTENTION = r"attn\.(query|key|value|out)\.kernel"
REST = r"(mlp|adaLN_modulation)\.layers\.\d+\.kernel"
CASES = (
    Case(
        "artifex DiT",
        "artifex",
        dit,
        example,
        lambda result: result,
        rf"blocks\.\d+\.({ATTENTION}|{REST})",
        r"blocks\.\d+\.attn\.(query|value)\.kernel",
    ),
)

"""Gemma 3 of the package gemma (Linen)."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.other_models import absent
from experiments.other_models.cases import HIDDEN, VOCABULARY, Case, random_weights, tokens


def gemma3(seed: int) -> tuple[Any, Any]:
    """Returns the module and its params; one layer has sliding-window attention, one global."""
    with absent.standing_in():
        from gemma import gm
        from gemma.gm.nn import _config, _modules

        kinds = _modules.AttentionType
        module = gm.nn.Transformer(
            config=_config.TransformerConfig(
                num_embed=VOCABULARY,
                embed_dim=HIDDEN,
                hidden_dim=128,
                num_heads=4,
                head_dim=16,
                num_kv_heads=2,
                final_logit_softcap=None,
                use_post_attn_norm=True,
                use_post_ffw_norm=True,
                attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
                sliding_window_size=8,
                use_qk_norm=True,
                transpose_gating_einsum=True,
            ),
            dtype=jnp.float32,
        )
        params = module.init(jax.random.key(seed), tokens())["params"]
    return module, random_weights(params, seed)


CASES = (
    Case(
        "gemma Gemma 3",
        "gemma",
        gemma3,
        lambda: (tokens(),),
        lambda result: result.logits,
        r"layer_\d+\.(attn\.\w+_einsum\.w|mlp\.(gating_einsum|linear))",
        r"layer_\d+\.attn\.(q|kv)_einsum\.w",
        linen=True,
    ),
)

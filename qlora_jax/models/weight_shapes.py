"""The paths (Hugging Face names) and shapes of a decoder's weights, from its config."""

from typing import NamedTuple

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.families import HEAD


class LinearShape(NamedTuple):
    """Shape of one linear of a layer, and whether the linear has a bias."""

    inputs: int
    outputs: int
    bias: bool


def linears(config: DecoderConfig) -> dict[str, LinearShape]:
    """Returns the linears of one layer in order of use, by path in the layer (self_attn.q_proj)."""
    names, hidden, inner = config.names, config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if config.fused_qkv:
        attention = {names.qkv_proj: LinearShape(hidden, query + 2 * key, config.qkv_bias)}
    else:
        attention = {
            names.q_proj: LinearShape(hidden, query, config.qkv_bias),
            names.k_proj: LinearShape(hidden, key, config.qkv_bias),
            names.v_proj: LinearShape(hidden, key, config.qkv_bias),
        }
    attention[names.o_proj] = LinearShape(query, hidden, config.output_bias)
    if config.fused_gate_up:
        mlp = {names.gate_up_proj: LinearShape(hidden, 2 * inner, config.mlp_bias)}
    else:
        up = (names.gate_proj, names.up_proj) if config.gated else (names.up_proj,)
        mlp = {path: LinearShape(hidden, inner, config.mlp_bias) for path in up}
    mlp[names.down_proj] = LinearShape(inner, hidden, config.mlp_bias)
    return attention | mlp


def layer_linears(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Returns the linears of all layers: Hugging Face path to (in_features, out_features)."""
    return {
        f"{config.names.layers}.{i}.{path}": (linear.inputs, linear.outputs)
        for i in range(config.num_layers)
        for path, linear in linears(config).items()
    }


def outer_modules(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Returns the embedding and the head, which LoRA can adapt: module path to (in, out)."""
    vocabulary, hidden = config.vocab_size, config.hidden_size
    return {config.names.embed: (vocabulary, hidden), HEAD: (hidden, vocabulary)}


def adaptable(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Returns all modules that LoRA can adapt: module path to (in, out)."""
    return layer_linears(config) | outer_modules(config)


def norms(config: DecoderConfig) -> dict[str, int]:
    """Returns the norms of one layer: path in the layer to number of features."""
    names, hidden = config.names, config.hidden_size
    found: dict[str, int] = {}
    if config.pre_norms:
        found |= {names.attention_norm: hidden, names.mlp_norm: hidden}
    if config.post_norms:
        found |= {names.attention_post_norm: hidden, names.mlp_post_norm: hidden}
    if config.qk_norm:
        heads = (1, 1) if config.qk_norm == "head" else (config.num_heads, config.num_kv_heads)
        found |= {path: h * config.head_dim for path, h in zip((names.q_norm, names.k_norm), heads)}
    return found


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every parameter, in layer order; linears are [out, in].

    The head is included only if the embeddings are not tied.
    """
    names, hidden = config.names, config.hidden_size
    norm_parts = ("weight", "bias") if config.norm == "layer" else ("weight",)
    layer: dict[str, tuple[int, ...]] = {}
    for path, features in norms(config).items():
        layer |= {f"{path}.{part}": (features,) for part in norm_parts}
    for path, linear in linears(config).items():
        layer[f"{path}.weight"] = (linear.outputs, linear.inputs)
        if linear.bias:
            layer[f"{path}.bias"] = (linear.outputs,)
    found: dict[str, tuple[int, ...]] = {f"{names.embed}.weight": (config.vocab_size, hidden)}
    if config.positions_before is not None:
        rows = config.max_positions + config.positions_before
        found[f"{names.positions}.weight"] = (rows, hidden)
    for i in range(config.num_layers):
        found |= {f"{names.layers}.{i}.{name}": shape for name, shape in layer.items()}
    found |= {f"{names.norm}.{part}": (hidden,) for part in norm_parts}
    if not config.tie_embeddings:
        found[f"{names.head}.weight"] = (config.vocab_size, hidden)
    return found

"""The Hugging Face parameter names of a Llama-like decoder, and the check against a file's."""

from collections.abc import Mapping

from qlora_jax.errors import UserError
from qlora_jax.models.config import DecoderConfig

SHOWN = 4


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter name of the decoder and its shape, in layer order; linears are [out, in].

    `lm_head.weight` is among them only if the embeddings are not tied.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (query, hidden, config.qkv_bias),
        "self_attn.k_proj": (key, hidden, config.qkv_bias),
        "self_attn.v_proj": (key, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, query, config.output_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}.{name}.bias"] = (rows,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_shapes(
    found: Mapping[str, tuple[int, ...]], config: DecoderConfig, where: object
) -> dict[str, tuple[int, ...]]:
    """Compares the tensors of a file with those the decoder has; returns the expected ones.

    A tensor the decoder has no place for is refused, because leaving it out would compute another
    function. Harmless and allowed: a head beside tied embeddings, and old files' rotary tables.

    Args:
      found: name to shape of everything in the file.
      config: the decoder.
      where: the file or folder, for messages.

    Raises:
      UserError: naming the tensors that are missing, of another shape or unknown.
    """
    expected = expected_shapes(config)
    if missing := [name for name in expected if name not in found]:
        raise UserError(
            f"{where}: not a whole {config.family} checkpoint; missing: {_some(missing)}"
        )
    wrong = [
        f"{name} is {list(found[name])} and not {list(shape)}"
        for name, shape in expected.items()
        if found[name] != shape
    ]
    if wrong:
        raise UserError(f"{where}: shapes do not agree with the model's config: {_some(wrong)}")
    unknown = [name for name in found if name not in expected and not _harmless(name)]
    if unknown:
        raise UserError(
            f"{where}: tensors that a {config.family} decoder with this config has no place for: "
            f"{_some(unknown)}"
        )
    return expected


def _harmless(name: str) -> bool:
    return name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq")


def _some(items: list[str]) -> str:
    rest = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")

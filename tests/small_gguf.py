"""Writes a GGUF file of the tiny model, as llama.cpp's converter would."""

from pathlib import Path

import gguf
import numpy as np
from gguf import TokenType
from safetensors.numpy import load_file

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def to_gguf(name: str, weight: np.ndarray) -> tuple[str, np.ndarray]:
    """Returns the name and content of a tensor as llama.cpp's converter writes them."""
    stem = name.removesuffix(".weight")
    heads = {"q_proj": 4, "k_proj": 2}.get(stem.rpartition(".")[2])
    if heads:
        weight = weight.reshape(heads, 2, 8, -1).swapaxes(1, 2).reshape(weight.shape)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[rest]}.weight", weight
    return f"{GGUF_NAMES[stem]}.weight", weight


def write_gguf(path: Path, folder: Path, tokens: tuple[str, ...], template: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(3)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    # The array of merges may not be empty, so it holds one merge that the data never uses.
    tokens = (*tokens, "ðð")
    kinds = [TokenType.CONTROL if t.startswith("<|") else TokenType.NORMAL for t in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(tokens))
    writer.add_token_types(kinds)
    writer.add_token_merges(["ð ð"])
    writer.add_eos_token_id(tokens.index("<|endoftext|>"))
    writer.add_chat_template(template)
    for name, weight in load_file(folder / "model.safetensors").items():
        writer.add_tensor(*to_gguf(name, np.ascontiguousarray(weight)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

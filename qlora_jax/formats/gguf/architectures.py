"""The architectures of .gguf files: which family each is, and what its tensors are called."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from qlora_jax.models.families import Family
from qlora_jax.runtime.errors import UserError


class Architecture(NamedTuple):
    """How llama.cpp's converter stores a family.

    Attributes:
      family: the `model_type`.
      permuted: the rows of q and k are in another order (`unpermute`).
      norms_above_one: norm weights are stored with one added.
      wide_scale: number of layers of the one published model whose query_pre_attn_scalar is
        hidden / heads and not head_dim; the file says neither.
    """

    family: str
    permuted: bool = False
    norms_above_one: bool = False
    wide_scale: int = 0


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "smollm3": Architecture("smollm3", permuted=True),
    "olmo2": Architecture("olmo2"),
    "gemma": Architecture("gemma", norms_above_one=True),
    "gemma2": Architecture("gemma2", norms_above_one=True, wide_scale=46),
    "gemma3": Architecture("gemma3_text", norms_above_one=True, wide_scale=62),
    "phi3": Architecture("phi3"),
    "gptneox": Architecture("gpt_neox"),
}
"""Supported values of `general.architecture`."""

TOP = {"token_embd": "embed", "output_norm": "norm", "output": "head"}
LAYER = {
    "attn_norm": "attention_norm",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_qkv": "qkv_proj",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "attn_output": "o_proj",
    "post_attention_norm": "attention_post_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
    "post_ffw_norm": "mlp_post_norm",
}
"""A tensor's name to the part of `families.Names` it is."""


def hugging_face_name(name: str, family: Family, path: Path) -> str:
    """Returns the name in a checkpoint of the family of a tensor such as blk.0.attn_q.weight.

    Raises:
      UserError: no part of the decoder has this name; `path` is for the message.
    """
    stem, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    part = LAYER.get(layer[2]) if layer else TOP.get(stem)
    if part is None:
        raise UserError(
            f"{path}: tensor {name} is not part of the decoders supported here; give another model"
        )
    if part == "up_proj" and family.fixed.get("fused_gate_up"):
        part = "gate_up_proj"
    module = getattr(family.names, part)
    return f"{family.names.layers}.{layer[1]}.{module}.{kind}" if layer else f"{module}.{kind}"

"""The supported architectures of .gguf files: their families and their tensor names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from qlora_jax.models.families import Family
from qlora_jax.runtime.errors import UserError


class Architecture(NamedTuple):
    """The form in which llama.cpp's converter stores a family.

    Attributes:
      family: `model_type` of the family.
      permuted: whether the rows of q and k are in another order (`unpermute`).
      norms_above_one: whether 1 is added to the stored norm weights.
      wide_scale: number of layers of the published model of this family whose
        query_pre_attn_scalar is hidden / heads; in all others it is head_dim. The file does not
        hold this value. 0: there is no such model.
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
"""Supported value of `general.architecture` to its `Architecture`."""

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
"""Name of a layer's tensor to the field of `families.Names`. `TOP` has the names outside layers."""


def hugging_face_name(name: str, family: Family, path: Path) -> str:
    """Returns the Hugging Face name of a tensor.

    Args:
      name: name in the file, such as blk.0.attn_q.weight.
      family: family of the model.
      path: path of the file, for the message.

    Raises:
      UserError: the decoder has no part for this tensor.
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

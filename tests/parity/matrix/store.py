"""Writes a random model with given options as a folder, in the layouts that exist in practice."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from matrix.options import AXES, BASE, FAMILY_BASE, LEFT_OUT

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
Raw = dict[str, Any]
State = dict[str, torch.Tensor]


def raw_config(family: str, row: Mapping[str, str], changes: Mapping[str, Any] = {}) -> Raw:
    """Returns a case's config.json with transformers 4's keys; `changes` apply last."""
    raw: Raw = {"model_type": family, **BASE, **FAMILY_BASE.get(family, {})}
    for axis, choices in AXES[family].items():
        raw |= choices[row[axis]]
    raw |= changes
    return {key: value for key, value in raw.items() if value is not LEFT_OUT}


def rewritten(raw: Raw) -> Raw:
    """Returns the config that transformers 5 writes after it read this one."""
    kind = transformers.CONFIG_MAPPING[raw["model_type"]]
    return json.loads(kind.from_dict(dict(raw)).to_json_string(use_diff=True))


def with_dtype(raw: Raw) -> Raw:
    return {**raw, "torch_dtype": "float32", "transformers_version": "4.57.1"}


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


def only_differences(raw: Raw) -> Raw:
    """Returns the config without values equal to the class's defaults, but with the sizes."""
    usual = transformers.CONFIG_MAPPING[raw["model_type"]]().to_dict()
    kept = {k: v for k, v in raw.items() if k in SIZES or k not in usual or usual[k] != v}
    return {**kept, "model_type": raw["model_type"]}


def old_keys_too(raw: Raw) -> Raw:
    return {**raw, **rewritten(raw)}


def contradiction(raw: Raw) -> Raw:
    kind = "default" if raw["model_type"] == "phi3" else "linear"  # phi3 does not support linear
    scaling = {"rope_type": kind, "factor": 3.0}
    return {**rewritten(raw), "rope_theta": 77.0, "rope_scaling": scaling}


def theta_outside(raw: Raw) -> Raw:
    """Renames rope_scaling to rope_parameters and leaves rope_theta outside, as by hand."""
    if "rope_parameters" in raw:
        return raw
    changed = dict(raw)
    scaling = changed.pop("rope_scaling", None) or {"rope_type": "default"}
    return {**changed, "rope_parameters": scaling}


CONFIGS: Mapping[str, Callable[[Raw], Raw]] = {
    "transformers 5": rewritten,
    "transformers 4": with_dtype,
    "only differences": only_differences,
    "both keys": old_keys_too,
    "contradiction": contradiction,
    "rope_parameters without theta": theta_outside,
}
"""Name to the function that rewrites config.json."""


class Model:
    """A random model of a family, and the names of its weights in a file.

    Attributes:
      model: transformers' model.
      prefix: prefix of all names but the head's.
      head, embedding: full names of the head's and the embedding's weight.
      layers: number of layers.
    """

    def __init__(self, raw: Raw, dtype: torch.dtype, seed: int):
        config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
        self.model = transformers.AutoModelForCausalLM.from_config(config).float()
        randomize(self.model, seed, offset=0.0 if "gemma" in raw["model_type"] else 1.0)
        self.model.to(dtype)
        self.prefix = f"{self.model.base_model_prefix}."
        names = {module: name for name, module in self.model.named_modules()}
        self.embedding = f"{names[self.model.get_input_embeddings()]}.weight"
        self.head = "embed_out.weight" if config.model_type == "gpt_neox" else "lm_head.weight"
        self.layers = config.num_hidden_layers


def randomize(model: torch.nn.Module, seed: int, offset: float) -> None:
    """Draws every weight at random, in place, so that ignoring any weight changes the logits.

    Args:
      model: model to change.
      seed: seed of the random draws.
      offset: mean of the norm weights.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.ndim == 2:
                parameter.copy_(0.15 * noise)
            else:
                parameter.copy_(0.3 * noise + (0.0 if name.endswith("bias") else offset))


def without_prefix(model: Model, state: State) -> State:
    return {name.removeprefix(model.prefix): tensor for name, tensor in state.items()}


def base_model(model: Model, state: State) -> State:
    state.pop(model.head, None)
    return without_prefix(model, state)


def head_twice(model: Model, state: State) -> State:
    return {model.head: state[model.embedding].clone(), **state}


def other_head(model: Model, state: State) -> State:
    return {**state, model.head: state[model.embedding].roll(1, 0) * 0.9}


def no_head(model: Model, state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name != model.head}


def as_in_memory(model: Model, state: State) -> State:
    """Returns the weights by the model's module names; some differ from the names in a file."""
    found = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    if model.head not in state:
        found.pop("lm_head.weight")
    return found


def old_buffers(model: Model, state: State) -> State:
    """Adds the buffers that old versions of transformers saved among the weights."""
    table = torch.ones(8)
    attention = "attention" if model.prefix == "gpt_neox." else "self_attn"
    for i in range(model.layers):
        prefix = f"{model.prefix}layers.{i}.{attention}"
        state[f"{prefix}.rotary_emb.inv_freq"] = table.clone()
        if attention == "attention":
            state[f"{prefix}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
            state[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
    return state


LAYOUTS: Mapping[str, Callable[[Model, State], State] | None] = {
    "one file": None,
    "shards": None,
    "without prefix": without_prefix,
    "base model": base_model,
    "head twice": head_twice,
    "other head": other_head,
    "no head": no_head,
    "old buffers": old_buffers,
    "as in memory": as_in_memory,
}
"""Name to the function that rearranges the weights; None: transformers' files are kept."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {
    "config": list(CONFIGS),
    "layout": list(LAYOUTS),
    "dtype": list(DTYPES),
}
"""Axes that every family has."""


def write(
    folder: Path,
    family: str,
    row: Mapping[str, str],
    seed: int,
    changes: Mapping[str, Any] = {},
) -> None:
    """Writes a case's folder; `changes` apply to its config.json.

    Raises:
      Exception: transformers refuses the combination of options, with any type of error.
    """
    raw = raw_config(family, row, changes)
    model = Model(raw, DTYPES[row["dtype"]], seed)
    layout = LAYOUTS[row["layout"]]
    folder.mkdir(parents=True)
    size = "60KB" if row["layout"] == "shards" else "5GB"
    model.model.save_pretrained(folder, max_shard_size=size)
    if layout is not None:
        state = layout(model, load_file(folder / WEIGHTS))
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    write_config(folder, CONFIGS[row["config"]](raw))


def write_config(folder: Path, raw: Raw) -> None:
    (folder / CONFIG).write_text(json.dumps(raw, indent=1), encoding="utf-8")

"""The options of PEFT's LoraConfig and the ways of saving an adapter, as data.

A name in braces, such as {q}, stands for a module whose name depends on the family. The first
choice of an axis is its default.
"""

from collections.abc import Mapping
from typing import Any

NAMES: Mapping[str, Mapping[str, str]] = {
    "llama": {
        "attention": "self_attn",
        "q": "q_proj",
        "o": "o_proj",
        "up": "up_proj",
        "embed": "embed_tokens",
        "head": "lm_head",
        "norm": "norm",
    },
    "phi3": {"q": "qkv_proj", "up": "gate_up_proj"},
    "gpt_neox": {
        "attention": "attention",
        "q": "query_key_value",
        "o": "dense",
        "up": "dense_h_to_4h",
        "embed": "embed_in",
        "norm": "final_layer_norm",
    },
    "opt": {"o": "out_proj", "up": "fc1", "norm": "final_layer_norm"},
}
"""Family to its module names; a missing family or name takes llama's name."""

BASES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "llama": ("llama", {"biases": "both"}),
    "qwen2, tied": ("qwen2", {"tie": "True"}),
    "gemma2, tied": ("gemma2", {}),
    "phi3": ("phi3", {}),
    "gpt_neox": ("gpt_neox", {}),
    "opt, tied": ("opt", {}),
}
"""Name of a base to its family and the choices that differ from the defaults."""

APART = {
    ("kind", "lora_bias"),
    *(("start", name) for name in ("olora", "pissa", "pissa_niter_4", "corda", "loftq")),
    *(("start", name) for name in ("lora_ga", "mica")),
    *(("also", name) for name in ("layer_replication", "tokens", "tokens by name", "parameters")),
    *(("also", name) for name in ("alora", "qalora", "velora", "kasa", "bdlora", "monteclora")),
}
"""Choices tried alone, because a refusal, or no adapter, hides other faults of the same case."""

SOME = {"target_modules": ["{q}", "{o}"]}
TARGETS: Mapping[str, Mapping[str, Any]] = {
    "some": SOME,
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*\.[02]\.{attention}\.({q}|{o})"},
    "expression with anchors": {"target_modules": r"^.*layers\.\d+\..*(?:{q}|{up})$"},
    "paths": {"target_modules": ["layers.1.{attention}.{q}", "{up}"]},
    "one unknown": {"target_modules": ["{q}", "nothing"]},
    "left out": {"target_modules": None},
    "head": {"target_modules": ["{q}", "{head}"]},
    "embedding": {"target_modules": ["{q}", "{embed}"]},
    "both ends": {"target_modules": ["{q}", "{embed}", "{head}"]},
    "only the head": {"target_modules": ["{head}"]},
    "head by expression": {"target_modules": r".*({q}|{head})"},
}
INITS = (
    True,
    False,
    None,
    "gaussian",
    "orthogonal",
    "olora",
    "pissa",
    "pissa_niter_4",
    "eva",
    "corda",
    "lora_ga",
    "mica",
)
AXES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "targets": TARGETS,
    "excluded": {
        "none": {},
        "a name": {"exclude_modules": ["{o}"]},
        "an expression": {"exclude_modules": r".*\.1\..*"},
        "nothing": {"exclude_modules": ["nothing"]},
    },
    "layers": {
        "all": {},
        "some": {"layers_to_transform": [0, 2]},
        "one": {"layers_to_transform": 1},
        "pattern": {"layers_to_transform": [2], "layers_pattern": "layers"},
        "patterns": {"layers_to_transform": [0], "layers_pattern": ["layers", "blocks"]},
    },
    "ranks": {
        "usual": {"r": 4, "lora_alpha": 8},
        "one": {"r": 1, "lora_alpha": 3},
        "fraction": {"r": 3, "lora_alpha": 2.5},
        "large": {"r": 80, "lora_alpha": 40},
        "rslora": {"r": 4, "lora_alpha": 5, "use_rslora": True},
        "rank_pattern": {"r": 4, "lora_alpha": 8, "rank_pattern": {"{q}": 2}},
        "alpha_pattern": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"{o}": 3}},
        "expressions": {
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {r".*\.1\..*": 3},
            "alpha_pattern": {r"layers\.0\..*": 2},
        },
        "anchored": {
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "rank_pattern": {r"^model.layers.0.{attention}.{q}": 3, "2.{attention}.{o}": 5},
        },
    },
    "kind": {
        "plain": {},
        "dora": {"use_dora": True},
        "lora_bias": {"lora_bias": True},
    },
    "bias": {"none": {}, "all": {"bias": "all"}, "lora_only": {"bias": "lora_only"}},
    "whole modules": {
        "none": {},
        "empty": {"modules_to_save": []},
        "head": {"modules_to_save": ["{head}"]},
        "embedding": {"modules_to_save": ["{embed}"]},
        "both ends": {"modules_to_save": ["{embed}", "{head}"]},
        "norms": {"modules_to_save": ["{norm}"]},
        "a linear": {"modules_to_save": ["{up}"]},
    },
    "ties": {"left out": {}, "ensured": {"ensure_weight_tying": True}},
    "start": {str(init): {"init_lora_weights": init} for init in INITS}
    | {"loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}},
    "also": {
        "nothing": {},
        "dropout": {"lora_dropout": 0.3},
        "no task": {"task_type": None},
        "feature task": {"task_type": "FEATURE_EXTRACTION"},
        "revision": {"revision": "main", "inference_mode": True},
        "fan_in_fan_out": {"fan_in_fan_out": True},
        "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
        "tokens": {"trainable_token_indices": [3, 5, 50]},
        "tokens by name": {"trainable_token_indices": {"{embed}": [3, 50]}},
        "parameters": {"target_parameters": ["{up}.weight"]},
        "alora": {"alora_invocation_tokens": [5]},
        "qalora": {"use_qalora": True},
        "velora": {"velora_config": {}},
        "kasa": {"kasa_config": {}},
        "bdlora": {
            "use_bdlora": {
                "target_modules_bd_a": ["{o}"],
                "target_modules_bd_b": ["{q}"],
                "nblocks": 2,
            }
        },
        "monteclora": {"monteclora_config": {}},
        "megatron": {"megatron_config": None, "megatron_core": "megatron.core"},
    },
    "saving": {
        "usual": {},
        "embeddings too": {},
        "no embeddings": {},
        "another name": {},
        "bfloat16": {},
        "float16": {},
        "old keys": {},
        "keys of another version": {},
    },
}
"""Axis to choice to arguments of LoraConfig; adapters.py implements the axis `saving`."""

EXPRESSIONS = ("all-linear", "expression", "expression with anchors", "head by expression")
ENDS = ("head", "embedding", "both ends", "only the head", "head by expression")
RULES = (
    {"targets": EXPRESSIONS, "layers": ("some", "one", "pattern", "patterns")},
    {"targets": ENDS, "whole modules": ("head", "embedding", "both ends")},
    {"targets": ("only the head",), "layers": ("some", "one", "pattern", "patterns")},
    {"targets": ENDS, "kind": ("dora",)},
    {"excluded": ("an expression",), "layers": ("one",)},
    {"start": ("orthogonal",), "ranks": ("one", "fraction", "rank_pattern", "expressions")},
    {"start": ("orthogonal",), "ranks": ("anchored",)},
    {"targets": ("paths",), "layers": ("pattern", "patterns", "some")},
    {"saving": ("old keys",), "targets": ("left out",)},
    {"saving": ("old keys",), "excluded": ("a name", "an expression")},
    {"saving": ("old keys",), "layers": ("some", "one", "pattern", "patterns")},
    {"saving": ("old keys",), "kind": ("dora",)},
    {
        "saving": ("old keys",),
        "ranks": ("rslora", "rank_pattern", "alpha_pattern", "expressions", "anchored"),
    },
)
"""Excluded combinations: PEFT refuses them, old files lack their keys, or `TOGETHER` has them."""

TOGETHER = ({"targets": "both ends", "kind": "dora"},)
"""Choices that we refuse together: one case each, with the defaults for all other axes."""


def named(value: Any, family: str) -> Any:
    """Replaces the names in braces with the family's module names."""
    if isinstance(value, str):
        for key, name in {**NAMES["llama"], **NAMES.get(family, {})}.items():
            value = value.replace(f"{{{key}}}", name)
        return value
    if isinstance(value, list):
        return [named(item, family) for item in value]
    if isinstance(value, Mapping):
        return {named(key, family): named(item, family) for key, item in value.items()}
    return value

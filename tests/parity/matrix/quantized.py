"""Runs the cases of 4-bit bitsandbytes checkpoints and of stale quantization settings.

The reference is transformers' model with the weights that bitsandbytes decodes.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from pairs import our_logits, ours, their_logits

from matrix import models, store
from matrix.judge import NO_MODEL, Outcome, judge, line
from matrix.pairwise import Row

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "as saved": {},
    "without quant_method": {"quant_method": None},
    "compute in bfloat16": {"bnb_4bit_compute_dtype": "bfloat16"},
    "head skipped by name": {"llm_int8_skip_modules": ["lm_head"]},
    "new flags alone": {"_load_in_4bit": None, "_load_in_8bit": None},
}
"""Changes of the quantization_config that transformers saves; None removes a key."""
INT8 = "int8"
"""bitsandbytes with 8 bits: tried alone, because we refuse it."""
AXES = {
    "family": ["llama", "qwen2", "gemma2", "phi3", "gpt_neox", "opt"],
    "kind": ["nf4", "fp4", INT8],
    "double": ["yes", "no"],
    "dtype": ["float32", "bfloat16"],
    "settings": list(SETTINGS),
}
WHOLE_BLOCKS = {"intermediate_size": 128}
"""bitsandbytes' CPU kernel decodes wrongly if a row is not a whole number of blocks."""
LEFT_OVER: Mapping[str, Mapping[str, Any]] = {
    "bitsandbytes": {
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "float32",
        }
    },
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    "null": {"quantization_config": None},
    "empty": {"quantization_config": {}},
}
"""Stale quantization settings in the config.json of a float checkpoint."""


def run_quantized(rows: list[Row], seed: int) -> Iterator[Outcome]:
    """Yields the outcomes of 4-bit checkpoints."""
    for row in rows:
        case = "; ".join(row.values())
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            try:
                saved = write(folder, row, seed)
            except Exception as e:
                yield Outcome("4 bits", case, NO_MODEL, "not made", line(e))
                continue
            yield compare(case, folder, saved, seed)


def compare(case: str, folder: Path, saved: Path, seed: int) -> Outcome:
    """Returns the outcome of a 4-bit folder; the reference is the copy that transformers saved."""
    tokens = models.ids(seed, models.LENGTHS[1])
    return judge(
        "4 bits",
        case,
        folder,
        lambda: [their_logits(dequantized(saved), tokens)],
        lambda: [our_logits(ours(folder), tokens)],
    )


def write(folder: Path, row: Row, seed: int) -> Path:
    """Writes to `folder` a checkpoint that transformers quantized, with the row's settings.

    Returns:
      Folder of the same checkpoint, unchanged since transformers saved it.
    """
    floats, saved = folder.parent / "floats", folder.parent / "saved"
    family, dtype = row["family"], row["dtype"]
    sizes = {"ffn_dim": 128} if family == "opt" else WHOLE_BLOCKS
    store.write(floats, family, models.usual(family) | {"dtype": dtype}, seed, sizes)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=row["kind"] != INT8,
        load_in_8bit=row["kind"] == INT8,
        bnb_4bit_quant_type="nf4" if row["kind"] == INT8 else row["kind"],
        bnb_4bit_use_double_quant=row["double"] == "yes",
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        floats,
        quantization_config=settings,
        device_map={"": "cpu"},
        dtype=getattr(torch, dtype),
    )
    model.save_pretrained(saved)
    shutil.copytree(saved, folder)
    raw = json.loads((folder / store.CONFIG).read_text("utf-8"))
    found = {**raw["quantization_config"], **SETTINGS[row["settings"]]}
    raw["quantization_config"] = {key: value for key, value in found.items() if value is not None}
    store.write_config(folder, raw)
    return saved


def dequantized(folder: Path) -> torch.nn.Module:
    """Loads the model in float32 with the 4-bit weights as bitsandbytes decodes them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": "cpu"}, attn_implementation="eager"
    )
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            state.dtype = torch.float32  # only some kernels round to this dtype first
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
            plain = torch.nn.Linear(*weight.shape[::-1], bias=module.bias is not None)
            plain.weight = torch.nn.Parameter(weight.float())
            if module.bias is not None:
                plain.bias = module.bias
            model.set_submodule(name, plain)
    return torch.nn.Module.float(model).eval()


def run_left_over(seed: int) -> Iterator[Outcome]:
    """Yields the outcomes of stale quantization settings over float weights."""
    tokens = models.ids(seed, models.LENGTHS[1])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        store.write(folder, "llama", models.usual("llama"), seed)
        raw = json.loads((folder / store.CONFIG).read_text("utf-8"))
        expected = [their_logits(models.load_whole(folder), tokens)]
        for case, changes in LEFT_OVER.items():
            store.write_config(folder, {**raw, **changes})
            yield judge(
                "settings left over",
                case,
                folder,
                lambda: expected,
                lambda: [our_logits(ours(folder), tokens)],
            )

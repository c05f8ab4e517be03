"""Runs the adapter cases: PEFT's LoRA with many options, on bases of several families."""

import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from pairs import our_logits, their_logits
from safetensors.torch import load_file, save_file

from matrix import models, store
from matrix.adapter_options import AXES, BASES, named
from matrix.judge import NO_MODEL, NoModel, Outcome, judge, line
from matrix.pairwise import Row, describe
from qlora_jax.models.decoder import Decoder
from qlora_jax.serve.base import open_base
from qlora_jax.text.bpe import train_bpe

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OLD_KEYS = (
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
)
"""Config keys that PEFT 0.3 writes; the file omits all others."""


def axes() -> dict[str, list[str]]:
    """Returns the axes of an adapter's options with their choices."""
    return {axis: list(choices) for axis, choices in AXES.items()}


def run_adapters(base: str, rows: list[Row], seed: int) -> Iterator[Outcome]:
    """Yields the outcomes of the rows over one base."""
    family, changes = BASES[base]
    usual = {axis: choices[0] for axis, choices in axes().items()}
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        store.write(model, family, models.usual(family) | changes, seed)
        train_bpe(["some text"], 300, "test").fast.save_pretrained(str(model))
        for i, row in enumerate(rows):
            case = describe(row, usual)
            folder = Path(place) / f"adapter-{i}"
            group = f"adapters of {base}"
            try:
                folder = write(folder, model, family, row, seed + i)
            except Exception as e:
                yield Outcome(group, case, NO_MODEL, "not made", line(e))
                continue
            yield compare(group, case, model, folder, seed + i)


def write(folder: Path, base: Path, family: str, row: Row, seed: int) -> Path:
    """Saves an adapter whose trainable weights are moved at random; returns its folder.

    Raises:
      Exception: PEFT refuses the combination of options, with any type of error.
    """
    arguments: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    for axis, choices in AXES.items():
        arguments |= named(choices[row[axis]], family)
    config = peft.LoraConfig(**arguments)
    name = "another" if row["saving"] == "another name" else "default"
    model = peft.get_peft_model(models.load_whole(base), config, adapter_name=name)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    embeddings = {"embeddings too": True, "no embeddings": False}.get(row["saving"], "auto")
    model.save_pretrained(folder, save_embedding_layers=embeddings)
    folder = folder / name if name != "default" else folder
    change_saved(folder, row["saving"])
    return folder


def change_saved(folder: Path, saving: str) -> None:
    """Changes a saved adapter into the form that other versions of PEFT or other programs write."""
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    if saving in ("bfloat16", "float16"):
        dtype = store.DTYPES[saving]
        tensors = {name: t.to(dtype) for name, t in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if saving == "old keys":
        config = {key: config[key] for key in OLD_KEYS}
    if saving == "keys of another version":
        config |= {"some_new_key": None, "another_new_key": False, "peft_version": "9.9.9"}
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


def compare(group: str, case: str, base: Path, folder: Path, seed: int) -> Outcome:
    """Returns the outcome of an adapter folder over a model folder."""
    row = models.ids(seed, models.LENGTHS[1])
    return judge(
        group,
        case,
        folder,
        lambda: [their_logits(load_whole(base, folder), row)],
        lambda: [our_logits(load_ours(base, folder), row)],
    )


def load_whole(base: Path, folder: Path) -> torch.nn.Module:
    """Loads the model with PEFT; raises NoModel if the file lacks a tensor of the adapter."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(models.load_whole(base), folder)
    for warning in told:
        if "missing adapter keys" in str(warning.message):
            raise NoModel(f"PEFT: {str(warning.message)[:160]}")
    return model.eval()


def load_ours(base: Path, folder: Path) -> Decoder:
    """Loads the model as `generate` and `merge` do, in float32."""
    opened = open_base(str(base), bits=16, dtype="float32", warn=lambda line: None, adapter=folder)
    return opened.model

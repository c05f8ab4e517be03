"""A trained model's adapters as files for other tools."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qlora_jax.config import Config
from qlora_jax.formats import peft
from qlora_jax.models.decoder import Decoder

FOLDER = "adapter"


def adapters(model: Decoder) -> Mapping[str, peft.Adapter]:
    """Every layer's adapter by its Hugging Face module path."""
    found = {}
    for path, linear, i in model.walk():
        spec = linear.adapter.specs[i] if linear.adapter else None
        if linear.adapter and spec:
            a, b = linear.adapter.a.get_value()[i], linear.adapter.b.get_value()[i]
            found[path] = peft.Adapter(np.asarray(a), np.asarray(b), spec.alpha, spec.rank)
    return found


def export_adapter(config: Config, model: Decoder, folder: Path) -> None:
    """Writes the model's adapters in PEFT's format.

    Raises:
      UserError: the folder cannot be written.
    """
    peft.write_adapter(
        folder,
        adapters(model),
        base_name=config.model.path,
        revision=config.model.revision,
        scaling=config.lora.scaling,
        dropout=config.lora.dropout,
    )

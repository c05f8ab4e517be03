"""What a run trained as files for other tools: adapters, or a whole model."""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qlora_jax.config import Config
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.formats import peft
from qlora_jax.formats.huggingface_write import config_json, write_folder
from qlora_jax.formats.names import expected_shapes
from qlora_jax.formats.unload import parameter
from qlora_jax.models.decoder import Decoder

FOLDER = "adapter"
MODEL = "model"


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


def export_model(config: Config, model: Decoder, text: Tokenizer, folder: Path) -> None:
    """Writes a model trained from scratch as a Hugging Face folder, in `model.storage_dtype`.

    Raises:
      UserError: the folder cannot be written.
    """
    write_folder(
        folder,
        config_json(
            model.config, eos_id=list(text.stop_ids), bos_id=text.bos_id, pad_id=text.pad_id
        ),
        expected_shapes(model.config),
        lambda name: parameter(model, name),
        jnp.dtype(config.model.storage_dtype),
        text.fast.save_pretrained,
    )

"""Writes the result of a run as files for other tools: adapters, or a whole model."""

from pathlib import Path

from qlora_jax.config import Config
from qlora_jax.formats import fresh, peft
from qlora_jax.formats.merged import MergedCheckpoint
from qlora_jax.formats.source import open_checkpoint
from qlora_jax.formats.write import write_model
from qlora_jax.lora import LoraSet
from qlora_jax.lora.arithmetic import adapter_difference
from qlora_jax.lora.initializers import INITIALIZERS
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.weight_shapes import adaptable
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train.initial_values import split_values

FOLDER = "adapter"
MODEL = "model"


def adapters(model: Decoder) -> LoraSet:
    """Returns all adapters, each by its Hugging Face module path."""
    found = {path: linear.adapter.weights(i) for path, linear, i in model.walk() if linear.adapter}
    found |= {path: adapter.weights() for path, adapter in model.outer_adapters().items()}
    return {path: weights for path, weights in found.items() if weights is not None}


def export_adapter(config: Config, model: Decoder, folder: Path) -> None:
    """Writes the model's adapters in PEFT's format, for use with the original pretrained model.

    The initializers pissa and loftq move a part s·B0·A0 of the weights into the adapter. The export
    subtracts this part again, which doubles the rank: W + s·(B·A − B0·A0). With a 4-bit base, the
    exported model is not bit-identical to the trained model, because the trained model holds
    W − s·B0·A0 rounded to 4 bits. The same is true of every adapter trained on a rounded W.
    Parameters that `lora.from_adapter` brought along are written with the adapter.

    Raises:
      UserError: the folder cannot be written.
    """
    found, lora = adapters(model), config.lora
    if lora.init in INITIALIZERS:
        start = split_values(config, open_checkpoint(config.model))
        found = {
            path: adapter_difference(now, start[path], lora.scaling) for path, now in found.items()
        }
    replaced = peft.Replaced()
    if lora.from_adapter is not None:
        replaced = peft.read_adapter(Path(lora.from_adapter)).replaced
    peft.write_adapter(
        folder,
        found,
        base_name=config.model.path,
        revision=config.model.revision,
        scaling=lora.scaling,
        dropout=lora.dropout,
        replaced=replaced,
        modules=adaptable(model.config),
    )


def export_model(config: Config, model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a model trained from scratch to a Hugging Face folder, in `model.storage_dtype`.

    Raises:
      UserError: the folder cannot be written.
    """
    source = MergedCheckpoint(model, fresh.FreshCheckpoint(model.config, config.train.seed))
    write_model(source, folder, None, config.model.storage_dtype, tokenizer=tokenizer, replace=True)

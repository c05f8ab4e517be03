"""A model to put adapters on, from a run directory or from what a config's `model` may name."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from qlora_jax.config import Config, DataConfig, FloatType, LoraConfig, ModelConfig
from qlora_jax.formats.peft.plain import IN_RUN
from qlora_jax.lora.weights import LoraSet
from qlora_jax.models.decoder import Decoder
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError
from qlora_jax.serve.loading import read_regular
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train import rundir
from qlora_jax.train.restore import from_config, restore


@dataclasses.dataclass(frozen=True)
class Base:
    """A model without adapters.

    Attributes:
      name: what the model is called: `model.path`.
      model: the model.
      tokenizer: its tokenizer.
      config: how it is held and computed, and how prompts are written.
    """

    name: str
    model: Decoder
    tokenizer: Tokenizer
    config: Config


def is_run(path: str) -> bool:
    """Whether a path names a run directory."""
    return paths.is_file(Path(path) / rundir.CONFIG)


def own_adapter(path: str) -> dict[str, str]:
    """The adapter that a run directory brings: its name, the directory's, to its folder.

    Empty for other models, and for a run that trained every weight.
    """
    if not is_run(path) or rundir.open_run(path).method == "full":
        return {}
    return {Path(path).resolve().name: str(Path(path) / IN_RUN)}


def open_base(path: str, *, bits: int, dtype: FloatType, warn: Callable[[str], None]) -> Base:
    """Loads it.

    Args:
      path: a run directory, whose own settings hold; or a folder, a .gguf file, a built-in or a
        hub id.
      bits: 4 holds the linears in NF4, 16 as they are; not for a run.
      dtype: of computation; not for a run.
      warn: called with lines for the user.

    Raises:
      UserError: it cannot be loaded.
    """
    if is_run(path):
        config = rundir.open_run(path)
        restored = restore(path, base=config.method != "full", warn=warn)
        return Base(config.model.path, restored.model, restored.tokenizer, config)
    config = Config(
        model=ModelConfig(path=path, compute_dtype=dtype, storage_dtype=dtype),
        method="qlora" if bits == 4 else "lora",
        lora=LoraConfig(rank=1),  # the bank replaces it
        data=DataConfig(source="", sequence_length=1),
        output="",
    )
    restored = from_config(config, warn)
    return Base(path, restored.model, restored.tokenizer, config)


def read_named(adapters: Mapping[str, str]) -> dict[str, LoraSet]:
    """Reads the adapters of a command line, name to folder.

    Raises:
      UserError: one cannot be read; its name is given.
    """
    found: dict[str, LoraSet] = {}
    for name, folder in adapters.items():
        try:
            found[name] = read_regular(folder)
        except UserError as e:
            raise UserError(f"--adapter {name}: {e}") from None
    return found

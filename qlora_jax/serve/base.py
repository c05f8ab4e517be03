"""A model to put adapters on, from a run directory or from what a config's `model` may name."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from qlora_jax.config import Config, DataConfig, FloatType, LoraConfig, ModelConfig
from qlora_jax.formats.peft import AdapterSet, read_adapter
from qlora_jax.formats.peft.plain import IN_RUN, check_shared, plain
from qlora_jax.lora.weights import LoraSet
from qlora_jax.models.decoder import Decoder
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError
from qlora_jax.serve.loading import regular_folder
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


def open_base(
    path: str,
    *,
    bits: int,
    dtype: FloatType,
    warn: Callable[[str], None],
    adapter: Path | None = None,
) -> Base:
    """Loads a model.

    Args:
      path: a run directory, whose own settings hold; or a folder, a .gguf file, a built-in or a
        hub id.
      bits: 4 holds the linears in NF4, 16 as they are; not for a run.
      dtype: of computation; not for a run.
      warn: called with lines for the user.
      adapter: a folder in PEFT's format whose adapters the model gets, of any kind; not for a run.

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
        # without an adapter's folder a bank takes their place
        lora=LoraConfig(rank=1) if adapter is None else LoraConfig(from_adapter=str(adapter)),
        data=DataConfig(source="", sequence_length=1),
        output="",
    )
    restored = from_config(config, warn)
    return Base(path, restored.model, restored.tokenizer, config)


class Named(NamedTuple):
    """An adapter of a command line.

    Attributes:
      name: the name that it was given there.
      folder: its folder in PEFT's format.
      stored: what the folder holds.
    """

    name: str
    folder: Path
    stored: AdapterSet

    def on(self, model: Decoder) -> LoraSet:
        """Returns its weights, if it is plain LoRA that fits the model.

        Raises:
          UserError: as `plain`; the name is given.
        """
        with _naming(self.name):
            return plain(self.folder, self.stored, model)

    def in_bank_of(self, model: Decoder) -> LoraSet:
        """Returns its weights, if it can share a bank with others.

        Raises:
          UserError: as `on`; or embedding or head are adapted.
        """
        found = self.on(model)
        with _naming(self.name):
            check_shared(self.folder, found)
        return found


def read_named(adapters: Mapping[str, str]) -> list[Named]:
    """Reads the adapters of a command line.

    Args:
      adapters: names to folders.

    Raises:
      UserError: one cannot be read; its name is given.
    """
    found = []
    for name, path in adapters.items():
        with _naming(name):
            folder = regular_folder(path)
            found.append(Named(name, folder, read_adapter(folder)))
    return found


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except UserError as e:
        raise UserError(f"--adapter {name}: {e}") from None

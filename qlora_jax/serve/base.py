"""A model to put adapters on, from a run directory or from what a config's `model` may name."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from qlora_jax.config import (
    Config,
    FloatType,
    LoraConfig,
    ModelConfig,
    ModelSettings,
)
from qlora_jax.formats import huggingface
from qlora_jax.formats.peft import AdapterSet, read_adapter
from qlora_jax.formats.peft.plain import IN_RUN, check_shared, plain
from qlora_jax.lora.initializers import INITIALIZERS
from qlora_jax.lora.weights import LoraSet
from qlora_jax.models.decoder import Decoder, detach
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError
from qlora_jax.serve.loading import regular_folder
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train import rundir
from qlora_jax.train.pretrained import load_adapted, load_base, open_pretrained
from qlora_jax.train.restore import Restored, from_config, restore
from qlora_jax.train.start import resolved


@dataclasses.dataclass(frozen=True)
class Asking:
    """How prompts are written.

    Attributes:
      system_prompt: the system turn put before them, or None.
      template: auto, through the chat template if there is one; none, as they are.
    """

    system_prompt: str | None = None
    template: Literal["auto", "none"] = "auto"


@dataclasses.dataclass(frozen=True)
class Base:
    """A model that answers.

    Attributes:
      name: what the model is called: `model.path`.
      model: the model.
      tokenizer: its tokenizer.
      dtype: of computation.
      asking: how prompts are written.
    """

    name: str
    model: Decoder
    tokenizer: Tokenizer
    dtype: FloatType
    asking: Asking = Asking()


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
    bits: int | None,
    dtype: FloatType | None,
    warn: Callable[[str], None],
    adapter: Path | None = None,
) -> Base:
    """Loads a model without adapters, or with those of one folder.

    A run that trained every weight is loaded with what it trained.

    Args:
      path: a run directory, whose own settings hold; or a folder, a .gguf file, a built-in or a
        hub id.
      bits: 4, which None stands for, holds the linears in NF4, 16 as they are; None for a run.
      dtype: of computation; None is bfloat16, and the run's own for a run.
      warn: called with lines for the user.
      adapter: a folder in PEFT's format whose adapters the model gets, of any kind; not for a run.

    Raises:
      UserError: it cannot be loaded, or bits or dtype are given for a run.
    """
    if not is_run(path):
        return open_plain(_settings(path, bits, dtype), adapter, warn)
    _check_left_to_run(path, bits, dtype)
    config = rundir.open_run(path)
    if config.method == "full":
        return _of_run(restore(path, base=False, warn=warn))
    restored = from_config(_unsplit(path, config, warn), warn)
    detach(restored.model)
    return _of_run(restored)


def open_plain(settings: ModelSettings, adapter: Path | None, warn: Callable[[str], None]) -> Base:
    """Loads a model that is no run, without adapters or with those of one folder.

    Args:
      settings: of the model; nothing else is needed.
      adapter: a folder in PEFT's format whose adapters the model gets, of any kind.
      warn: called with lines for the user.

    Raises:
      UserError: it cannot be loaded.
    """
    _check_model(settings.model.path)
    if adapter is not None:
        given = LoraConfig(from_adapter=str(adapter))
        settings = resolved(dataclasses.replace(settings, lora=given))
    checkpoint, text = open_pretrained(settings, warn)
    if adapter is None:
        model = load_base(settings, checkpoint, warn)
    else:
        model, _ = load_adapted(settings, checkpoint, warn, seed=0)
    return Base(settings.model.path, model, text, settings.model.compute_dtype)


def open_trained(
    path: str,
    *,
    base: bool,
    bits: int | None,
    dtype: FloatType | None,
    warn: Callable[[str], None],
) -> Base:
    """Loads a run's model with what the run trained; or a model that is no run, as `open_base`.

    Args:
      path: as for `open_base`.
      base: leave what a run trained as it was before the first step.
      bits: as for `open_base`.
      dtype: as for `open_base`.
      warn: called with lines for the user.

    Raises:
      UserError: as `open_base`; the run has no checkpoint.
    """
    if not is_run(path):
        return open_base(path, bits=bits, dtype=dtype, warn=warn)
    _check_left_to_run(path, bits, dtype)
    return _of_run(restore(path, base=base, warn=warn))


def _of_run(restored: Restored) -> Base:
    config = restored.config
    asking = Asking(config.data.system_prompt, config.data.template)
    return Base(
        config.model.path, restored.model, restored.tokenizer, config.model.compute_dtype, asking
    )


def _check_left_to_run(path: str, bits: int | None, dtype: FloatType | None) -> None:
    for option, value in (("--bits", bits), ("--dtype", dtype)):
        if value is not None:
            raise UserError(
                f"{option} {value}: {path} is a run directory and has its own settings; leave "
                f"{option} out, or give the model itself"
            )


def _check_model(path: str) -> None:
    """Raises UserError for a folder that is neither a run directory nor a model."""
    folder = Path(path).expanduser()
    if paths.is_dir(folder) and not paths.exists(folder / huggingface.CONFIG):
        raise UserError(
            f"{path}: not a run directory (no {rundir.CONFIG} in it) and not a model (no "
            f"{huggingface.CONFIG}); give a folder that is one of them, or a .gguf file"
        )


def _settings(path: str, bits: int | None, dtype: FloatType | None) -> ModelSettings:
    dtype = dtype or "bfloat16"
    return ModelSettings(
        model=ModelConfig(path=path, compute_dtype=dtype, storage_dtype=dtype),
        method="lora" if bits == 16 else "qlora",
    )


def _unsplit(path: str, config: Config, warn: Callable[[str], None]) -> Config:
    """The run's config with whole weights: pissa and loftq leave the base without a part of them.

    The run's adapter is for whole weights. Rounded to 4 bits they are not the sum that was trained.
    """
    if config.lora.init not in INITIALIZERS:
        return config
    if config.method == "qlora":
        warn(
            f"warning: {path}: its adapter is held over the model in 4 bits, and it was trained "
            f"over what lora.init {config.lora.init} left of it, so its answers differ a little "
            "from the run's own; merge it for these"
        )
    lora = dataclasses.replace(config.lora, init=LoraConfig().init)
    return dataclasses.replace(config, lora=lora)


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

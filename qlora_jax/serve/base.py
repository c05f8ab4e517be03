"""Loads a model that answers, from a run directory or from a path as in `model.path`."""

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
from qlora_jax.train.initial_values import resolved
from qlora_jax.train.pretrained import load_adapted, load_base, open_pretrained
from qlora_jax.train.restore import Restored, from_config, restore


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """The settings that turn a prompt into model input.

    Attributes:
      system_prompt: text of the system turn before the prompt; None for no system turn.
      template: `auto` uses the chat template if the tokenizer has one; `none` never uses it.
    """

    system_prompt: str | None = None
    template: Literal["auto", "none"] = "auto"


@dataclasses.dataclass(frozen=True)
class Base:
    """A loaded model with its tokenizer and settings.

    Attributes:
      name: name of the model, `model.path`.
      model: the model.
      tokenizer: tokenizer of the model.
      dtype: compute dtype.
      asking: settings of the prompts.
    """

    name: str
    model: Decoder
    tokenizer: Tokenizer
    dtype: FloatType
    asking: PromptSettings = PromptSettings()


def is_run(path: str) -> bool:
    """Returns whether a path is a run directory."""
    return paths.is_file(Path(path) / rundir.CONFIG)


def own_adapter(path: str) -> dict[str, str]:
    """Returns the adapter of a run directory: the directory's name to the adapter's folder.

    The result is empty if the path is not a run directory, and for a run with method `full`.
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
    """Loads a model without adapters, or with the adapters of one folder.

    A run with method `full` is loaded with its trained weights.

    Args:
      path: a model folder, a .gguf file, the name of a built-in model or a hub id; or a run
        directory, whose config gives all settings.
      bits: 4 stores the linears in NF4, 16 does not quantize them; None is 4. Must be None for a
        run.
      dtype: compute dtype; None is bfloat16. Must be None for a run.
      warn: function called with lines for the user.
      adapter: folder in PEFT's format with adapters of any kind, to load into the model; ignored
        for a run.

    Raises:
      UserError: the model cannot be loaded, or `bits` or `dtype` are given for a run.
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
    """Loads a model that is not a run, without adapters or with the adapters of one folder.

    Args:
      settings: settings of the model.
      adapter: folder in PEFT's format with adapters of any kind, to load into the model; or None.
      warn: function called with lines for the user.

    Raises:
      UserError: the model cannot be loaded.
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
    """Loads a run's model with its trained weights; loads any other model as `open_base` does.

    Args:
      path: model or run directory, as in `open_base`.
      base: whether to load a run's model as it was before the first step.
      bits: bits of the stored weights, as in `open_base`.
      dtype: compute dtype, as in `open_base`.
      warn: function called with lines for the user.

    Raises:
      UserError: `open_base` fails, or the run has no checkpoint.
    """
    if not is_run(path):
        return open_base(path, bits=bits, dtype=dtype, warn=warn)
    _check_left_to_run(path, bits, dtype)
    return _of_run(restore(path, base=base, warn=warn))


def _of_run(restored: Restored) -> Base:
    config = restored.config
    asking = PromptSettings(config.data.system_prompt, config.data.template)
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
    """Raises UserError if a folder is neither a run directory nor a model."""
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
    """Returns the run's config with the default `lora.init`, so that the base keeps all of W.

    The initializers pissa and loftq subtract a part of W from the base. The exported adapter of the
    run belongs to the whole W (`train.export`). In 4 bits the result differs from the trained
    model, because the run rounded another matrix; the function warns of it.
    """
    if config.lora.init not in INITIALIZERS:
        return config
    if config.method == "qlora":
        warn(
            f"warning: {path}: the run trained its adapter on the weights that lora.init "
            f"{config.lora.init} had changed; here the base is the pretrained model in 4 bits, so "
            "the answers differ a little from the run's; merge the run to get the same answers"
        )
    lora = dataclasses.replace(config.lora, init=LoraConfig().init)
    return dataclasses.replace(config, lora=lora)


class NamedAdapter(NamedTuple):
    """An adapter that the user gave as `--adapter NAME=FOLDER`.

    Attributes:
      name: name that the user gave to the adapter.
      folder: the adapter's folder, in PEFT's format.
      stored: content of the folder.
    """

    name: str
    folder: Path
    stored: AdapterSet

    def on(self, model: Decoder) -> LoraSet:
        """Returns the adapter's weights, if it is plain LoRA that fits the model.

        Raises:
          UserError: the adapter is not plain LoRA or does not fit; the message begins with the
            adapter's name.
        """
        with _naming(self.name):
            return plain(self.folder, self.stored, model)

    def in_bank_of(self, model: Decoder) -> LoraSet:
        """Returns the adapter's weights, if it can share a bank with other adapters.

        Raises:
          UserError: `on` fails, or the adapter changes the embedding or the head.
        """
        found = self.on(model)
        with _naming(self.name):
            check_shared(self.folder, found)
        return found


def read_named(adapters: Mapping[str, str]) -> list[NamedAdapter]:
    """Reads the adapters that the user gave as `--adapter NAME=FOLDER`.

    Args:
      adapters: name to folder.

    Raises:
      UserError: an adapter cannot be read; the message begins with its name.
    """
    found = []
    for name, path in adapters.items():
        with _naming(name):
            folder = regular_folder(path)
            found.append(NamedAdapter(name, folder, read_adapter(folder)))
    return found


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except UserError as e:
        raise UserError(f"--adapter {name}: {e}") from None

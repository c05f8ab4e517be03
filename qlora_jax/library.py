"""Loads, asks and trains models of the known families from Python, as the command line does.

Lines for the user go to stderr, in a notebook into the cell's output. Settings of the process, such
as XLA's flags and the folder of compiled programs, stay the caller's.
"""

import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from qlora_jax import config as configs
from qlora_jax.config import Config, ModelSettings, QuantConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.plan.training import train_placed
from qlora_jax.runtime.device import warn_if_gpu_idle
from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.notebook import in_notebook
from qlora_jax.runtime.streams import printable
from qlora_jax.serve.answers import answers
from qlora_jax.serve.base import Asking, Base, is_run, open_plain, open_trained
from qlora_jax.serve.loading import regular_folder
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train import rundir
from qlora_jax.train.interrupt import Stopped
from qlora_jax.train.report import RunSummary, describe_losses

QUANT = QuantConfig()
"""The defaults of a model in 4 bits."""


def load(
    path: str | os.PathLike[str],
    *,
    codebook: str | None = QUANT.codebook,
    block_size: int = QUANT.block_size,
    double_quant: bool = QUANT.double_quant,
    dtype: DTypeLike | None = None,
    adapter: str | os.PathLike[str] | None = None,
    revision: str | None = None,
) -> tuple[Decoder, Tokenizer]:
    """Loads a model and its tokenizer.

    Args:
      path: a Hugging Face folder, a .gguf file, a hub id or a built-in name; or a run directory,
        which has settings of its own: the other arguments are left out.
      codebook: of the layers' linears in 4 bits; None keeps them in `dtype`. What a file holds in
        4 bits already stays as it is.
      block_size: weights that share one scale.
      double_quant: quantize the scales, too.
      dtype: of what is not quantized, and of computation; None is bfloat16.
      adapter: a folder in PEFT's format or a run directory, whose adapters the model gets.
      revision: branch, tag or commit of a hub id.

    Raises:
      UserError: the model or the adapter cannot be loaded, or an argument is not allowed.
    """
    _start()
    path = os.path.expanduser(path)
    if is_run(path):
        given = (codebook, block_size, double_quant, dtype, adapter, revision)
        if given != (QUANT.codebook, QUANT.block_size, QUANT.double_quant, None, None, None):
            raise UserError(
                f"{path}: a run directory has its own settings; leave the other arguments of load "
                "out, or give the model itself"
            )
        base = open_trained(path, base=False, bits=None, dtype=None, warn=_say)
        if own := _asked_as_trained(base):
            _say(f"the run's own way to ask: qlora_jax.generate(..., {own})")
        return base.model, base.tokenizer
    settings = _settings(path, revision, codebook, block_size, double_quant, dtype)
    base = open_plain(
        settings, None if adapter is None else regular_folder(os.fspath(adapter)), _say
    )
    return base.model, base.tokenizer


def _settings(
    path: str,
    revision: str | None,
    codebook: str | None,
    block_size: int,
    double_quant: bool,
    dtype: DTypeLike | None,
) -> ModelSettings:
    held = _name(dtype) if dtype is not None else "bfloat16"
    model = {"path": path, "revision": revision, "storage_dtype": held, "compute_dtype": held}
    tree: dict[str, Any] = {"model": model, "method": "lora"}
    if codebook is not None:
        quant = {"codebook": codebook, "block_size": block_size, "double_quant": double_quant}
        tree |= {"method": "qlora", "quant": quant}
    return configs.model_settings(tree, "qlora_jax.load")


def _asked_as_trained(base: Base) -> str:
    """Returns the arguments of `generate` with which a run's model answers as in training."""
    asking = base.asking
    own: dict[str, Any] = {}
    if base.dtype != _held(base.model):
        own["dtype"] = base.dtype
    if asking.system_prompt is not None:
        own["system"] = asking.system_prompt
    if asking.template == "none":
        own["chat"] = False
    return ", ".join(f"{name}={value!r}" for name, value in own.items())


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = True,
    system: str | None = None,
    dtype: DTypeLike | None = None,
) -> str | list[str]:
    """Answers a prompt, or several in one batch.

    Args:
      model: with or without adapters.
      tokenizer: the model's.
      prompts: one or several.
      max_new_tokens: most tokens of an answer.
      temperature: divides the logits; 0 takes the likeliest token.
      top_p: draws from the fewest tokens that together have this probability.
      seed: of the draws.
      chat: write prompts by the tokenizer's chat template, if it has one; else they are continued
        as they are.
      system: system turn.
      dtype: of computation; None is the embedding's.

    Returns:
      The answer, or a list of answers for a list of prompts.

    Raises:
      UserError: a prompt is too long or refused by the template, or an argument is not allowed.
    """
    texts = answers(
        model,
        tokenizer,
        [prompts] if isinstance(prompts, str) else prompts,
        asking=Asking(system, "auto" if chat else "none"),
        dtype=_held(model) if dtype is None else dtype,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    return texts[0] if isinstance(prompts, str) else texts


def train(
    config: str | os.PathLike[str] | Mapping[str, Any] | Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
) -> RunSummary:
    """Fine-tunes; leaves a run directory, which `load` takes.

    A signal is handled as on the command line: after the step the state is saved, and then the
    signal is raised again, so that SIGINT, such as a notebook's "interrupt", ends in
    KeyboardInterrupt.

    Args:
      config: a YAML file or a run directory; a dict of what such a file holds; or a Config.
      resume: go on where the directory's run stopped (`--resume` in messages).
      overwrite: delete the run that the directory holds (`--overwrite`).
      force: run even where the device's memory is too small (`--force`).

    Returns:
      The run's figures; `run_dir` is the run directory.

    Raises:
      UserError: the input is at fault; nothing is left half-written.
      RunFailed: the loss is not finite, or the frozen base changed.
    """
    if resume and overwrite:
        raise UserError("resume and overwrite exclude each other; give one")
    found = _config(config)
    _start()
    try:
        summary = train_placed(
            found,
            say=_say,
            command=_command(config, found),
            resume=resume,
            overwrite=overwrite,
            force=force,
        )
    except Stopped as e:
        stopped = e
    else:
        for line in (*describe_losses(summary), f"run directory: {summary.run_dir}"):
            _say(line)
        return summary
    _say(f"{stopped}; the state is saved, and train(config, resume=True) goes on")
    signal.raise_signal(stopped.number)
    raise stopped


def _config(config: str | os.PathLike[str] | Mapping[str, Any] | Config) -> Config:
    if isinstance(config, Config):
        return configs.from_tree(configs.to_tree(config), "config")
    if isinstance(config, Mapping):
        return configs.from_settings(config, "config")
    return rundir.config_at(os.path.expanduser(config))


def _command(config: Any, found: Config) -> str:
    """Returns a command that runs the same once more."""
    if isinstance(config, Config | Mapping):
        stored = os.path.join(found.output, rundir.CONFIG)
        return shlex.join(["qlora-jax", "train", stored, f"--output={found.output}-again"])
    return shlex.join(["qlora-jax", "train", os.fspath(config)])


def _held(model: Decoder) -> DTypeLike:
    return model.embed.get_value().dtype.name


def _name(dtype: DTypeLike) -> str:
    return dtype if isinstance(dtype, str) else jnp.dtype(dtype).name


def _start() -> None:
    """Starts jax; tells of a GPU that it does not use."""
    if warning := warn_if_gpu_idle():
        _say(warning)


def _say(line: str) -> None:
    # what stderr gets looks like an error in a notebook
    print(printable(line), file=None if in_notebook() else sys.stderr, flush=True)

"""Python functions that load, prompt and train models of the supported families.

They do the same as the command line. Lines for the user go to stderr; in a notebook they go to the
cell's output. These functions do not change settings of the process, such as XLA's flags or the
folder of compiled programs.
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
from qlora_jax.serve.base import Base, PromptSettings, is_run, open_plain, open_trained
from qlora_jax.serve.loading import regular_folder
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train import rundir
from qlora_jax.train.interrupt import Stopped
from qlora_jax.train.report import RunSummary, describe_losses

QUANT = QuantConfig()
"""Default settings of 4-bit weights."""


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
    """Loads a model, with its linears in 4 bits by default, and its tokenizer.

    Args:
      path: Hugging Face folder, .gguf file, hub id, built-in name or run directory. A run directory
        has its own settings: leave all other arguments out.
      codebook: codebook of the layers' linears in 4 bits, such as "nf4"; None stores them in
        `dtype`. Weights that are in 4 bits in the file are not quantized again.
      block_size: number of weights that share one scale, a power of two from 32 to 4096.
      double_quant: True quantizes the scales, too (double quantization, QLoRA section 3).
      dtype: dtype of the weights that are not quantized, and of computation; None is bfloat16.
      adapter: folder in PEFT's format, or run directory, from which the model gets its adapters.
      revision: branch, tag or commit of a hub id.

    Returns:
      The model and its tokenizer.

    Raises:
      UserError: the model or the adapter cannot be loaded, or an argument is not allowed.

    Example:
      ```python
      model, tokenizer = qj.load("smollm2-135m-instruct")
      model, tokenizer = qj.load("runs/my-run")  # the model as this run has trained it
      ```
    """
    _start()
    path = os.path.expanduser(path)
    if is_run(path):
        given = (codebook, block_size, double_quant, dtype, adapter, revision)
        if given != (QUANT.codebook, QUANT.block_size, QUANT.double_quant, None, None, None):
            raise UserError(
                f"{path}: a run directory has its own settings; leave the other arguments of load "
                "out, or give the path of the base model"
            )
        base = open_trained(path, base=False, bits=None, dtype=None, warn=_say)
        if own := _asked_as_trained(base):
            _say(f"to prompt the model as in training: qlora_jax.generate(..., {own})")
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
    """Returns the arguments of `generate` that write prompts as this run did in training."""
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
    """Generates the model's answer to one prompt, or to several prompts in one batch.

    Args:
      model: model from `load`, with or without adapters.
      tokenizer: tokenizer of the model.
      prompts: one prompt, or a sequence of prompts.
      max_new_tokens: largest number of tokens in an answer.
      temperature: divisor of the logits; 0 always takes the most probable token.
      top_p: probability from 0 to 1; each token is drawn from the smallest set of tokens that
        together have this probability.
      seed: seed of the random draws.
      chat: True puts each prompt into the tokenizer's chat template, if the tokenizer has one. With
        False, or without a template, the model continues the text of the prompt.
      system: text of the system turn; None adds no system turn.
      dtype: dtype of computation; None is the dtype of the embedding.

    Returns:
      One answer for one prompt; a list of answers for a sequence of prompts.

    Raises:
      UserError: a prompt is too long, the template refuses a prompt, or an argument is not allowed.

    Example:
      ```python
      qj.generate(model, tokenizer, "What is LoRA?")
      qj.generate(model, tokenizer, ["Hello", "Bye"], temperature=0.7, top_p=0.9, seed=1)
      ```
    """
    texts = answers(
        model,
        tokenizer,
        [prompts] if isinstance(prompts, str) else prompts,
        asking=PromptSettings(system, "auto" if chat else "none"),
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
    """Fine-tunes a model and writes a run directory, which `load` can read.

    On SIGINT or SIGTERM the run finishes its step, saves its state and raises the signal again.
    SIGINT, such as "interrupt" in a notebook, then ends in KeyboardInterrupt.

    Args:
      config: YAML file, run directory, dict with the content of such a file, or `Config`.
      resume: True continues the run in the output directory (messages call this `--resume`).
      overwrite: True deletes the run in the output directory first (`--overwrite`).
      force: True runs even if the memory of the device is too small (`--force`).

    Returns:
      The figures of the run, such as its losses; `run_dir` is the run directory.

    Raises:
      UserError: the config, the data or the model cannot be used, or the run does not fit on the
        device. No file is left half-written.
      RunFailed: the loss is not finite, or the frozen base changed.

    Example:
      ```python
      config = {
          "model": "smollm2-135m-instruct",
          "data": "my.jsonl",
          "output": "runs/my-run",
          "train": {"steps": 100},
      }
      summary = qj.train(config)
      model, tokenizer = qj.load(summary.run_dir)
      ```
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
    """Returns a shell command that repeats this run."""
    if isinstance(config, Config | Mapping):
        stored = os.path.join(found.output, rundir.CONFIG)
        return shlex.join(["qlora-jax", "train", stored, f"--output={found.output}-again"])
    return shlex.join(["qlora-jax", "train", os.fspath(config)])


def _held(model: Decoder) -> DTypeLike:
    return model.embed.get_value().dtype.name


def _name(dtype: DTypeLike) -> str:
    return dtype if isinstance(dtype, str) else jnp.dtype(dtype).name


def _start() -> None:
    """Starts jax, and warns if the machine has a GPU that jax does not use."""
    if warning := warn_if_gpu_idle():
        _say(warning)


def _say(line: str) -> None:
    # A notebook shows lines on stderr as errors.
    print(printable(line), file=None if in_notebook() else sys.stderr, flush=True)

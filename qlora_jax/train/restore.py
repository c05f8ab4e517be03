"""Restores a model from a run directory."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from qlora_jax.config import Config
from qlora_jax.formats.checkpoint import Checkpoint
from qlora_jax.models import fingerprint, trees
from qlora_jax.models.decoder import Decoder
from qlora_jax.runtime import manifest
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train import rundir
from qlora_jax.train.assemble import assemble
from qlora_jax.train.checkpoint import Checkpoints
from qlora_jax.train.initial_values import resolved
from qlora_jax.train.loop import best_step, read_progress
from qlora_jax.train.setup import load_run_model, open_model


@dataclasses.dataclass(frozen=True)
class Restored:
    """The model of a run, with its config and tokenizer.

    Attributes:
      config: config of the run.
      checkpoint: opened files of the pretrained model.
      tokenizer: tokenizer of the model.
      model: model with the trained state.
      step: step of the model's state; 0 before training. With `train.keep_best`, the step with the
        lowest held-out loss so far, else the newest.
    """

    config: Config
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    model: Decoder
    step: int


def restore(folder: str | Path, *, base: bool, warn: Callable[[str], None]) -> Restored:
    """Loads the model of a run, after or before training.

    Args:
      folder: run directory.
      base: whether to load the model before the first step.
      warn: function called with lines for the user.

    Raises:
      UserError: the folder is not a run directory, has no checkpoint, or its model cannot be
        loaded.
    """
    config = rundir.open_run(folder)
    return _restore(config, None if base else Path(folder), warn)


def from_config(config: Config, warn: Callable[[str], None]) -> Restored:
    """Returns the model of a config before training."""
    return _restore(config, None, warn)


def check_base(folder: str | Path, restored: Restored) -> None:
    """Checks that the frozen weights are those with which the run began.

    Raises:
      UserError: the weights differ, so the run's adapter does not fit them.
    """
    if restored.config.method == "full":
        return
    before = manifest.base_hash(manifest.read(folder))
    found = fingerprint.like(before, restored.model, restored.config.method)
    if found != before:
        raise UserError(
            f"{folder}: the adapter was trained on weights with hash {before}, but those of "
            f"{restored.config.model.path} have hash {found}: the files, the device or a version "
            "changed; restore the model that the adapter was trained on"
        )


def _restore(config: Config, folder: Path | None, warn: Callable[[str], None]) -> Restored:
    config = resolved(config)
    checkpoint, text = open_model(config, warn)
    model, _ = load_run_model(config, checkpoint, warn)
    if folder is None:
        return Restored(config, checkpoint, text, model, 0)
    training = assemble(config, trees.split(model, config.method))
    checkpoints = Checkpoints(folder)
    best = best_step(config, read_progress(checkpoints.extra().get("progress", {})))
    state, _ = checkpoints.restore(training.state, best, say=warn)
    checkpoints.close()
    return Restored(
        config, checkpoint, text, training._replace(state=state).model(), int(state.step)
    )

"""A run directory back into a model."""

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
from qlora_jax.train.loop import best_step, read_progress
from qlora_jax.train.setup import load_run_model, open_model
from qlora_jax.train.start import resolved


@dataclasses.dataclass(frozen=True)
class Restored:
    """A run's model.

    Attributes:
      config: the run's config.
      checkpoint: the pretrained weights, open.
      tokenizer: the tokenizer.
      model: the model.
      step: the step that the model is of; 0 before training. With `train.keep_best` that of the
        lowest held-out loss so far, else the newest.
    """

    config: Config
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    model: Decoder
    step: int


def restore(folder: str | Path, *, base: bool, warn: Callable[[str], None]) -> Restored:
    """Loads a run's model with what it trained, or without.

    Args:
      folder: run directory.
      base: leave the trained part as it was before the first step.
      warn: called with lines for the user.

    Raises:
      UserError: not a run directory, no checkpoint in it, or its model cannot be loaded.
    """
    config = rundir.open_run(folder)
    return _restore(config, None if base else Path(folder), warn)


def from_config(config: Config, warn: Callable[[str], None]) -> Restored:
    """The model that a config starts from."""
    return _restore(config, None, warn)


def check_base(folder: str | Path, restored: Restored) -> None:
    """Compares the frozen weights with those that the run began with.

    Raises:
      UserError: they are others, so an adapter trained on those does not fit.
    """
    if restored.config.method == "full":
        return
    before = manifest.base_hash(manifest.read(folder))
    found = fingerprint.like(before, restored.model, restored.config.method)
    if found != before:
        raise UserError(
            f"{folder}: the adapter was trained on weights of hash {before}, and those of "
            f"{restored.config.model.path} are {found}: the files, the device or a version "
            "changed; give back the model it was trained on"
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

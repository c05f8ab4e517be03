"""Checkpoints of a run: one orbax step folder each, written whole or not at all."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from qlora_jax import paths
from qlora_jax.atomic import storage_error
from qlora_jax.errors import UserError
from qlora_jax.models.trees import flatten
from qlora_jax.train import units
from qlora_jax.train.step import State

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run directory.

    Each holds the State (trained tree, optimizer, step, loss scale) by dotted path, the optimizer's
    units stacked (`units.stacked`) wherever they live, and `extra`: plain JSON values such as the
    loader's position and the seed. Randomness follows from seed and step, so no other generator
    state exists.
    """

    def __init__(self, run_dir: Path, keep: int = 0):
        """Opens RUN_DIR/checkpoints to write there, and makes it; the newest `keep` are kept.

        With `keep` 0 it is opened for reading alone, and a run that is writing there goes on
        undisturbed.

        Raises:
          UserError: the folder cannot be made, or is not there to be read.
        """
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = run_dir.absolute() / FOLDER
        if not keep and not paths.is_dir(self.folder):
            raise UserError(f"{self.folder}: no checkpoint in it; train the run first")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
            # switches the first two off: half-written folders belong to the run that writes
            read_only=not keep,
        )
        # named, so that a manager which has saved nothing can describe what is there
        handlers = {"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}
        try:
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_handlers=handlers
            )
        except OSError as e:
            raise storage_error(self.folder, e) or e from None

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def latest_text(self) -> str:
        """What is kept, for messages about a run that ends."""
        step = self.latest()
        if step is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is step {step}"

    def save(self, state: State, extra: Mapping[str, Any]) -> None:
        """Writes a checkpoint and waits until it is on disk; older ones beyond `keep` go then.

        Raises:
          UserError: the disk is full or not writable. The checkpoints before are untouched.
        """
        step = int(state.step)
        if step == self.latest():
            return
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(flatten(_stacked(state))),
                    extra=ocp.args.JsonSave(dict(extra)),
                ),
            )
            self._manager.wait_until_finished()
        except Exception as e:
            problem = _storage_error(self.folder, e)
            if problem is None:
                raise
            raise UserError(f"{problem}; {self.latest_text()}") from e

    def restore(self, like: State, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """Reads a checkpoint, the newest by default.

        Args:
          like: a State of the same structure, shapes and dtypes.
          step: which one.

        Raises:
          UserError: there is none, or it holds another model's, method's or optimizer's state.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"{self.folder}: no checkpoint in it; train the run first")
        template = like._replace(optimizer=units.stacked_like(like.trained, like.optimizer))
        flat = flatten(template)
        self._check(step, flat)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(jax.tree.map(_abstract, flat)),
                    extra=ocp.args.JsonRestore(),
                ),
            )
        except (ValueError, KeyError) as e:
            raise UserError(
                f"{self.folder}/{step}: does not hold this run's state: {str(e).splitlines()[0]}"
            ) from e
        leaves = [restored.state[path] for path in flat]
        state = jax.tree.unflatten(jax.tree.structure(template), leaves)
        optimizer = units.unstacked(like.trained, state.optimizer, like.optimizer)
        return state._replace(optimizer=optimizer), dict(restored.extra)

    def _check(self, step: int, flat: Mapping[str, jax.Array]) -> None:
        # orbax converts dtypes silently
        saved = self._manager.item_metadata(step).state.tree
        here, there = ({path: _kind(x) for path, x in tree.items()} for tree in (flat, saved))
        differing = [path for path in here | there if here.get(path) != there.get(path)]
        if not differing:
            return
        path = min(differing, key=_is_optimizers)
        remedy = (
            "; give the optimizer.moments that it was made with" if _is_optimizers(path) else ""
        )
        raise UserError(
            f"{self.folder}/{step}: does not hold this run's state: {path} is "
            f"{there.get(path, 'absent')} there, {here.get(path, 'absent')} here{remedy}"
        )

    def close(self) -> None:
        self._manager.close()


def _storage_error(folder: Path, error: Exception) -> UserError | None:
    # tensorstore reports an OSError as a ValueError with its number in the text
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return storage_error(folder, OSError(int(number[1]), "") if number else error)


def _stacked(state: State) -> State:
    return state._replace(optimizer=units.stacked(state.trained, state.optimizer))


def _is_optimizers(path: str) -> bool:
    return path.startswith("optimizer.")


def _kind(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _abstract(x: jax.Array | np.ndarray) -> jax.ShapeDtypeStruct | np.ndarray:
    if isinstance(x, np.ndarray):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

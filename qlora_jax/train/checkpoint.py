"""Checkpoints of a run: each is one orbax step folder, written completely or not at all."""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from qlora_jax.models.trees import flatten
from qlora_jax.runtime import digests, format_version, paths
from qlora_jax.runtime.atomic import storage_error
from qlora_jax.runtime.digests import Damaged
from qlora_jax.runtime.errors import FULL_MEMORY, UserError, first_line
from qlora_jax.train import layer_groups, orbax_noise
from qlora_jax.train.state import TrainState

FOLDER = "checkpoints"
ASIDE = "damaged-"
"""Prefix of the name of a damaged checkpoint that was renamed; the step number follows."""


class Checkpoints:
    """The checkpoints of one run directory.

    Each checkpoint holds the `TrainState` (trained tree, optimizer, step, loss scale) by dotted
    path, and `extra`: plain JSON values such as the position of the loader and the seed. The
    optimizer states of the layers are stacked (`layer_groups.stack_states`), independent of their
    memory. All random numbers follow from seed and step, so there is no generator state to save.
    `extra` also holds a digest of every array and of itself; reading a checkpoint compares them.
    """

    def __init__(
        self, run_dir: Path, keep: int = 0, before_save: Callable[[], None] = lambda: None
    ):
        """Opens RUN_DIR/checkpoints for writing, and creates the folder.

        With `keep` 0 the folder is opened for reading only. This does not disturb a run that is
        writing there.

        Args:
          run_dir: run directory.
          keep: number of newest checkpoints to keep; 0 opens the folder for reading only.
          before_save: function called before each checkpoint is written; raises an error to
            forbid the save.

        Raises:
          UserError: the folder cannot be created, or does not exist and `keep` is 0.
        """
        orbax_noise.silence()
        self._read_only, self._before_save = not keep, before_save
        self.folder = run_dir.absolute() / FOLDER
        if not keep and not paths.is_dir(self.folder):
            raise UserError(f"{self.folder}: no checkpoint in it; train the run first")
        self._keep = keep
        options = ocp.CheckpointManagerOptions(
            # orbax must not delete: `save` does, because the held-out loss decides what to keep
            max_to_keep=None,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
            # a reader must not delete a half-written folder of a run that is writing
            read_only=self._read_only,
        )
        # explicit handlers, so that a manager that has saved nothing can read the metadata
        handlers = {"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}
        try:
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_handlers=handlers
            )
        except OSError as e:
            raise storage_error(self.folder, e) or e from None

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint; None without checkpoints."""
        return self._manager.latest_step()

    def latest_text(self) -> str:
        """Returns a phrase on the newest checkpoint, for messages about a run that ends."""
        step = self.latest()
        if step is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is step {step}"

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def extra(self) -> dict[str, Any]:
        """Returns `extra` of the newest checkpoint whose `extra` is undamaged; else an empty dict.

        Raises:
          UserError: a checkpoint has a newer format, or the user may not read it.
        """
        for step in reversed(self.steps()):
            with contextlib.suppress(Damaged):
                return self._extra(step)[0]
        return {}

    def save(self, state: TrainState, extra: Mapping[str, Any], best: int | None = None) -> None:
        """Writes a checkpoint and waits until it is on disk.

        Then deletes all checkpoints except the newest `keep` and `best`.

        Args:
          state: training state to save.
          extra: plain JSON values to save beside the state.
          best: step of a checkpoint that is never deleted; None for none.

        Raises:
          UserError: the disk is full or not writable, or `before_save` forbids the save. Earlier
            checkpoints remain unchanged.
        """
        step = int(state.step)
        self._before_save()
        if step == self.latest():
            return
        flat = flatten(_stacked(state))
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(flat),
                    extra=ocp.args.JsonSave(
                        digests.seal({**extra, format_version.KEY: format_version.NEWEST}, flat)
                    ),
                ),
            )
            self._manager.wait_until_finished()
            for old in self.steps()[: -self._keep]:
                if old != best:
                    self._manager.delete(old)
        except Exception as e:
            problem = _storage_error(self.folder, e)
            if problem is None:
                raise
            raise UserError(f"{problem}; {self.latest_text()}") from e

    def restore(
        self,
        like: TrainState,
        step: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> tuple[TrainState, dict[str, Any]]:
        """Reads a checkpoint, by default the newest undamaged one.

        If the folder is open for writing, newer damaged checkpoints are renamed, so that their
        steps can be saved again.

        Args:
          like: `TrainState` with the structure, shapes and dtypes to read.
          step: step of the only checkpoint to try (the one with the lowest held-out loss); None
            tries all checkpoints, newest first.
          say: function called with a line for each damaged checkpoint.

        Raises:
          UserError: there is no checkpoint, none is undamaged, or the checkpoint holds the state
            of another model, method or optimizer.
        """
        steps = self.steps()[::-1] if step is None else [step]
        if not steps:
            raise UserError(f"{self.folder}: no checkpoint in it; train the run first")
        template = like._replace(
            optimizer=layer_groups.stack_states_like(like.trained, like.optimizer)
        )
        damaged: dict[int, str] = {}
        for each in steps:
            try:
                flat, extra = self._read(each, flatten(template))
            except Damaged as e:
                damaged[each] = f"{self.folder}/{each}: damaged: {e}"
                continue
            for other, problem in damaged.items():
                say(f"warning: {problem}; step {each} is used instead{self._set_aside(other)}")
            state = jax.tree.unflatten(jax.tree.structure(template), list(flat.values()))
            optimizer = layer_groups.unstack_states(like.trained, state.optimizer, like.optimizer)
            return state._replace(optimizer=optimizer), extra
        raise UserError(f"{'; '.join(damaged.values())}; {_remedy(step)}")

    def _read(
        self, step: int, like: Mapping[str, Any]
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Reads one checkpoint and compares its digests.

        Raises:
          Damaged: the files differ from the saved ones.
          UserError: the checkpoint holds another state or a newer format, or the user may not
            read it.
        """
        extra, saved = self._extra(step)
        if saved is None:
            with self._guarded():
                tree = self._manager.item_metadata(step).state.tree
                there = {path: _kind(x) for path, x in tree.items()}
        else:
            there = {path: text.rpartition(" ")[0] for path, text in saved.items()}
        self._check(step, like, there)
        with self._guarded():
            abstract = jax.tree.map(_abstract, dict(like))
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            found = self._manager.restore(step, args=args).state
        for path, text in (saved or {}).items():
            digests.check(path, found[path], text)
        return {path: found[path] for path in like}, extra

    def _extra(self, step: int) -> tuple[dict[str, Any], dict[str, str] | None]:
        """Reads `extra` of one checkpoint and the digests of its arrays; raises like `_read`."""
        with self._guarded():
            args = ocp.args.Composite(extra=ocp.args.JsonRestore())
            stored = self._manager.restore(step, args=args).extra
        extra, saved = digests.unseal(stored)
        format_version.check(extra, f"{self.folder}/{step}")
        extra.pop(format_version.KEY, None)
        return extra, saved

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Translates the errors of an orbax read, which have a dozen types, into `Damaged`.

        Raises:
          Damaged: orbax failed.
          UserError: the user may not read the files.
        """
        try:
            yield
        except MemoryError:
            raise
        except PermissionError as e:
            raise paths.unreadable(self.folder, e) from None
        except Exception as e:
            if FULL_MEMORY in str(e):
                raise
            raise Damaged(f"orbax cannot read it ({type(e).__name__}: {first_line(e)})") from e

    def _set_aside(self, step: int) -> str:
        """Renames a damaged checkpoint; returns the end of the message about it."""
        if self._read_only:
            return ""
        aside = self.folder / f"{ASIDE}{step}"
        shutil.rmtree(aside, ignore_errors=True)
        (self.folder / str(step)).rename(aside)
        self._manager.reload()
        return f", and the damaged one was renamed to {aside.name}"

    def _check(self, step: int, flat: Mapping[str, Any], there: Mapping[str, str]) -> None:
        # orbax would convert a different dtype without an error
        here = {path: _kind(x) for path, x in flat.items()}
        differing = [path for path in {**here, **there} if here.get(path) != there.get(path)]
        if not differing:
            return
        path = min(differing, key=_is_optimizers)
        remedy = (
            "; give the optimizer.moments of the run that wrote it" if _is_optimizers(path) else ""
        )
        raise UserError(
            f"{self.folder}/{step}: does not hold this run's state: {path} is "
            f"{there.get(path, 'absent')} there, but {here.get(path, 'absent')} in this run{remedy}"
        )

    def close(self) -> None:
        self._manager.close()


def _remedy(step: int | None) -> str:
    if step is None:
        return (
            "there is no older one: train the run again with --overwrite, or restore the folder "
            "from a copy"
        )
    return (
        "it has the lowest held-out loss: restore the folder from a copy, or continue with "
        "--resume --train.keep_best=false, which exports the last step"
    )


def _storage_error(folder: Path, error: Exception) -> UserError | None:
    # tensorstore raises a ValueError for an OSError, with the error number in the text
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return storage_error(folder, OSError(int(number[1]), "") if number else error)


def _stacked(state: TrainState) -> TrainState:
    return state._replace(optimizer=layer_groups.stack_states(state.trained, state.optimizer))


def _is_optimizers(path: str) -> bool:
    return path.startswith("optimizer.")


def _kind(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _abstract(x: jax.Array | np.ndarray) -> jax.ShapeDtypeStruct | np.ndarray:
    if isinstance(x, np.ndarray):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

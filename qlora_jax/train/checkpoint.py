"""Checkpoints of a run: one orbax step folder each, written whole or not at all."""

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
from qlora_jax.train.step import TrainState

FOLDER = "checkpoints"
ASIDE = "damaged-"
"""Begins the name of a checkpoint that was set aside; its step follows."""


class Checkpoints:
    """The checkpoints of one run directory.

    Each holds the State (trained tree, optimizer, step, loss scale) by dotted path, the optimizer's
    units stacked (`layer_groups.stack_states`) wherever they live, and `extra`: plain JSON values such as the
    loader's position and the seed. Randomness follows from seed and step, so no other generator
    state exists. `extra` also holds a digest of every array and of itself, which are compared when
    a checkpoint is read.
    """

    def __init__(
        self, run_dir: Path, keep: int = 0, before_save: Callable[[], None] = lambda: None
    ):
        """Opens RUN_DIR/checkpoints to write there, and makes it; the newest `keep` are kept.

        With `keep` 0 it is opened for reading alone, and a run that is writing there goes on
        undisturbed.

        Args:
          run_dir: the run directory.
          keep: how many.
          before_save: called before each is written; raises if it must not be.

        Raises:
          UserError: the folder cannot be made, or is not there to be read.
        """
        orbax_noise.silence()
        self._read_only, self._before_save = not keep, before_save
        self.folder = run_dir.absolute() / FOLDER
        if not keep and not paths.is_dir(self.folder):
            raise UserError(f"{self.folder}: no checkpoint in it; train the run first")
        self._keep = keep
        options = ocp.CheckpointManagerOptions(
            # `save` deletes: what is kept depends on the held-out loss
            max_to_keep=None,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
            # half-written folders belong to the run that writes
            read_only=self._read_only,
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

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, the oldest first."""
        return sorted(self._manager.all_steps())

    def extra(self) -> dict[str, Any]:
        """The `extra` of the newest checkpoint in which it is whole; empty where there is none.

        Raises:
          UserError: it is of a newer format, or may not be read.
        """
        for step in reversed(self.steps()):
            with contextlib.suppress(Damaged):
                return self._extra(step)[0]
        return {}

    def save(self, state: TrainState, extra: Mapping[str, Any], best: int | None = None) -> None:
        """Writes a checkpoint and waits until it is on disk; older ones beyond `keep` go then.

        Args:
          state: what is saved.
          extra: plain JSON values beside it.
          best: the step of a checkpoint that stays, however old.

        Raises:
          UserError: the disk is full or not writable, or `before_save` forbids it. The
            checkpoints before are untouched.
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
        """Reads a checkpoint, by default the newest that is whole.

        Damaged ones that are newer than it are set aside where the run writes: they are renamed,
        so that their steps can be saved again.

        Args:
          like: a State of the same structure, shapes and dtypes.
          step: that of the lowest held-out loss, to read that one or none.
          say: called with a line for each damaged one.

        Raises:
          UserError: there is none, none is whole, or it holds another model's, method's or
            optimizer's state.
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
                say(f"warning: {problem}; step {each} is taken{self._set_aside(other)}")
            state = jax.tree.unflatten(jax.tree.structure(template), list(flat.values()))
            optimizer = layer_groups.unstack_states(like.trained, state.optimizer, like.optimizer)
            return state._replace(optimizer=optimizer), extra
        raise UserError(f"{'; '.join(damaged.values())}; {_remedy(step)}")

    def _read(
        self, step: int, like: Mapping[str, Any]
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Reads one checkpoint and compares its digests.

        Raises:
          Damaged: its files are not what was saved.
          UserError: it holds another state, is of a newer format, or may not be read.
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
        """Reads one checkpoint's `extra`, and the digests of its arrays; raises as `_read`."""
        with self._guarded():
            args = ocp.args.Composite(extra=ocp.args.JsonRestore())
            stored = self._manager.restore(step, args=args).extra
        extra, saved = digests.unseal(stored)
        format_version.check(extra, f"{self.folder}/{step}")
        extra.pop(format_version.KEY, None)
        return extra, saved

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Within it orbax reads; its errors, of a dozen types, mean damage.

        Raises:
          Damaged: it failed.
          UserError: the files may not be read.
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
        """Renames a damaged checkpoint; returns what is said of it."""
        if self._read_only:
            return ""
        aside = self.folder / f"{ASIDE}{step}"
        shutil.rmtree(aside, ignore_errors=True)
        (self.folder / str(step)).rename(aside)
        self._manager.reload()
        return f", and the damaged one is now {aside.name}"

    def _check(self, step: int, flat: Mapping[str, Any], there: Mapping[str, str]) -> None:
        # orbax converts dtypes silently
        here = {path: _kind(x) for path, x in flat.items()}
        differing = [path for path in {**here, **there} if here.get(path) != there.get(path)]
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


def _remedy(step: int | None) -> str:
    if step is None:
        return (
            "there is no older one: train the run again with --overwrite, or give back a copy of "
            "the folder"
        )
    return (
        "it is the one of the lowest held-out loss: give back a copy of the folder, or go on with "
        "--resume --train.keep_best=false, which exports the last step"
    )


def _storage_error(folder: Path, error: Exception) -> UserError | None:
    # tensorstore reports an OSError as a ValueError with its number in the text
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

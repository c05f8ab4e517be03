"""The second half of a run: its directory is claimed, and what is in it is trained on."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from qlora_jax.config import Config
from qlora_jax.runtime import manifest, processes
from qlora_jax.runtime.display import progress
from qlora_jax.train import resume, rundir, step_count
from qlora_jax.train.assemble import Training
from qlora_jax.train.checkpoint import Checkpoints
from qlora_jax.train.choice import Evaluation, describe_losses
from qlora_jax.train.loop import Progress, best_step, look, loop, read_progress
from qlora_jax.train.metrics import Log, open_log
from qlora_jax.train.offload import ON_DEVICE
from qlora_jax.train.optimizer import schedule
from qlora_jax.train.owner import Owner
from qlora_jax.train.prepare import Built, Opened, PrepareRequest, entries
from qlora_jax.train.samples import answer


@dataclasses.dataclass(frozen=True)
class Begun:
    """A run with its directory, at its first step or where it goes on.

    Attributes:
      built: the training, with the state of the newest checkpoint if the run goes on from one.
      owned: the directory, which is this run's alone.
      checkpoints: those in it.
      counters: those of the checkpoint, or zeros; they go on.
      earlier_s: seconds of the sessions before this one.
      resumed: whether the run goes on from a checkpoint.
      stored: the config in the directory, which a resumed run may change; None for a new run.
      manifest: the manifest of this session, to be joined to those of earlier sessions; None for
        a new run.
    """

    built: Built
    owned: Owner
    checkpoints: Checkpoints
    counters: Progress
    earlier_s: float
    resumed: bool
    stored: Config | None
    manifest: Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What training came to.

    Attributes:
      training: with the state that is exported.
      steps: done, not all of which the exported state may have.
      after: the held-out losses of the exported state; None without held-out data.
    """

    training: Training
    steps: int
    after: Evaluation | None


def begin(asked: PrepareRequest, built: Built, held: contextlib.ExitStack) -> Begun:
    """Claims the run directory, and reads the state that a resumed run goes on from.

    A caller that keeps no `built` of its own does not hold the trained tree twice afterwards.

    Args:
      asked: the run.
      built: the training.
      held: keeps the directory this run's until it is closed.

    Raises:
      UserError: the directory cannot be claimed, or its checkpoints are damaged or another run's.
    """
    config, say = asked.config, asked.say
    described = manifest.build(config, asked.command, entries(config, built.facts))
    goes_on = asked.resume and rundir.holds_run(config.output)
    owned = held.enter_context(
        rundir.claim(config, described, resume=asked.resume, overwrite=asked.overwrite)
    )
    stored = rundir.open_run(owned.folder) if goes_on else None
    for line in resume.describe(stored, config) if stored is not None else ():
        say(line)
    checkpoints, counters = Checkpoints(owned.folder, config.train.keep, owned.check), Progress()
    resumed = asked.resume and checkpoints.latest() is not None
    if resumed:
        state, extra = checkpoints.restore(built.training.state, say=say)
        built.loader.restore(extra["loader"])
        counters = read_progress(extra["progress"])
        if built.changed:
            say(built.changed)
        say(f"resumed from step {int(state.step)}")
        built = dataclasses.replace(built, training=built.training._replace(state=state))
        _check_best(config, counters, checkpoints, say)
    kept = described if goes_on else None
    return Begun(built, owned, checkpoints, counters, counters.seconds, resumed, stored, kept)


def _check_best(
    config: Config, counters: Progress, checkpoints: Checkpoints, say: Callable[[str], None]
) -> None:
    """Forgets the lowest held-out loss where its checkpoint is to be kept and was not."""
    step = best_step(config, counters)
    if step is None or step in checkpoints.steps():
        return
    counters.choice = dataclasses.replace(counters.choice, best=None, since=0)
    say(
        f"warning: the checkpoint of step {step}, of the lowest held-out loss so far, was not "
        "kept; train.keep_best chooses among the evaluations from here on"
    )


def fit(asked: PrepareRequest, opened: Opened, begun: Begun) -> Fitted:
    """Trains to the last step, evaluates on the way, and reads the state that is exported.

    Raises:
      UserError: the directory cannot be written to, its metrics are damaged, or the checkpoint of
        the lowest held-out loss is.
      RunFailed: the loss is not finite.
      Stopped: by a signal, with the state saved.
    """
    training, folder, config = begun.built.training, begun.owned.folder, opened.config
    counters, held_out = begun.counters, begun.built.held_out
    with open_log(folder, start_step=int(training.state.step)) as log:
        if log.lost:
            asked.say(describe_lost(log, int(training.state.step)))
        _go_on(asked, opened, begun)  # and what is there can be read
        if not begun.resumed:
            _before(asked, opened, begun, log)
        state = loop(
            config,
            training.program,
            training.state,
            training.frozen,
            begun.built.loader,
            held_out,
            begun.checkpoints,
            log,
            counters,
            schedule(config.optimizer, config.train.step_count),
            moves=opened.memory.moments is not ON_DEVICE,
            ahead=jax.default_backend() != "cpu",
        )
        steps, last = int(state.step), counters.choice.last
        if held_out and (last is None or last.step != steps):
            # earlier versions saved before they evaluated
            with progress("evaluating", None):
                found = look(training.program, state, training.frozen, held_out, log)
            counters.choice = counters.choice.seen(found)
        training = training._replace(state=state)
    best = best_step(config, counters)
    if best not in (None, steps):
        # the last state is let go before the other one is read
        del state
        training = _read_best(training, begun, best)
    begun.checkpoints.close()
    return Fitted(training, steps, counters.choice.exported(config.train.keep_best))


def _go_on(asked: PrepareRequest, opened: Opened, begun: Begun) -> None:
    """Writes the manifest and the config of a resumed run, and says what its length changes.

    The manifest, by which a run is known as finished, goes first: killed in between, the run is
    resumed as any other.
    """
    if begun.manifest is None or begun.stored is None:
        return
    folder, config = begun.owned.folder, opened.config
    before = step_count.with_steps(begun.stored, begun.built.loader.steps_of).train.step_count
    taken = int(begun.built.training.state.step) - begun.counters.skipped
    if line := step_count.describe_jump(config.optimizer, taken, before, config.train.step_count):
        asked.say(line)
    described, stored = begun.manifest, begun.stored

    def written() -> None:
        manifest.write(folder, described, resumed=True)
        if not resume.is_same(stored, asked.config):
            rundir.write_config(folder, dataclasses.replace(asked.config, output=stored.output))

    processes.by_first(written)


def _read_best(training: Training, begun: Begun, step: int) -> Training:
    """Returns the training with the state of an earlier checkpoint."""
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), training.state
    )
    training = training._replace(state=like)
    state, _ = begun.checkpoints.restore(like, step)
    return training._replace(state=state)


def describe_lost(log: Log, start_step: int) -> str:
    """Returns a warning of steps that a resumed run's metrics lack.

    Args:
      log: with at least one.
      start_step: the step of the checkpoint that the run goes on from.
    """
    return (
        f"warning: {log.path}: damaged: {len(log.lost)} of the {start_step} steps resumed from "
        f"have no line, the first is step {log.lost[0]}; the report lacks them"
    )


def _before(asked: PrepareRequest, opened: Opened, begun: Begun, log: Log) -> None:
    """Notes the held-out loss and the samples' answers before the first step."""
    training, counters = begun.built.training, begun.counters
    if held_out := begun.built.held_out:
        with progress("evaluating", None):
            found = look(training.program, training.state, training.frozen, held_out, log)
        counters.before = found
        asked.say(f"held-out loss before training: {describe_losses(found)}")
    counters.answers_before = answer(
        asked.config,
        training.model(),
        opened.tokenizer,
        opened.data.questions,
        "answering samples before training",
        opened.mesh,
    )

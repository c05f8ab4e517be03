"""The second half of a run: claims the run directory, restores the state, and trains."""

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
    """A run that has claimed its directory, before its first step or at the step to resume from.

    Attributes:
      built: training, with the state of the newest checkpoint if the run resumes from one.
      owned: run directory, locked for this run.
      checkpoints: checkpoints in the run directory.
      counters: counters of the checkpoint, or zeros; the loop advances them.
      earlier_s: seconds that earlier sessions of the run spent in steps.
      resumed: whether the run resumes from a checkpoint.
      stored: config in the run directory before this session; None for a new run.
      manifest: manifest of this session, to append to those of earlier sessions; None for a new
        run.
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
    """The result of training.

    Attributes:
      training: training with the state to export.
      steps: number of steps done; the exported state may be from an earlier step.
      after: held-out losses of the exported state; None without held-out data.
    """

    training: Training
    steps: int
    after: Evaluation | None


def begin(asked: PrepareRequest, built: Built, held: contextlib.ExitStack) -> Begun:
    """Claims the run directory, and reads the state from which a resumed run continues.

    The caller should keep no reference to `built`, because a resumed run would then hold the
    trained tree twice.

    Args:
      asked: request of the run.
      built: training to begin.
      held: stack that holds the lock on the run directory until it is closed.

    Raises:
      UserError: the directory cannot be claimed, or its checkpoints are damaged or belong to
        another run.
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
    """Discards the lowest held-out loss so far if the run needs its checkpoint and has none."""
    step = best_step(config, counters)
    if step is None or step in checkpoints.steps():
        return
    counters.choice = dataclasses.replace(counters.choice, best=None, since=0)
    say(
        f"warning: the checkpoint of step {step}, of the lowest held-out loss so far, was not "
        "kept; train.keep_best chooses among the evaluations from here on"
    )


def fit(asked: PrepareRequest, opened: Opened, begun: Begun) -> Fitted:
    """Trains to the last step with evaluations, and reads the state to export.

    Raises:
      UserError: the run directory cannot be written to, the metrics file is damaged, or the
        checkpoint with the lowest held-out loss is damaged.
      RunFailed: the loss is not finite.
      Stopped: a signal arrived; the state is saved.
    """
    training, folder, config = begun.built.training, begun.owned.folder, opened.config
    counters, held_out = begun.counters, begun.built.held_out
    with open_log(folder, start_step=int(training.state.step)) as log:
        if log.lost:
            asked.say(describe_lost(log, int(training.state.step)))
        _go_on(asked, opened, begun)  # after all earlier files were read without error
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
            # earlier versions saved a step before its evaluation
            with progress("evaluating", None):
                found = look(training.program, state, training.frozen, held_out, log)
            counters.choice = counters.choice.seen(found)
        training = training._replace(state=state)
    best = best_step(config, counters)
    if best not in (None, steps):
        # frees the last state before the other one is read
        del state
        training = _read_best(training, begun, best)
    begun.checkpoints.close()
    return Fitted(training, steps, counters.choice.exported(config.train.keep_best))


def _go_on(asked: PrepareRequest, opened: Opened, begun: Begun) -> None:
    """Writes manifest and config of a resumed run, and warns if its length changes the rate.

    The manifest marks a run as finished, so it is written first. If the process is killed between
    the two files, the run can be resumed like any other.
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
    """Returns a warning about steps that are missing in the metrics of a resumed run.

    Args:
      log: log with at least one lost step.
      start_step: step of the checkpoint from which the run resumes.
    """
    return (
        f"warning: {log.path}: damaged: {len(log.lost)} of the {start_step} steps resumed from "
        f"have no line, the first is step {log.lost[0]}; the report lacks them"
    )


def _before(asked: PrepareRequest, opened: Opened, begun: Begun, log: Log) -> None:
    """Stores the held-out loss and the answers to the sample prompts before the first step."""
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

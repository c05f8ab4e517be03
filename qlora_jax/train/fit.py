"""The second half of a run: its directory is claimed, and what is in it is trained on."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qlora_jax.data.loader import Batch
from qlora_jax.runtime import manifest
from qlora_jax.train import rundir
from qlora_jax.train.assemble import Training
from qlora_jax.train.checkpoint import Checkpoints
from qlora_jax.train.display import progress
from qlora_jax.train.loop import Progress, evaluate, loop
from qlora_jax.train.metrics import MetricsLog
from qlora_jax.train.offload import ON_DEVICE
from qlora_jax.train.optimizer import schedule
from qlora_jax.train.owner import Owner
from qlora_jax.train.prepare import Built, Opened, Request, entries
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
      manifest: the manifest of this session, to be joined to those of earlier sessions; None for
        a new run.
    """

    built: Built
    owned: Owner
    checkpoints: Checkpoints
    counters: Progress
    earlier_s: float
    resumed: bool
    manifest: Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What training came to.

    Attributes:
      training: with the last state.
      eval_after: held-out loss in nats per target token; None without held-out data.
      eval_tokens: held-out target tokens.
    """

    training: Training
    eval_after: float | None
    eval_tokens: int


def begin(asked: Request, built: Built, held: contextlib.ExitStack) -> Begun:
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
    checkpoints, counters = Checkpoints(owned.folder, config.train.keep, owned.check), Progress()
    resumed = asked.resume and checkpoints.latest() is not None
    if resumed:
        state, extra = checkpoints.restore(built.training.state, say=say)
        built.loader.restore(extra["loader"])
        counters = Progress(**extra["progress"])
        if built.changed:
            say(built.changed)
        say(f"resumed from step {int(state.step)}")
        built = dataclasses.replace(built, training=built.training._replace(state=state))
    kept = described if goes_on else None
    return Begun(built, owned, checkpoints, counters, counters.seconds, resumed, kept)


def fit(asked: Request, opened: Opened, begun: Begun) -> Fitted:
    """Trains to the last step, evaluates before and after, and logs both.

    Raises:
      UserError: the directory cannot be written to, or its metrics are damaged.
      RunFailed: the loss is not finite.
      Stopped: by a signal, with the state saved.
    """
    training, folder = begun.built.training, begun.owned.folder
    with MetricsLog(folder, start_step=int(training.state.step)) as log:
        if log.lost:
            asked.say(describe_lost(log, int(training.state.step)))
        if begun.manifest is not None:  # and what is there can be read
            manifest.write(folder, begun.manifest, resumed=True)
        if not begun.resumed:
            _before(asked, opened, begun, log)
        state = loop(
            asked.config,
            training.program,
            training.state,
            training.frozen,
            begun.built.loader,
            begun.built.held_out,
            begun.checkpoints,
            log,
            begun.counters,
            schedule(asked.config.optimizer, asked.config.train.steps),
            moves=opened.moments is not ON_DEVICE,
        )
        begun.checkpoints.close()
        training = training._replace(state=state)
        loss, tokens = _evaluate(training, begun.built.held_out, log) or (None, 0)
    return Fitted(training, loss, tokens)


def describe_lost(log: MetricsLog, start_step: int) -> str:
    """Returns a warning of steps that a resumed run's metrics lack.

    Args:
      log: with at least one.
      start_step: the step of the checkpoint that the run goes on from.
    """
    return (
        f"warning: {log.path}: damaged: {len(log.lost)} of the {start_step} steps resumed from "
        f"have no line, the first is step {log.lost[0]}; the report lacks them"
    )


def _before(asked: Request, opened: Opened, begun: Begun, log: MetricsLog) -> None:
    """Notes the held-out loss and the samples' answers before the first step."""
    training, counters = begun.built.training, begun.counters
    if found := _evaluate(training, begun.built.held_out, log):
        counters.eval_before, _ = found
        asked.say(f"held-out loss before training: {counters.eval_before:.4f}")
    counters.answers_before = answer(
        asked.config,
        training.model(),
        opened.text,
        opened.data.questions,
        "answering samples before training",
    )


def _evaluate(
    training: Training, held_out: Sequence[Batch], log: MetricsLog
) -> tuple[float, int] | None:
    """Logs the held-out loss, and returns it with the number of target tokens, if there is any."""
    if not held_out:
        return None
    with progress("evaluating", None):
        loss, tokens = evaluate(training.program, training.state.trained, training.frozen, held_out)
    log.write(int(training.state.step), {"eval/loss": loss, "eval/perplexity": float(np.exp(loss))})
    return loss, tokens

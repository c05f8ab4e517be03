"""The loop over steps: log, evaluate, save, stop."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from qlora_jax.config import Config
from qlora_jax.data.loader import Loader
from qlora_jax.models.trees import flatten
from qlora_jax.quant import nbytes
from qlora_jax.runtime import processes
from qlora_jax.runtime.display import TrainDisplay
from qlora_jax.runtime.errors import RunFailed
from qlora_jax.train.assemble import drops_out, scales_loss
from qlora_jax.train.checkpoint import Checkpoints
from qlora_jax.train.choice import (
    BestStep,
    Evaluation,
    describe_losses,
    describe_patience,
    read_choice,
    read_evaluation,
)
from qlora_jax.train.interrupt import Requests, Stopped
from qlora_jax.train.metrics import Log
from qlora_jax.train.step import Figures, StepProgram, TrainState

MOST_SKIPPED = 20
"""Overflowing steps in a row that stop a run."""


@dataclasses.dataclass
class Progress:
    """Plain counters that go on across a resume; saved in each checkpoint.

    Attributes:
      tokens: trained on so far, padding excluded.
      skipped: steps without an update because a gradient overflowed.
      skipped_in_a_row: of those, the latest uninterrupted ones.
      seconds: spent in steps.
      before: the held-out losses before training.
      choice: what later evaluations told.
      answers_before: the samples' answers before training.
    """

    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    before: Evaluation | None = None
    choice: BestStep = dataclasses.field(default_factory=BestStep)
    answers_before: list[str] = dataclasses.field(default_factory=list)


def read_progress(values: Mapping[str, Any]) -> Progress:
    """Returns the counters of a checkpoint's `extra`."""
    rest = dict(values)
    # earlier runs kept one number
    old = rest.pop("eval_before", None)
    before = read_evaluation(rest.pop("before", None))
    if old is not None:
        before = Evaluation(0, old)
    chosen = read_choice(rest.pop("choice")) if "choice" in rest else BestStep()
    return Progress(**rest, before=before, choice=chosen)


def evaluate(
    program: StepProgram, trained: Any, frozen: Any, batches: Sequence[Mapping[str, np.ndarray]]
) -> tuple[float, int]:
    """Mean loss in nats per target token over fixed batches, and the number of those tokens."""
    sums = [program.evaluate(trained, frozen, batch) for batch in batches]
    count = sum(float(n) for _, n in sums)
    return sum(float(s) for s, _ in sums) / max(count, 1), int(count)


def look(
    program: StepProgram,
    state: TrainState,
    frozen: Any,
    held_out: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
    log: Log,
) -> Evaluation:
    """Evaluates on every held-out set, and logs the losses.

    Args:
      program: the functions of a step.
      state: evaluated.
      frozen: the tree that no step changes.
      held_out: name of a set to its batches, at least one set.
      log: gets one line, in which `eval/loss` is the first set's.
    """
    losses = {
        name: evaluate(program, state.trained, frozen, batches)[0]
        for name, batches in held_out.items()
    }
    found = Evaluation(
        int(state.step), next(iter(losses.values())), {k: x for k, x in losses.items() if k}
    )
    named = {"eval": found.loss} | {f"eval/{name}": loss for name, loss in found.sets.items()}
    values: dict[str, float] = {}
    for name, loss in named.items():
        values |= {f"{name}/loss": loss, f"{name}/perplexity": float(np.exp(loss))}
    log.write(found.step, values)
    return found


def loop(
    config: Config,
    program: StepProgram,
    state: TrainState,
    frozen: Any,
    loader: Loader,
    held_out: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
    checkpoints: Checkpoints,
    log: Log,
    counters: Progress,
    learning_rate: Callable[[int], Any],
    *,
    moves: bool = False,
    ahead: bool = False,
) -> TrainState:
    """Trains from `state` to the last step, or until the held-out loss falls no more.

    Evaluates on the way and after the last step, before that is saved: so the counters of each
    checkpoint hold every evaluation up to it.

    Args:
      moves: whether moments come to the device and go back; that is reported then.
      ahead: read a step's figures after the next one was asked for, so that the device need not
        wait; not under a loss scale, which the next step depends on.

    Returns:
      The last state.

    Raises:
      Stopped: a signal arrived; the state is saved.
      RunFailed: the loss or gradient is not finite; the checkpoints before stay.
    """
    train, step = config.train, int(state.step)
    steps = train.step_count
    key = jax.random.key(train.seed + 1) if drops_out(config) else None
    around = _Around(
        config,
        program,
        frozen,
        loader,
        checkpoints,
        counters,
        learning_rate,
        moves,
        key,
        list(flatten(state.trained)),
        nbytes(state.optimizer),
    )
    with Requests() as requests, TrainDisplay(steps, start=step) as display:
        late = ahead and not scales_loss(config)
        sent: _Sent | None = None
        start = time.perf_counter()

        def receive() -> None:
            """Waits for the step that was sent last, checks and logs it."""
            nonlocal sent, start
            if sent is None:
                return
            values = _received(around, sent, start)
            start = time.perf_counter()
            log.write(sent.step, values)
            loss, rate = values["train/loss"], values["train/tokens_per_s"]
            display.update(sent.step, loss=loss, tokens_per_s=rate)
            sent = None

        while not _is_over(config, counters, step):
            step += 1
            state, following = _send(around, state, step)
            receive()
            sent = following
            looks = held_out and (step == steps or _due(train.eval_every, step))
            if not late or looks or _saves(config, counters, step):
                receive()
            if looks:
                found = look(program, state, frozen, held_out, log)
                counters.choice = counters.choice.seen(found)
                display.note(f"step {step}: held-out loss {describe_losses(found)}")
                start = time.perf_counter()
            stopped = processes.stop_at(requests.signal, step)
            if _is_over(config, counters, step) or _saves(config, counters, step) or stopped:
                receive()
                _save(around, state)
                start = time.perf_counter()
            if stopped:
                raise Stopped(stopped, step)
        if step < steps:
            display.note(f"step {step}: stopped early, {describe_patience(train.patience)}")
    return state


def _is_over(config: Config, counters: Progress, step: int) -> bool:
    return step >= config.train.step_count or counters.choice.stops(config.train.patience)


def _saves(config: Config, counters: Progress, step: int) -> bool:
    return _due(config.train.save_every, step) or best_step(config, counters) == step


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


class _Around(NamedTuple):
    """What all steps of a loop share: `loop`'s arguments and what follows from them.

    Attributes:
      key: of dropout, or None.
      leaves: paths of the trained tree's leaves.
      moment_bytes: of the optimizer's state.
    """

    config: Config
    program: StepProgram
    frozen: Any
    loader: Loader
    checkpoints: Checkpoints
    counters: Progress
    learning_rate: Callable[[int], Any]
    moves: bool
    key: jax.Array | None
    leaves: Sequence[str]
    moment_bytes: int


class _Sent(NamedTuple):
    """A step that the device was asked for.

    Attributes:
      step: its number, the first being 1.
      figures: not waited for.
      scale: the loss scale that it began with.
      tokens: in its batch, without padding.
      epoch: that its batch is from.
      update_seconds: what the update took, if the step was waited for; else None.
    """

    step: int
    figures: Figures
    scale: float
    tokens: int
    epoch: float
    update_seconds: float | None


def _send(around: _Around, state: TrainState, step: int) -> tuple[TrainState, _Sent]:
    """Asks the device for a step; returns its state, which may not be there yet, and the rest.

    The gradients are let go here: else they would stand beside the next step's.
    """
    program = around.program
    batch = next(around.loader)
    key = None if around.key is None else jax.random.fold_in(around.key, step - 1)
    scale = float(state.scale) if scales_loss(around.config) else 1.0
    update_seconds = None
    if program.direct is not None:
        state, figures = program.direct(state, around.frozen, batch, key)
    else:
        grads, figures = program.gradient(state, around.frozen, batch, key)
        if around.moves:
            jax.block_until_ready(figures)  # else the update's time would hold the gradient's
        updating = time.perf_counter()
        # asked for while a GPU is busy with the gradient: it is a program for each layer
        state = program.update(state, grads, figures.finite)
        if around.moves:
            jax.block_until_ready(state)
            update_seconds = time.perf_counter() - updating
    tokens = int((batch["segments"] > 0).sum())
    return state, _Sent(step, figures, scale, tokens, around.loader.epoch, update_seconds)


def _received(around: _Around, sent: _Sent, start: float) -> dict[str, float]:
    """Waits for a step and returns what is logged of it.

    Args:
      around: what all steps share; its counters go on.
      sent: the step.
      start: when the step before was received, by `time.perf_counter`.

    Raises:
      RunFailed: the loss or gradient is not finite.
    """
    config, counters = around.config, around.counters
    figures = jax.device_get(sent.figures)
    seconds = time.perf_counter() - start
    counters.tokens += sent.tokens
    counters.seconds += seconds
    # the optimizer counts the steps that it took
    rate = around.learning_rate(sent.step - 1 - counters.skipped)
    _check(around, figures, sent)
    values = {
        "train/loss": figures.loss,
        "train/seconds": seconds,
        "train/tokens_per_s": sent.tokens / seconds,
        "train/grad_norm": figures.norm,
        "train/learning_rate": rate,
        "train/epoch": sent.epoch,
        "train/target_tokens": figures.tokens,
    }
    if scales_loss(config):
        values |= {"train/loss_scale": sent.scale, "train/skipped_steps": counters.skipped}
    if around.moves:
        values["train/moments_moved_mb"] = 2 * around.moment_bytes / 1e6
    if sent.update_seconds is not None:
        values["train/update_ms"] = 1e3 * sent.update_seconds
    return {name: float(value) for name, value in values.items()}


def _save(around: _Around, state: TrainState) -> None:
    extra = {
        "loader": around.loader.state(),
        "seed": around.config.train.seed,
        "progress": dataclasses.asdict(around.counters),
    }
    around.checkpoints.save(state, extra, best_step(around.config, around.counters))


def best_step(config: Config, counters: Progress) -> int | None:
    """Returns the step whose checkpoint stays, however old; None where only the newest do."""
    best = counters.choice.best
    return best.step if config.train.keep_best and best is not None else None


def _check(around: _Around, figures: Figures, sent: _Sent) -> None:
    counters, checkpoints = around.counters, around.checkpoints
    if figures.finite:
        counters.skipped_in_a_row = 0
        return
    counters.skipped += 1
    counters.skipped_in_a_row += 1
    overflow = scales_loss(around.config) and sent.scale > 1
    if overflow and counters.skipped_in_a_row < MOST_SKIPPED:
        return
    where = ""
    if figures.finite_leaves is not None:
        bad = (path for path, good in zip(around.leaves, figures.finite_leaves) if not good)
        where = f" (first in {next(bad, 'the loss')})"
    what = f"{MOST_SKIPPED} overflowing steps in a row" if overflow else "not a finite number"
    raise RunFailed(
        f"step {sent.step}: loss {figures.loss}, gradient norm {figures.norm}: {what}{where}; "
        f"{checkpoints.latest_text()}. Lower optimizer.learning_rate, or compute in bfloat16 or "
        "float32"
    )

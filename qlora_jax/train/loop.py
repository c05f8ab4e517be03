"""The loop over steps: it logs, evaluates, saves and stops."""

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
from qlora_jax.train.state import TrainState
from qlora_jax.train.step import Figures, StepProgram

MOST_SKIPPED = 20
"""Number of overflowing steps in a row that ends a run with an error."""


@dataclasses.dataclass
class Progress:
    """Plain counters of a run, saved in each checkpoint and continued when the run resumes.

    Attributes:
      tokens: number of tokens trained on so far, padding excluded.
      skipped: number of steps without an update because a gradient overflowed.
      skipped_in_a_row: number of skipped steps since the last update.
      seconds: time spent in steps.
      before: held-out losses before training.
      choice: best and last evaluation since the first step.
      answers_before: answers to the sample prompts before training.
    """

    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    before: Evaluation | None = None
    choice: BestStep = dataclasses.field(default_factory=BestStep)
    answers_before: list[str] = dataclasses.field(default_factory=list)


def read_progress(values: Mapping[str, Any]) -> Progress:
    """Returns the counters from the entry `progress` of a checkpoint's `extra`."""
    rest = dict(values)
    # earlier versions saved one number
    old = rest.pop("eval_before", None)
    before = read_evaluation(rest.pop("before", None))
    if old is not None:
        before = Evaluation(0, old)
    chosen = read_choice(rest.pop("choice")) if "choice" in rest else BestStep()
    return Progress(**rest, before=before, choice=chosen)


def evaluate(
    program: StepProgram, trained: Any, frozen: Any, batches: Sequence[Mapping[str, np.ndarray]]
) -> tuple[float, int]:
    """Returns the mean loss in nats per target token over batches, and the number of targets."""
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
    """Evaluates the state on every held-out set, and logs the losses.

    Args:
      program: functions of a step.
      state: training state to evaluate.
      frozen: frozen tree.
      held_out: map from the name of a set to its batches, with at least one set.
      log: log that gets one line; `eval/loss` in it is the loss of the first set.
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
    """Trains from `state` to the last step, or until the held-out loss stops falling.

    Evaluates every `train.eval_every` steps and after the last step of the config, if there is
    held-out data. A step is saved after its evaluation, so the counters in each checkpoint hold
    every evaluation up to its step.

    Args:
      moves: whether the moments live on the host and visit the device; if so, the transfer is
        logged.
      ahead: whether to read a step's figures only after the next step was dispatched, so that the
        device does not wait for the host. With a dynamic loss scale, figures are read at once,
        because the next step depends on the scale.

    Returns:
      The last state.

    Raises:
      Stopped: a signal arrived; the state is saved.
      RunFailed: the loss or the gradient is not finite; earlier checkpoints remain.
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
            """Waits for the step that was dispatched last, then checks and logs it."""
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
    """The constants of a loop: the arguments of `loop` and values computed from them.

    Attributes:
      key: random key of dropout; None without dropout.
      leaves: paths of the leaves of the trained tree.
      moment_bytes: size of the optimizer state in bytes.
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
    """A step that was dispatched to the device and may not be finished.

    Attributes:
      step: number of the step, from 1.
      figures: figures of the step; the device may still compute them.
      scale: loss scale before the step.
      tokens: number of tokens in the batch, padding excluded.
      epoch: epoch of the batch.
      update_seconds: time of the update in seconds; None if the loop did not wait for the update.
    """

    step: int
    figures: Figures
    scale: float
    tokens: int
    epoch: float
    update_seconds: float | None


def _send(around: _Around, state: TrainState, step: int) -> tuple[TrainState, _Sent]:
    """Dispatches a step; returns its state, which may not be computed yet, and its figures.

    The gradients go out of scope here, because otherwise they would take memory beside those of
    the next step.
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
            jax.block_until_ready(figures)  # so that `update_seconds` excludes the gradient
        updating = time.perf_counter()
        # one program for each layer; a GPU still computes the gradient while they are dispatched
        state = program.update(state, grads, figures.finite)
        if around.moves:
            jax.block_until_ready(state)
            update_seconds = time.perf_counter() - updating
    tokens = int((batch["segments"] > 0).sum())
    return state, _Sent(step, figures, scale, tokens, around.loader.epoch, update_seconds)


def _received(around: _Around, sent: _Sent, start: float) -> dict[str, float]:
    """Waits for a step, and returns the values to log.

    Args:
      around: constants of the loop; this function advances its counters.
      sent: dispatched step.
      start: time of `time.perf_counter` at which the previous step was received.

    Raises:
      RunFailed: the loss or the gradient is not finite.
    """
    config, counters = around.config, around.counters
    figures = jax.device_get(sent.figures)
    seconds = time.perf_counter() - start
    counters.tokens += sent.tokens
    counters.seconds += seconds
    # the optimizer does not count skipped steps
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
    """Returns the step whose checkpoint is never deleted, the best one so far, or None.

    None without `train.keep_best`, and before the first evaluation.
    """
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

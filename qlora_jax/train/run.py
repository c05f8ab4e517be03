"""Runs a training from its config to its report."""

import contextlib
import time
from collections.abc import Callable

from qlora_jax.config import Config
from qlora_jax.models.config import DecoderConfig
from qlora_jax.train.finish import describe_finished, finish, finished
from qlora_jax.train.fit import begin, fit
from qlora_jax.train.initial_values import resolved
from qlora_jax.train.offload import Memory, memory_of
from qlora_jax.train.prepare import PrepareRequest, build, open_inputs
from qlora_jax.train.report import RunSummary


def train(
    config: Config,
    *,
    say: Callable[[str], None],
    command: str,
    resume: bool = False,
    overwrite: bool = False,
    place: Callable[[DecoderConfig], Memory] | None = None,
) -> RunSummary:
    """Trains a model, and writes a run directory with the adapter, checkpoints and a report.

    Args:
      config: config of the run.
      say: function called with lines for the user.
      command: command that reproduces the run, for the report and the manifest.
      resume: whether to continue the run in the run directory. If that run is finished, `train`
        says so and returns the summary in the directory, without samples.
      overwrite: whether to delete the run in the run directory.
      place: function from the model's shapes to the memory choices, called before weights are read;
        may raise to refuse the run. None takes the choices of the config.

    Raises:
      UserError: an input is invalid; no half-written file remains.
      RunFailed: the loss is not finite, or the frozen base changed.
      Stopped: a signal arrived; the state is saved.
    """
    started = time.perf_counter()
    config = resolved(config)
    if resume and (summary := finished(config)) is not None:
        say(describe_finished(config, summary))
        return summary
    asked = PrepareRequest(config, say, command, resume, overwrite, started)
    with contextlib.ExitStack() as held:
        opened = open_inputs(asked, place or (lambda decoder: memory_of(config)))
        # no variable for the result of `build`: it would keep the first state of a resumed run
        begun = begin(asked, build(asked, opened), held)
        return finish(asked, opened, begun, fit(asked, opened, begun))

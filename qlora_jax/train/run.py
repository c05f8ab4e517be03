"""A fine-tuning run from its config to its report."""

import contextlib
import time
from collections.abc import Callable

from qlora_jax.config import Config
from qlora_jax.models.config import DecoderConfig
from qlora_jax.train.finish import describe_finished, finish, finished
from qlora_jax.train.fit import begin, fit
from qlora_jax.train.offload import Memory, memory_of
from qlora_jax.train.prepare import PrepareRequest, build, open_inputs
from qlora_jax.train.report import RunSummary
from qlora_jax.train.start import resolved


def train(
    config: Config,
    *,
    say: Callable[[str], None],
    command: str,
    resume: bool = False,
    overwrite: bool = False,
    place: Callable[[DecoderConfig], Memory] | None = None,
) -> RunSummary:
    """Fine-tunes, and leaves a run directory with the adapter, checkpoints and a report.

    Args:
      config: of the run.
      say: called with lines for the user.
      command: what reproduces the run, for the report and the manifest.
      resume: go on where the directory's run stopped; with nothing left to do, say so and return
        the summary that the directory holds, without samples.
      overwrite: delete the run that the directory holds.
      place: what is kept where, given the model's shapes; asked before weights are read, it may
        refuse the run. None: what the config asks for.

    Raises:
      UserError: the input is at fault; nothing is left half-written.
      RunFailed: the loss is not finite, or the frozen base changed.
      Stopped: by a signal, with the state saved.
    """
    started = time.perf_counter()
    config = resolved(config)
    if resume and (summary := finished(config)) is not None:
        say(describe_finished(config, summary))
        return summary
    asked = PrepareRequest(config, say, command, resume, overwrite, started)
    with contextlib.ExitStack() as held:
        opened = open_inputs(asked, place or (lambda decoder: memory_of(config)))
        # what was built gets no name: a resumed run's first state would live as long as it
        begun = begin(asked, build(asked, opened), held)
        return finish(asked, opened, begun, fit(asked, opened, begun))

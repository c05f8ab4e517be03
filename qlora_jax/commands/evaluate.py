"""`qlora-jax evaluate`."""

import argparse
import dataclasses
import json
from collections.abc import Sequence

from qlora_jax import paths
from qlora_jax.commands.common import CHANGED, config_of, say, warn_if_gpu_idle
from qlora_jax.errors import UserError
from qlora_jax.train import rundir

TEXT = "Held-out loss and perplexity of a run, or of a config's base model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `evaluate`."""
    parser.epilog = CHANGED
    parser.set_defaults(settings=True)
    parser.add_argument("path", metavar="RUN_DIR|CONFIG")
    parser.add_argument("--base", action="store_true", help="the model before training")


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Evaluates and prints."""
    is_run = paths.is_dir(options.path)
    if is_run and settings:
        raise UserError(f"{settings[0]}: a run directory's settings are fixed; give a config")
    config = rundir.open_run(options.path) if is_run else config_of(options.path, settings)
    warn_if_gpu_idle()
    from qlora_jax.evaluate.heldout import held_out_loss
    from qlora_jax.train.restore import from_config, restore

    if is_run:
        restored = restore(options.path, base=options.base, warn=say)
    else:
        restored = from_config(config, say)
    result = held_out_loss(restored)
    if options.json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    print(
        f"step {result.step}, {result.split}: loss {result.loss:.4f}, "
        f"perplexity {result.perplexity:.3f} over {result.tokens:,} tokens"
    )

"""The command `qlora-jax export`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.commands import time_notice
from qlora_jax.commands.common import say, show, start_jax
from qlora_jax.commands.plan import shapes
from qlora_jax.runtime.errors import UserError
from qlora_jax.train import rundir

TEXT = "Write a run's adapter for other tools."
FORMATS = ("peft",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `export` to its parser."""
    parser.add_argument("path", metavar="RUN_DIR")
    parser.add_argument(
        "out", metavar="OUT_DIR", help="a new folder, or the folder of an adapter to replace"
    )
    parser.add_argument("--format", choices=FORMATS, default="peft", help="default: peft")


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Restores the run's model from its last checkpoint and writes its adapter."""
    config = rundir.open_run(options.path)
    if config.method == "full":
        raise UserError(
            f"{options.path}: method full trains every weight, so it has no adapter; write the "
            f"whole model with: qlora-jax merge {options.path} OUT"
        )
    start_jax()
    from qlora_jax.train.export import export_adapter
    from qlora_jax.train.restore import restore

    time_notice.tell_expected_time("export", parameters=time_notice.parameters(shapes(config)))
    restored = restore(options.path, base=False, warn=say)
    folder = Path(options.out)
    export_adapter(restored.config, restored.model, folder)
    result = {"format": options.format, "step": restored.step, "folder": str(folder)}
    show(json.dumps(result) if options.json else f"adapter of step {restored.step}: {folder}")

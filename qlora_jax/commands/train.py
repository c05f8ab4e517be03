"""The command `qlora-jax train`."""

import argparse
import dataclasses
import json
from collections.abc import Sequence

from qlora_jax import config as configs
from qlora_jax.commands.common import config_of, count, say, show, start_jax
from qlora_jax.config import Config
from qlora_jax.runtime import compilation, processes
from qlora_jax.runtime.errors import UserError

TEXT = "Fine-tune a model; writes a run directory."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `train` to its parser."""
    parser.usage = (
        "qlora-jax train CONFIG [--resume | --overwrite | --preview N] "
        "[--force] [--distributed] [--json] [--debug] [--section.key=value ...]"
    )
    parser.epilog = _settings()
    parser.set_defaults(settings=True)
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or a run directory")
    parser.add_argument("--resume", action="store_true", help="continue a stopped run")
    parser.add_argument("--overwrite", action="store_true", help="delete the existing run")
    parser.add_argument(
        "--preview",
        type=count,
        metavar="N",
        help="only print N examples, with the loss tokens marked",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes; not needed with srun, mpirun and torchrun",
    )
    parser.add_argument(
        "--force", action="store_true", help="run even if the device's memory is too small"
    )


def _settings() -> str:
    lines = ["settings, each also as --section.key=value:"]
    for setting in configs.all_settings():
        lines.append(f"  {setting.key}: {setting.type} = {setting.default}")
        lines.append(f"      {setting.doc}")
    return "\n".join(lines)


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Trains the model and prints the result; with `--preview`, only prints examples."""
    config = config_of(options.config, settings)
    if options.resume and options.overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one")
    if config.mesh.devices > 1:
        compilation.overlap()
    start_jax(options.distributed or processes.has_several_processes())
    with processes.only_first_prints(), processes.failing_together():
        _run(options, config, command)


def _run(options: argparse.Namespace, config: Config, command: str) -> None:
    from rich.console import Console

    from qlora_jax.plan.training import train_placed
    from qlora_jax.train.examples import describe_data, read_data
    from qlora_jax.train.finish import existing_outputs
    from qlora_jax.train.initial_values import resolved
    from qlora_jax.train.report import describe_export, describe_losses, print_samples
    from qlora_jax.train.setup import open_model

    config = resolved(config)
    if options.preview is not None:
        from qlora_jax.data.preview import preview

        checkpoint, text = open_model(config, say)
        data = read_data(config, text, checkpoint.config.longest_cached)
        Console().print(preview(data.train, text, options.preview))
        say(describe_data(data))
        return
    summary = train_placed(
        config,
        say=say,
        command=command,
        resume=options.resume,
        overwrite=options.overwrite,
        force=options.force,
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(summary)))
        return
    print_samples(Console(), summary.samples)
    for line in describe_losses(summary):
        print(line)
    if summary.exported_step is not None:
        show(f"exported: {describe_export(summary)}")
    names = [f"{name}/" if "." not in name else name for name in existing_outputs(config)]
    show(f"run directory: {summary.run_dir} ({', '.join(names)})")

"""The command line. Results go to stdout, everything else to stderr."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from qlora_jax import config as configs
from qlora_jax import paths
from qlora_jax.bench import command as bench_command
from qlora_jax.errors import RunFailed, UserError
from qlora_jax.memory import command as plan_command
from qlora_jax.streams import outlets
from qlora_jax.train import rundir
from qlora_jax.train.interrupt import Stopped

DONE, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; --help and --version raise SystemExit(0)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with outlets(), _exit_code("--debug" in arguments) as code:
        options, settings = _parse(arguments)
        options.run(options, settings, shlex.join(["qlora-jax", *arguments]))
    return code.value


@dataclasses.dataclass
class _Code:
    value: int = DONE


@contextlib.contextmanager
def _exit_code(debug: bool) -> Iterator[_Code]:
    code = _Code()
    try:
        yield code
    except UserError as e:
        code.value = USER_ERROR
        _fail(str(e), debug)
    except RunFailed as e:
        code.value = FAILED
        _fail(str(e), debug)
    except Stopped as e:
        code.value = e.code
        _fail(f"{e}; the state is saved, --resume goes on", debug)
    except KeyboardInterrupt:
        code.value = INTERRUPTED
        _fail("interrupted", debug)


def _fail(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"qlora-jax: {' '.join(message.split())}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Raises UserError instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    @property
    def options(self) -> set[str]:
        return set(self._option_string_actions)


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and the `--section.key=value` settings among the arguments."""
    parser, commands = _parser()
    command = next((commands[a] for a in arguments if a in commands), None)
    if command is None or not command.get_default("settings"):
        return parser.parse_args(arguments), []
    own, settings = _separate(arguments, command.options)
    return parser.parse_args(own), settings


def _separate(arguments: Sequence[str], options: set[str]) -> tuple[list[str], list[str]]:
    # argparse would take the value in `--train.steps 50 my.yaml` for the config.
    own: list[str] = []
    settings: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, _ = argument.partition("=")
        if not name.startswith("--") or name in options:
            own.append(argument)
            continue
        _check_known(name.removeprefix("--"), options)
        settings.append(argument)
        if not equals and rest:
            settings.append(rest.pop(0))
    return own, settings


def _check_known(key: str, options: set[str]) -> None:
    more = [o.removeprefix("--") for o in options]
    if not configs.is_known(key):
        raise UserError(
            f"--{key}: neither an option nor a setting; the nearest is "
            f"--{configs.nearest(key, more)}"
        )


def _parser() -> tuple[_Parser, Mapping[str, _Parser]]:
    parser = _Parser(
        prog="qlora-jax", description="LoRA and QLoRA fine-tuning in JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--json", action="store_true", help="print the results as JSON")

    def command(name: str, run: object, text: str, **more: Any) -> _Parser:
        made = commands.add_parser(
            name,
            help=text,
            description=text,
            parents=[common],
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **more,
        )
        made.set_defaults(run=run)
        return made

    train = command(
        "train",
        _train,
        "Fine-tune a model; writes a run directory.",
        usage="qlora-jax train CONFIG [--resume | --overwrite | --preview N] "
        "[--force] [--json] [--debug] [--section.key=value ...]",
        epilog=_settings(),
    )
    train.set_defaults(settings=True)
    train.add_argument("config", metavar="CONFIG", help="YAML file, or a run directory")
    train.add_argument("--resume", action="store_true", help="go on where the run stopped")
    train.add_argument("--overwrite", action="store_true", help="delete the run that is there")
    train.add_argument(
        "--preview", type=_count, metavar="N", help="print N examples, loss marked, and stop"
    )

    train.add_argument(
        "--force", action="store_true", help="run even where the device's memory is too small"
    )

    plan = command(
        "plan",
        _plan,
        "What a run needs on a GPU, by that GPU's compiler, before it is rented.",
        usage="qlora-jax plan (CONFIG | --model NAME) [--gpu NAMES] [--rank N] [--seq N] "
        "[--no-search] [--plot FILE] [--json] [--debug] [--section.key=value ...]",
        epilog="A config's settings can be changed by --section.key=value, as for train.",
    )
    plan.set_defaults(settings=True)
    plan_command.add_arguments(plan)

    evaluate = command(
        "evaluate",
        _evaluate,
        "Held-out loss and perplexity of a run, or of a config's base model.",
        epilog="A config's settings can be changed by --section.key=value, as for train.",
    )
    evaluate.set_defaults(settings=True)
    evaluate.add_argument("path", metavar="RUN_DIR|CONFIG")
    evaluate.add_argument("--base", action="store_true", help="the model before training")

    generate = command("generate", _generate, "Answer prompts with a run's model.")
    generate.add_argument("path", metavar="RUN_DIR")
    generate.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    generate.add_argument("--base", action="store_true", help="without the adapter")
    generate.add_argument("--max-new-tokens", type=_count, default=128, metavar="N")
    generate.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="0, the default: greedy"
    )
    generate.add_argument(
        "--top-p", type=_share, default=1.0, metavar="P", help="sample from this share; default 1"
    )
    generate.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the sampling")

    bench = command("bench", _bench, "Measure this machine, beside installed peers if given.")
    bench_command.add_arguments(bench)
    return parser, commands.choices


def _number(
    kind: Callable[[str], float], allowed: Callable[[float], bool], rule: str
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if allowed(number := kind(text)):
                return number
        raise argparse.ArgumentTypeError(f"must be {rule}, not {text!r}")

    return parse


_count = _number(int, lambda n: n >= 1, "a whole number of 1 or more")
_temperature = _number(float, lambda n: 0 <= n < math.inf, "a number of 0 or more")
_share = _number(float, lambda n: 0 < n <= 1, "a number above 0 and at most 1")
_seed = _number(int, lambda n: n >= 0, "a whole number of 0 or more")


def _version() -> str:
    try:
        return importlib.metadata.version("qlora-jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _settings() -> str:
    lines = ["settings, each also as --section.key=value:"]
    for setting in configs.settings():
        lines.append(f"  {setting.key}: {setting.type} = {setting.default}")
        lines.append(f"      {setting.doc}")
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _warn_if_gpu_idle() -> None:
    from qlora_jax.device import warn_if_gpu_idle

    if warning := warn_if_gpu_idle():
        _say(warning)


def _config(path: str, settings: Sequence[str]) -> configs.Config:
    overrides = configs.parse_overrides(settings)
    file = Path(path) / rundir.CONFIG
    if not paths.is_file(file):
        return configs.load(path, overrides)
    # The directory may have been moved, or been named from elsewhere, since it was made.
    return configs.load(file, {"output": path} | overrides)


def _train(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    config = _config(options.config, settings)
    if options.resume and options.overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one")
    _warn_if_gpu_idle()
    import jax
    from rich.console import Console

    from qlora_jax.memory.fit import Fit, fit
    from qlora_jax.models.config import DecoderConfig
    from qlora_jax.train.placement import PLACEMENTS, Placement
    from qlora_jax.train.report import print_samples
    from qlora_jax.train.run import describe_data, train
    from qlora_jax.train.setup import open_model, read_data

    if options.preview is not None:
        from qlora_jax.data.preview import preview

        checkpoint, text = open_model(config)
        data = read_data(config, text, checkpoint.config.max_positions)
        Console().print(preview(data.train, text, options.preview))
        _say(describe_data(data))
        return
    planned: list[Fit] = []

    def place(decoder: DecoderConfig) -> Placement:
        planned.append(fit(config, decoder, jax.devices()[0], options.force))
        return PLACEMENTS[planned[0].offload]

    summary = train(
        config,
        say=_say,
        command=command,
        resume=options.resume,
        overwrite=options.overwrite,
        place=place,
    )
    if (bytes_ := planned[0].device) is not None and summary.peak_device_bytes is not None:
        _say(
            f"device memory: planned {bytes_ / 2**30:.2f} GiB, measured peak "
            f"{summary.peak_device_bytes / 2**30:.2f} GiB"
        )
    if options.json:
        print(json.dumps(dataclasses.asdict(summary)))
        return
    print_samples(Console(), summary.samples)
    if summary.eval_before is not None and summary.eval_after is not None:
        change = summary.eval_after / summary.eval_before - 1
        print(
            f"held-out loss: {summary.eval_before:.4f} before, {summary.eval_after:.4f} after "
            f"({change:+.1%})"
        )
    print(f"run directory: {summary.run_dir} (report.md, adapter/, checkpoints/)")


def _plan(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    if (options.config is None) == (options.model is None):
        raise UserError("give a CONFIG, or --model NAME for published shapes; one of them")
    given = configs.parse_overrides(settings) | plan_command.settings(options)
    if options.model is not None:
        config = plan_command.of_model(options.model, given)
    else:
        config = configs.changed(_config(options.config, []), given)
    plan_command.run(options, config, _say)


def _evaluate(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    is_run = paths.is_dir(options.path)
    if is_run and settings:
        raise UserError(f"{settings[0]}: a run directory's settings are fixed; give a config")
    config = rundir.open_run(options.path) if is_run else _config(options.path, settings)
    _warn_if_gpu_idle()
    from qlora_jax.evaluate.heldout import held_out_loss
    from qlora_jax.train.restore import from_config, restore

    if is_run:
        restored = restore(options.path, base=options.base, warn=_say)
    else:
        restored = from_config(config, _say)
    result = held_out_loss(restored)
    if options.json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    print(
        f"step {result.step}, {result.split}: loss {result.loss:.4f}, "
        f"perplexity {result.perplexity:.3f} over {result.tokens:,} tokens"
    )


def _generate(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    if not options.prompt:
        raise UserError('--prompt is missing; give --prompt "..."')
    rundir.open_run(options.path)
    _warn_if_gpu_idle()
    import jax.numpy as jnp

    from qlora_jax.data.prompts import ask
    from qlora_jax.models.generate import generate
    from qlora_jax.train.restore import restore

    restored = restore(options.path, base=options.base, warn=_say)
    text, data = restored.tokenizer, restored.config.data
    questions = [
        ask(p, text, system_prompt=data.system_prompt, template=data.template)
        for p in options.prompt
    ]
    rows = generate(
        restored.model,
        [q.ids for q in questions],
        max_new_tokens=options.max_new_tokens,
        stop_ids=text.stop_ids,
        pad_id=text.pad_id,
        dtype=jnp.dtype(restored.config.model.compute_dtype),
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    answers = [text.decode(row) for row in rows]
    if options.json:
        print(json.dumps([{"prompt": q.prompt, "answer": a} for q, a in zip(questions, answers)]))
        return
    print("\n\n".join(answers))


def _bench(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    bench_command.run(options, _say)


if __name__ == "__main__":
    sys.exit(main())

"""Runs the command line. Results go to stdout, all other lines to stderr."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import NoReturn

from qlora_jax import config as configs
from qlora_jax.commands import (
    bench,
    chat,
    combine,
    evaluate,
    export,
    generate,
    merge,
    plan,
    pretrain,
    quantize,
    report,
    serve,
    sweep,
    train,
)
from qlora_jax.runtime import interrupts, limits, processes
from qlora_jax.runtime.errors import RunFailed, Terminated, UserError
from qlora_jax.runtime.streams import outlets, printable
from qlora_jax.train.interrupt import Stopped

COMMANDS: Mapping[str, ModuleType] = {
    "train": train,
    "pretrain": pretrain,
    "plan": plan,
    "evaluate": evaluate,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "merge": merge,
    "export": export,
    "combine": combine,
    "quantize": quantize,
    "sweep": sweep,
    "report": report,
    "bench": bench,
}

DONE, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
      arguments: the command line without the program's name; None takes `sys.argv[1:]`.

    Raises:
      SystemExit: the arguments hold --help or --version; the code is 0.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with outlets(), _exit_code("--debug" in arguments) as code:
        try:
            options, settings = _parse(arguments)
            limits.check()
            options.run(options, settings, shlex.join(["qlora-jax", *arguments]))
        finally:
            sys.stdout.flush()  # here, so that `_exit_code` reports an error of the flush
    processes.leave(code.value)
    return code.value


@dataclasses.dataclass
class _Code:
    value: int = DONE


@contextlib.contextmanager
def _exit_code(debug: bool) -> Iterator[_Code]:
    code = _Code()
    try:
        with interrupts.raising() as interrupt:
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
    except Terminated as e:
        code.value = e.code
        _fail(str(e), debug)
    except KeyboardInterrupt:
        code.value = INTERRUPTED
        _fail("interrupted", debug)
    except Exception as e:
        if interrupt.is_set():  # a library turned KeyboardInterrupt into another error
            code.value = INTERRUPTED
            _fail("interrupted", debug)
        elif line := limits.limit_remedy(e):
            code.value = USER_ERROR
            _fail(line, debug)
        elif processes.count() > 1:  # the other processes would wait for this one
            code.value = FAILED
            traceback.print_exc()
            processes.tell_others(repr(e))
        else:
            raise


def _fail(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    line = printable(" ".join(f"{processes.name()}{message}".split()))
    print(f"qlora-jax: {line}", file=sys.stderr, flush=True)
    processes.tell_others(message)


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    @property
    def options(self) -> set[str]:
        return set(self._option_string_actions)


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the command's parsed options, and the `--section.key=value` settings."""
    parser, commands = _parser()
    command = next((commands[a] for a in arguments if a in commands), None)
    if command is None or not command.get_default("settings"):
        return parser.parse_args(arguments), []
    own, settings = _separate(arguments, command.options)
    return parser.parse_args(own), settings


def _separate(arguments: Sequence[str], options: set[str]) -> tuple[list[str], list[str]]:
    # In `--train.steps 50 my.yaml` argparse would take the value 50 as the config.
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
    choices = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--json", action="store_true", help="print the results as JSON")
    for name, command in COMMANDS.items():
        own = choices.add_parser(
            name,
            help=command.TEXT,
            description=command.TEXT,
            parents=[common],
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own.set_defaults(run=command.run)
        command.add_arguments(own)
    return parser, choices.choices


def _version() -> str:
    try:
        return importlib.metadata.version("qlora-jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"

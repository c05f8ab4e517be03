"""Functions that several commands share: parse values, add options, read configs, print lines."""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar, get_args

from qlora_jax import config as configs
from qlora_jax.runtime import processes
from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.streams import printable, to_read
from qlora_jax.train import rundir

N = TypeVar("N", int, float)

CHANGED = "--section.key=value changes a setting of the config, as in train."


def say(line: str) -> None:
    """Prints a line for the user to stderr; results go to stdout."""
    print(printable(line), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Prints a result to stdout."""
    print(to_read(text))


def start_jax(distributed: bool = False) -> None:
    """Starts jax, and warns if the machine has a GPU that jax does not use.

    Args:
      distributed: whether this process is one of several processes of a run.

    Raises:
      UserError: jax cannot start, or this process cannot connect to the others.
    """
    if distributed:
        processes.join()
    from qlora_jax.runtime.device import warn_if_gpu_idle

    if warning := warn_if_gpu_idle():
        say(warning)


def named_folder(text: str) -> tuple[str, str]:
    """Parses a value NAME=DIR of the command line."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"must be NAME=DIR, not {text!r}")
    return name, folder


def by_name(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Returns the values of `--adapter NAME=DIR` as a dict from name to folder.

    Raises:
      UserError: a name is given twice.
    """
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--adapter {twice}=...: the name is given twice; use one name per adapter")
    return dict(pairs)


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for adapters, and for bits and dtype of a model that is not a run."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=named_folder,
        metavar="NAME=DIR",
        help="a folder in PEFT's format or a run directory; may be repeated",
    )
    parser.add_argument(
        "--bits",
        type=int,
        choices=(4, 16),
        help="bits of the linears' weights; default 4 (NF4). Not for a run directory",
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(configs.FloatType),
        help="compute dtype; default bfloat16. Not for a run directory",
    )


def add_sampling_options(parser: argparse.ArgumentParser, *, most: int) -> None:
    """Adds the options for the system turn, the length of an answer, and the sampling.

    Args:
      parser: parser to which the options are added.
      most: default of `--max-new-tokens`.
    """
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help='system turn; default: the run\'s data.system_prompt; "" for none',
    )
    parser.add_argument(
        "--max-new-tokens",
        type=count,
        default=most,
        metavar="N",
        help=f"largest number of tokens of an answer; default {most}",
    )
    parser.add_argument(
        "--temperature", type=temperature, default=0.0, metavar="T", help="default 0: greedy"
    )
    parser.add_argument(
        "--top-p", type=share, default=1.0, metavar="P", help="top-p probability; default 1"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of the sampling")


def config_of(path: str, settings: Sequence[str]) -> configs.Config:
    """Returns the config of a YAML file or a run directory, changed by settings.

    Args:
      path: YAML file or run directory.
      settings: settings, each as `--section.key=value`.

    Raises:
      UserError: the config cannot be read, or a setting is not allowed.
    """
    return rundir.config_at(path, configs.parse_overrides(settings))


def _number(
    kind: Callable[[str], N], allowed: Callable[[N], bool], rule: str
) -> Callable[[str], N]:
    def parse(text: str) -> N:
        with contextlib.suppress(ValueError):
            if allowed(number := kind(text)):
                return number
        raise argparse.ArgumentTypeError(f"must be {rule}, not {text!r}")

    return parse


count = _number(int, lambda n: n >= 1, "a whole number of 1 or more")
temperature = _number(float, lambda n: 0 <= n < math.inf, "a number of 0 or more")
share = _number(float, lambda n: 0 < n <= 1, "a number above 0 and at most 1")
positive = _number(float, lambda n: 0 < n < math.inf, "a number above 0")
port = _number(int, lambda n: 0 <= n < 1 << 16, "a whole number from 0 to 65535")
whole = seed = _number(int, lambda n: n >= 0, "a whole number of 0 or more")

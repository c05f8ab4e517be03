"""Argument parser and exit codes of the programs in this folder."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from qlora_jax.runtime.errors import UserError


def parser(text: str | None) -> argparse.ArgumentParser:
    """Returns a parser whose help shows `text`, the docstring of a module, line by line."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawTextHelpFormatter)


def run(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the exit code of `main`; prints a `UserError` and exits with 2."""
    try:
        sys.exit(main())
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)

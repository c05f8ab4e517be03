"""Runs commands where something is missing: files, memory, a home, a terminal, a locale.

Right: the command succeeds, or ends with one line that says what is missing.
"""

import contextlib
import functools
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.faults import formats
from experiments.faults.common import LINES, MIB, Campaign, Ended, Row, command

Prepare = Callable[[], object]


def limited(name: int, most: int) -> Prepare:
    """Returns a function that limits a resource of its process."""
    return functools.partial(resource.setrlimit, name, (most, most))


def closed(*descriptors: int) -> Prepare:
    """Returns a function that closes standard streams."""

    def close() -> None:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    return close


def full(descriptor: int) -> Prepare:
    """Returns a function that redirects a standard stream to a device that is always full."""
    return lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)


LIMITS: Mapping[str, Prepare] = {
    "16 open files": limited(resource.RLIMIT_NOFILE, 16),
    "40 open files": limited(resource.RLIMIT_NOFILE, 40),
    "1 GB of address space": limited(resource.RLIMIT_AS, 1024 * MIB),
    "3 GB of address space": limited(resource.RLIMIT_AS, 3072 * MIB),
    "files of 10 kB at most": limited(resource.RLIMIT_FSIZE, 10_000),
    "stdout closed": closed(1),
    "stderr closed": closed(2),
    "all streams closed": closed(0, 1, 2),
    "stdout full": full(1),
    "stderr full": full(2),
}
VARIABLES: Mapping[str, Mapping[str, str | None]] = {
    "no HOME": {"HOME": None},
    "HOME that is not there": {"HOME": "/nonexistent"},
    "HOME that is a file": {"HOME": "/dev/null"},
    "caches that are files": {"XDG_CACHE_HOME": "/dev/null", "HF_HOME": "/dev/null"},
    "no temporary folder": {"TMPDIR": "/nonexistent"},
    "the C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "streams in ASCII": {"PYTHONIOENCODING": "ascii"},
    "a terminal of one column": {"COLUMNS": "1", "LINES": "1", "TERM": "dumb"},
    "no PATH": {"PATH": ""},
    "warnings as errors": {"PYTHONWARNINGS": "error"},
    "jax on a platform that is not there": {"JAX_PLATFORMS": "cuda"},
    "jax on a platform of no such name": {"JAX_PLATFORMS": "nonsense"},
}
NAMES = ("a\nb", "a\x1b[2Jb", "-a", "a b'\"c", "\u4f60\u597d", "a\udcff", "x" * 255, "%s{}")
"""Unusual names of folders."""
COMMANDS = (
    ("train", "{}/a.yaml", "--overwrite", "--train.steps=2", "--output={}/environment"),
    ("generate", "{}/run", "--prompt=\u4f60 zip", "--max-new-tokens=4"),
)


def run(campaign: Campaign) -> Iterator[Row]:
    """Yields a row for each kind of environment, and one for names of folders."""
    seeds = formats.make(campaign)
    usual = {each[0]: len(_run(each, seeds).err.splitlines()) for each in COMMANDS}
    for what, prepare in LIMITS.items():
        # without stderr there is no line to check
        codes = (0, 2) if "stderr" not in what and "all" not in what else (0,)
        yield _row(what, seeds, usual, codes, prepare=prepare)
    for what, environment in VARIABLES.items():
        yield _row(what, seeds, usual, (0, 2), environment=environment)
    faults = []
    for name in NAMES:
        folder = seeds / name
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
        ended = command("train", seeds / "a.yaml", "--train.steps=2", f"--output={folder}/run")
        if "\x1b" in ended.err:  # stdout is no terminal here, so it may print names unchanged
            faults.append(f"{name!r}: an escape code is printed")
        if fault := ended.fault(0, 2):
            faults.append(f"{name!r}: {fault}")
    yield Row(part="environments", what="names of folders", tried=len(NAMES), faults=tuple(faults))


def _run(arguments: Sequence[str], seeds: Path, **changed: Any) -> Ended:
    return command(*(each.replace("{}", str(seeds)) for each in arguments), **changed)


def _row(
    what: str,
    seeds: Path,
    usual: Mapping[str, int],
    codes: tuple[int, ...],
    **changed: Any,
) -> Row:
    """Runs the commands in a changed environment; `usual` is their usual number of lines."""
    faults = []
    ends = []
    for arguments in COMMANDS:
        ended = _run(arguments, seeds, **changed)
        ends.append(f"{arguments[0]} {ended.code}")
        if fault := ended.fault(*codes, lines=usual[arguments[0]] + LINES):
            faults.append(f"{arguments[0]}: {fault}")
    return Row(
        part="environments",
        what=what,
        tried=len(COMMANDS),
        faults=tuple(faults),
        note="exit codes: " + ", ".join(ends),
    )

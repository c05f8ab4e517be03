"""Who is measured: us, and the peers that other interpreters have installed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.bench.options import Options, to_tree
from qlora_jax.bench.worker import OURS
from qlora_jax.runtime import compilation, hugepages
from qlora_jax.runtime.errors import OutOfTime, RunFailed, UserError

WORKER = Path(__file__).with_name("worker.py")

TORCH = ("torch", "bitsandbytes", "transformers", "accelerate")
PEERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "kernels": {"bitsandbytes": ("torch", "bitsandbytes"), "qwix": ("qwix", "jax")},
    "step": {"bitsandbytes": (*TORCH, "peft")},
    "load": {"bitsandbytes": TORCH},
    "generate": {"bitsandbytes": TORCH},
}
"""Per benchmark: who can be measured in it, and the packages that takes."""

OWN = (
    ("GLIBC_TUNABLES", ":", f"{hugepages.TUNABLE}=1"),
    ("XLA_FLAGS", " ", f"{compilation.WIDTH}=512"),
)
"""What our program asks for itself: variable, what separates its parts, the part."""

_PROBE = """
import importlib.metadata, json, sys
def has(name):
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False
print(json.dumps([name for name in sys.argv[1:] if has(name)]))
"""


class Tool(NamedTuple):
    """One side of a comparison: a name that `worker` knows, and the interpreter that runs it."""

    name: str
    python: str


def ours() -> Tool:
    """This package, in this interpreter."""
    return Tool(OURS, sys.executable)


def peers(python: str, what: str) -> list[Tool]:
    """Every peer of benchmark `what` that an interpreter has installed, one or more.

    Raises:
      UserError: it is no Python, or has none of them.
    """
    needs = PEERS[what]
    wanted = sorted({package for packages in needs.values() for package in packages})
    installed = _installed(python, wanted)
    found = [Tool(name, python) for name, packages in needs.items() if installed >= {*packages}]
    if not found:
        missing = " or ".join(
            f"{', '.join(p for p in packages if p not in installed)} (for {name})"
            for name, packages in needs.items()
        )
        raise UserError(f"--peer {python}: bench {what} needs there {missing}; pip install that")
    return found


def measured(
    tool: Tool,
    what: str,
    options: Options | Mapping[str, Any],
    say: Callable[[str], None],
    *,
    timeout: float | None = None,
    flags: str = "",
) -> dict[str, Any]:
    """The report of one run, in a process of its own.

    Args:
      tool: who runs.
      what: a benchmark.
      options: of it.
      say: told what a run that failed wrote to stderr.
      timeout: seconds after which the run is ended.
      flags: for XLA, of our run.

    Raises:
      UserError: the run found the options, or what they name, not usable.
      RunFailed: it failed otherwise; `OutOfTime` after the timeout.
    """
    tree = options if isinstance(options, Mapping) else to_tree(options)
    command = [tool.python, str(WORKER), tool.name, what, json.dumps(tree)]
    environment = _with_flags(flags) if tool.name == OURS else _clean(tool.python)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise OutOfTime(f"bench {what}: {tool.name} took longer than {timeout:.0f} s") from None
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if done.returncode == 2:
        raise UserError(last)
    if done.returncode:
        say(done.stderr.strip())
        raise RunFailed(f"bench {what}: {tool.name} ended with code {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _installed(python: str, packages: Sequence[str]) -> set[str]:
    try:
        done = subprocess.run(
            [python, "-c", _PROBE, *packages],
            capture_output=True,
            text=True,
            timeout=60,
            env=_clean(python),
        )
        return set(json.loads(done.stdout))
    except (OSError, ValueError, TypeError, subprocess.TimeoutExpired):
        raise UserError(
            f"--peer {python}: not a Python interpreter; give the path of one, such as "
            "peer/bin/python"
        ) from None


def _with_flags(flags: str) -> dict[str, str]:
    return dict(os.environ) | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}


def _clean(python: str) -> dict[str, str]:
    """The environment without what our program asked for itself.

    Another interpreter than ours also gets none of what leads to our packages.
    """
    names = () if python == sys.executable else ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    for name, separator, own in OWN:
        parts = environment.pop(name, "").split(separator)
        if kept := [part for part in parts if part and part != own]:
            environment[name] = separator.join(kept)
    return environment

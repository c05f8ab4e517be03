"""Finds the tools to measure, ours and installed peers, and runs their benchmarks."""

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
"""Benchmark to the peers that support it, each with the packages that it needs."""

OWN = (
    ("GLIBC_TUNABLES", ":", f"{hugepages.TUNABLE}=1"),
    ("XLA_FLAGS", " ", f"{compilation.WIDTH}=512"),
)
"""Settings that our program adds for itself: variable, separator of its parts, added part."""

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
    """Returns this package as a tool, run by this interpreter."""
    return Tool(OURS, sys.executable)


def peers(python: str, what: str) -> list[Tool]:
    """Returns the peers of benchmark `what` that an interpreter has installed, at least one.

    Raises:
      UserError: `python` is no Python interpreter, or has no such peer installed.
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
        raise UserError(
            f"--peer {python}: bench {what} needs {missing}; install that for this Python"
        )
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
    """Runs a benchmark in a process of its own and returns its report.

    Args:
      tool: tool that runs the benchmark.
      what: name of the benchmark.
      options: options of the benchmark.
      say: function that gets the standard error of a failed run.
      timeout: seconds after which the run is ended; None sets no limit.
      flags: flags for XLA; only our own tool gets them.

    Raises:
      UserError: the run rejects the options, or a thing that they name.
      RunFailed: the run fails for another reason; `OutOfTime` after the timeout.
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
    """Returns the environment without the settings that our program added for itself.

    For another interpreter than ours, variables that lead to our packages are removed too.
    """
    names = () if python == sys.executable else ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    for name, separator, own in OWN:
        parts = environment.pop(name, "").split(separator)
        if kept := [part for part in parts if part and part != own]:
            environment[name] = separator.join(kept)
    return environment

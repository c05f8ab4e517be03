"""Tests a chat template in a child process with limits, before this process renders it.

A template is a program from a model's folder. Jinja's sandbox limits neither its time nor its
memory, and a thread with an endless template cannot be stopped.
"""

import functools
import signal
import subprocess
import sys
from pathlib import Path

from qlora_jax.runtime.errors import UserError
from qlora_jax.text.template_child import OVER_MEMORY

SECONDS = 2.0
"""CPU time in seconds that a template may take for ten short conversations."""
MEMORY = 2**29
"""Memory limit of the child process in bytes, including Python."""
PATIENCE = 120.0
"""Wall-clock limit of the child process in seconds, for a template that sleeps; it is long
because the machine may be busy."""
CHILD = Path(__file__).with_name("template_child.py")


def check(template: str, source: str) -> None:
    """Raises UserError if a chat template needs too much time or memory.

    Args:
      template: text of the template.
      source: file or folder of the template, for the message.
    """
    if fault := _fault(template):
        raise UserError(
            f"{source}: its chat template {fault} for short conversations; "
            "replace the template there, or use another tokenizer"
        )


@functools.cache
def _fault(template: str) -> str | None:
    try:
        ended = subprocess.run(
            # -P: do not import modules from the folder of the script
            [sys.executable, "-P", str(CHILD), str(SECONDS), str(MEMORY)],
            input=template.encode(errors="replace"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return f"takes over {PATIENCE:.0f} s"
    if ended.returncode == -signal.SIGPROF:
        return f"takes over {SECONDS:g} s of computing"
    if ended.returncode == OVER_MEMORY:
        return f"needs over {MEMORY >> 20} MiB"
    return None if ended.returncode == 0 else f"ends its process (exit code {ended.returncode})"

"""Tries a chat template in a process with limits, before this process renders it.

A template is a program from a model's folder. The sandbox that renders it bounds neither its time
nor its memory, and a thread that renders without end cannot be stopped.
"""

import functools
import signal
import subprocess
import sys
from pathlib import Path

from qlora_jax.runtime.errors import UserError
from qlora_jax.text.template_child import OVER_MEMORY

SECONDS = 2.0
"""Of computing that a template may take for ten short conversations."""
MEMORY = 2**29
"""Bytes that the process may have, Python included."""
PATIENCE = 120.0
"""Seconds after which the process is given up, on a machine that is busy or a template that
sleeps."""
CHILD = Path(__file__).with_name("template_child.py")


def check(template: str, source: str) -> None:
    """Raises UserError if a chat template needs too much time or memory.

    Args:
      template: text of the template.
      source: file or folder it is from, for the message.
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
            # -P: the folder of the file is not searched for modules
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

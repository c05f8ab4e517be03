"""The program `qlora-jax`, also `python -m qlora_jax`."""

import os
import signal
import sys
from typing import Any, NoReturn


def _end(*_: object) -> NoReturn:
    os.write(2, b"qlora-jax: interrupted\n")
    os._exit(128 + signal.SIGINT)


# Until a command begins nothing has been done, and what is imported may swallow KeyboardInterrupt.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)

from qlora_jax import startup, streams  # noqa: E402


def main() -> int:
    """Runs `cli.main` in a process that `startup` has set up."""
    streams.open_closed()
    sys.unraisablehook = _end_if_interrupted
    startup.prepare()
    from qlora_jax import cli

    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = cli.main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end has been told
    return code


def _end_if_interrupted(unraisable: Any) -> None:
    """Ends the process where Python would drop a KeyboardInterrupt, as in a callback of a library.

    What is written is safe from that as from any kill.
    """
    if unraisable.exc_type is KeyboardInterrupt:
        _end()
    sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    sys.exit(main())

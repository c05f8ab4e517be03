"""Entry point of the program `qlora-jax`, also run by `python -m qlora_jax`."""

from qlora_jax.runtime import interrupts

interrupts.end_at_once()  # first, because the other modules take time to import

import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402

from qlora_jax.runtime import startup, streams  # noqa: E402


def main() -> int:
    """Sets up the process with `startup`, runs `cli.main` and returns the exit code."""
    streams.open_closed()
    interrupts.end_where_dropped()
    startup.prepare()
    from qlora_jax import cli

    code = cli.main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the user has seen the last message already
    if code > 128:
        # A signal ended the command. Threads of libraries may still compute or read. Python would
        # wait for these threads, or crash when it frees objects that they still use.
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())

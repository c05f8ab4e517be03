"""The program `qlora-jax`, also `python -m qlora_jax`."""

from qlora_jax.runtime import interrupts

interrupts.end_at_once()  # other modules take time to import

import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402

from qlora_jax.runtime import startup, streams  # noqa: E402


def main() -> int:
    """Runs `cli.main` in a process that `startup` has set up."""
    streams.open_closed()
    interrupts.end_where_dropped()
    startup.prepare()
    from qlora_jax import cli

    code = cli.main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end has been told
    if code > 128:
        # A signal ended the command. Threads of libraries may still compute or read: Python would
        # wait for them, or crash when it takes apart what they use.
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())

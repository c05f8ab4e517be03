"""The exceptions that end a command with a one-line message, and helpers for such messages."""

import signal


class UserError(ValueError):
    """An error in the user's input.

    The message is one line that names the file, key or value and says what to do. The command
    line prints the message on stderr without a traceback and exits with code 2.
    """


class RunFailed(RuntimeError):
    """An error that stops a run although the input is valid, such as a loss that is not finite.

    The message says what happened and what was saved. The command line exits with code 1.
    """


class OutOfTime(RunFailed):
    """An error: a time limit stopped some work or kept it from starting; the work has no fault."""


class Terminated(Exception):
    """Raised when a signal ends a command that runs until one comes; `code` is the exit code.

    Attributes:
      code: exit code of the process, 128 + signal number.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


FULL_MEMORY = "RESOURCE_EXHAUSTED"
"""Text in XLA's error message when the device is out of memory."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the error's type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

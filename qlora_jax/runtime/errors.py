"""The exceptions that end a command with one line, and how other errors become such a line."""

import signal


class UserError(ValueError):
    """The user's input cannot be used.

    The message is one line that names the file, key or value and says what to do. The command
    line prints it on stderr without a traceback and exits with code 2.
    """


class RunFailed(RuntimeError):
    """A run cannot go on through no fault of the input, such as a loss that is not finite.

    The message says what happened and what was kept; the command line exits with code 1.
    """


class OutOfTime(RunFailed):
    """A time limit ended something, or kept it from beginning; nothing is wrong with it."""


class Terminated(Exception):
    """A signal ended a command that runs until one comes. `code` is the exit code, 128 + signal."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


FULL_MEMORY = "RESOURCE_EXHAUSTED"
"""Part of XLA's error where the device's memory does not suffice."""


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""The one exception that means: the input is at fault, here is the remedy."""


class UserError(ValueError):
    """The user's input cannot be used.

    The message is one line that names the file, key or value and says what to do. The command
    line prints it on stderr without a traceback and exits with code 2.
    """


class RunFailed(RuntimeError):
    """A run cannot go on through no fault of the input, such as a loss that is not finite.

    The message says what happened and what was kept; the command line exits with code 1.
    """

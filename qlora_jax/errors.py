"""The one exception that means: the input is at fault, here is the remedy."""


class UserError(ValueError):
    """The user's input cannot be used.

    The message is one line that names the file, key or value and says what to do. The command
    line prints it on stderr without a traceback and exits with code 2.
    """

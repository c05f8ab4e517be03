"""Checks the process limits that every command needs, and explains errors due to limits."""

import errno
import resource

from qlora_jax.runtime.errors import UserError

FILES = 32
"""Minimum number of open files; with fewer, libraries cannot be imported."""
ADDRESS_SPACE = 2**31
"""Minimum address space in bytes; with less, jax cannot start."""


def check() -> None:
    """Raises UserError if a limit is too low; first tries to raise the limit of open files."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < FILES and (most == resource.RLIM_INFINITY or most >= FILES):
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, most))
    elif files < FILES:
        raise UserError(
            f"at most {files} files may be open at a time, and {FILES} are needed; raise "
            "the limit (ulimit -n)"
        )
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY and space < ADDRESS_SPACE:
        raise UserError(
            f"the address space is limited to {space / 2**30:.1f} GiB, and "
            f"{ADDRESS_SPACE / 2**30:.0f} GiB are needed; raise the limit (ulimit -v)"
        )


def limit_remedy(error: Exception) -> str | None:
    """Returns a remedy for an error caused by a system limit; None for any other error."""
    if isinstance(error, MemoryError):
        return "out of memory; end other programs, or use a smaller model, batch or sequence"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many files are open; raise the limit (ulimit -n)"
    return None

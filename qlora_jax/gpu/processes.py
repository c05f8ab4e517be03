"""Gets answers from a process that a compiler may abort; an abort costs only one answer."""

import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

ASSERTION = "Check fail"
"""Text in the line with which a C++ library says why it aborts the process."""


class Died(NamedTuple):
    """The result if the process ended before its answer; `reason` has its exit code and message."""

    reason: str


def answers(
    command: Sequence[str], requests: Sequence[str], environment: Mapping[str, str]
) -> Iterator[str | Died]:
    """Yields an answer to each request, in order.

    Args:
      command: command that reads one request per line from standard input and writes one line for
        each. After a request that ended it, the command is started again for the later requests.
      requests: lines without line ends.
      environment: environment of the process.
    """
    rest = list(requests)
    while rest:
        for answer in _of_one_process(command, rest, environment):
            rest.pop(0)
            yield answer


def _of_one_process(
    command: Sequence[str], requests: Sequence[str], environment: Mapping[str, str]
) -> Iterator[str | Died]:
    with (
        tempfile.TemporaryFile("w+") as asked,
        tempfile.TemporaryFile("w+", errors="replace") as said,
    ):
        asked.writelines(request + "\n" for request in requests)
        asked.seek(0)
        process = subprocess.Popen(
            command, stdin=asked, stdout=subprocess.PIPE, stderr=said, text=True, env=environment
        )
        done = 0
        with process, process.stdout as answered:  # type: ignore[union-attr]
            for line in answered:
                done += 1
                yield line
        if done < len(requests):
            said.seek(0)
            reason = _reason(said.read())
            yield Died(f"the compiler's process ended with {process.returncode}: {reason}")


def _reason(text: str) -> str:
    """Returns the line of a failed assertion, which precedes a stack trace, or the last line."""
    lines = text.strip().splitlines() or ["nothing on standard error"]
    return next((line for line in lines if ASSERTION in line), lines[-1])

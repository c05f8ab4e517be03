"""Sends SIGINT and SIGTERM to commands at random moments, most in their first seconds.

Right: a stopped command ends by the signal itself, or with exit code 128 + the number of the signal
and one line of ours.
"""

import signal
import subprocess
from collections.abc import Iterator, Sequence
from time import sleep

from experiments.faults import formats
from experiments.faults.common import Campaign, Ended, Row, command

TIMES = 60
"""Tries of each kind of signal in the whole campaign."""
FIRST, LAST = 0.2, 6.0
"""Range of the seconds before the first signal; before FIRST, Python itself starts. Every second
try draws from the range up to LAST / 4."""
COMMANDS = (
    ("--help",),
    ("train", "{}/a.yaml", "--overwrite", "--output={}/signalled"),
    ("generate", "{}/run", "--prompt=zip", "--max-new-tokens=4"),
    ("quantize", "{}/model", "{}/signalled-{n}"),
    ("plan", "{}/a.yaml"),
)


def run(campaign: Campaign) -> Iterator[Row]:
    """Yields a row for each signal sent once, and for each sent twice."""
    seeds = formats.make(campaign)
    for number in (signal.SIGINT, signal.SIGTERM):
        for count in (1, 2):
            rng = campaign.rng("signals", number, count)
            faults = []
            tried = campaign.times(TIMES)
            for i in range(tried):
                moment = rng.uniform(FIRST, LAST / 4 if i % 2 else LAST)
                moments = [moment, *(rng.uniform(0, 0.5) for _ in range(count - 1))]
                arguments = rng.choice(COMMANDS)
                replaced = [
                    a.replace("{}", str(seeds)).replace("{n}", f"{number}-{count}-{i}")
                    for a in arguments
                ]
                # The signal itself ends a process that has not begun, or has finished, the command.
                ended = _signalled(replaced, number, moments)
                if fault := ended.fault(0, -number, 128 + number):
                    when = " and ".join(f"{each:.2f} s" for each in moments)
                    faults.append(f"{arguments[0]} after {when}: {fault}")
            what = f"{number.name}{' twice' if count == 2 else ''}"
            yield Row(part="signals", what=what, tried=tried, faults=tuple(faults))


def _signalled(arguments: Sequence[str], number: signal.Signals, moments: Sequence[float]) -> Ended:
    def hit(process: subprocess.Popen[str]) -> None:
        for moment in moments:
            sleep(moment)
            if process.poll() is None:
                process.send_signal(number)

    return command(*arguments, hit=hit)

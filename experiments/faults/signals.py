"""Sends SIGINT and SIGTERM to commands at random moments, most in their first seconds.

A command that is stopped ends by the signal, or with 128 + its number and one line of ours.
"""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import sleep

import formats
from common import Campaign, Ended, Row, command

TIMES = 60
"""Signals of each kind in the whole campaign."""
SECONDS = 6.0
"""The latest moment; half of all moments are in the first second and a half."""
COMMANDS = (
    ("--help",),
    ("train", "{}/a.yaml", "--overwrite", "--output={}/signalled"),
    ("generate", "{}/run", "--prompt=zip", "--max-new-tokens=4"),
    ("quantize", "{}/model", "{}/signalled-model"),
    ("plan", "{}/a.yaml"),
)


def run(campaign: Campaign) -> Iterator[Row]:
    """Yields a row for one signal, and one for two of them."""
    seeds = formats.make(campaign)
    for number in (signal.SIGINT, signal.SIGTERM):
        for count in (1, 2):
            rng = campaign.rng("signals", number, count)
            faults = []
            tried = campaign.times(TIMES)
            for i in range(tried):
                moment = rng.uniform(0, SECONDS / 4 if i % 2 else SECONDS)
                moments = [moment, *(rng.uniform(0, 0.5) for _ in range(count - 1))]
                arguments = rng.choice(COMMANDS)
                fault = _fault(_signalled(arguments, seeds, number, moments), number)
                if fault:
                    when = " and ".join(f"{each:.2f} s" for each in moments)
                    faults.append(f"{arguments[0]} after {when}: {fault}")
            what = f"{number.name}{' twice' if count == 2 else ''}"
            yield Row(part="signals", what=what, tried=tried, faults=tuple(faults))


def _signalled(
    arguments: tuple[str, ...], seeds: Path, number: signal.Signals, moments: list[float]
) -> Ended:
    def hit(process: subprocess.Popen[str]) -> None:
        for moment in moments:
            sleep(moment)
            if process.poll() is None:
                process.send_signal(number)

    return command(*(a.replace("{}", str(seeds)) for a in arguments), hit=hit)


def _fault(ended: Ended, number: signal.Signals) -> str | None:
    if ended.code == -signal.SIGTERM == -number:  # before a command begins nothing is to be said
        return ended.fault(-number, lines=0) if "Traceback" in ended.err else None
    # 2: a command before left its results where this one writes
    return ended.fault(0, 2, 128 + number)

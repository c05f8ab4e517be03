"""Runs commands on damaged files, each command in a separate process."""

import collections
import shutil
from collections.abc import Iterator

from experiments.faults import formats, fuzz
from experiments.faults.common import HANGS_AFTER, HUGE, MIB, Campaign, Row, command

INPUTS = 300
START_SECONDS = 10.0
"""CPU seconds that a command may take for imports and compilation, for any input."""
FIRST = 1_000_000
"""Offset of the numbers of the inputs, so that they differ from the inputs of `fuzz`."""


def run(campaign: Campaign) -> Iterator[Row]:
    """Yields a row for each command."""
    seeds = formats.make(campaign)
    folder = campaign.folder / "commands"
    folder.mkdir(exist_ok=True)
    for name in ("base", "model"):
        if not (folder / name).exists():
            (folder / name).symlink_to(seeds / name)
    tried: collections.Counter[str] = collections.Counter()
    faults: dict[str, list[str]] = collections.defaultdict(list)
    number, total = FIRST, campaign.times(INPUTS)
    while sum(tried.values()) < total:
        number += 1
        case = folder / "input"
        made, name = fuzz.damage(seeds, campaign.seed, number, case)
        if made.arguments:
            campaign.config(folder / "input.yaml", train__steps=2)
            ended = command(*(a.replace("{}", str(case)) for a in made.arguments))
            # the analysis of a sweep is the user's code, which may fail on damaged figures
            fault = ended.fault(0, 2, *([1] if made.arguments[0] == "sweep" else []))
            if not fault and ended.computed > HANGS_AFTER + START_SECONDS:
                fault = f"took {ended.computed:.0f} s of computing"
            if not fault and ended.peak > 2 * HUGE:
                fault = f"took {ended.peak // MIB} MiB"
            command_name = made.arguments[0]
            tried[command_name] += 1
            if fault:
                faults[command_name].append(f"{number} {made.name}/{name}: {fault}")
        for left in folder.glob("input*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    for name in sorted(tried):
        yield Row(part="commands", what=name, tried=tried[name], faults=tuple(faults[name]))

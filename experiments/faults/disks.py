"""Fills small disks by training, merging, exporting, quantizing and sweeping; then enlarges them.

Right: exit code 2, one line of ours, few other lines on stderr, and no half-written file under its
final name. After the disk is enlarged, the same command or `--resume` gives the same files as on a
large disk. The disks are tmpfs, mounted in a namespace that no other process sees.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from experiments.faults.common import LINES, MIB, ROOT, SWEEP, Campaign, Ended, Row, command
from experiments.faults.kills import figures, records
from experiments.tools.kill_resume import Moment, Trial, adapter_hash, saved_steps

STEPS = 12
PAGE = 4096
AMPLE = 64 * MIB
NAMESPACES = (
    ("unshare", "--mount"),
    ("unshare", "--user", "--map-root-user", "--mount"),
)
"""Command prefixes that let a process mount, for root and for other users."""

OUTPUTS: Mapping[str, Sequence[str]] = {
    "merge": ("merge", "{run}", "{out}"),
    "merge --to nf4": ("merge", "{run}", "{out}", "--to", "nf4", "--rows", "4"),
    "export": ("export", "{run}", "{out}"),
    "quantize": ("quantize", "{model}", "{out}"),
}
"""Commands that write one folder."""


def run(campaign: Campaign) -> Iterator[Row]:
    """Yields a row for each command and full folder, from a process that may mount."""
    namespace = next((words for words in NAMESPACES if may_mount(words, campaign.folder)), None)
    if namespace is None:
        yield Row(part="disks", what="full disks", tried=0, note="no tmpfs can be mounted here")
        return
    values = {"folder": str(campaign.folder), "seed": campaign.seed, "scale": campaign.scale}
    words = [*namespace, sys.executable, "-m", __name__, json.dumps(values)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield Row(**json.loads(line))
    if process.returncode:
        raise RuntimeError(f"the part ended with exit code {process.returncode}")


def may_mount(namespace: Sequence[str], folder: Path) -> bool:
    """Returns whether a tmpfs can be mounted with this command prefix."""
    words = [*namespace, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    with contextlib.suppress(OSError):
        return subprocess.run(words, capture_output=True).returncode == 0
    return False


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[Callable[[], object]]:
    """Mounts a disk of `size` bytes; yields a function that enlarges it to `AMPLE`."""

    def mount(*options: str, size: int) -> None:
        option = ",".join([*options, f"size={size}"])
        subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)], check=True)

    folder.mkdir(parents=True, exist_ok=True)
    mount(size=max(PAGE, size))
    try:
        yield lambda: mount("remount", size=AMPLE)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def used(folder: Path) -> int:
    """Returns the bytes of a disk that are in use."""
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def sizes(campaign: Campaign, what: str, need: int, whole: int) -> list[int]:
    """Returns random sizes of disks in bytes, spread evenly up to `need`, which suffices."""
    times, rng = campaign.times(whole), campaign.rng("disks", what)
    return [int(need * (i + rng.random()) / times) for i in range(times)]


@dataclasses.dataclass
class Tally:
    """Counts and faults of the tries of one row.

    Attributes:
      what: text of the row.
      usual: lines on stderr of the command on a large disk.
    """

    what: str
    usual: int
    tried: int = 0
    most_lines: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)
    places: Counter[str] = dataclasses.field(default_factory=Counter)

    def filled(self, ended: Ended, size: int, place: str, halves: Sequence[str]) -> None:
        """Records the end of a command on a small disk, and the half-written files there."""
        self.tried += 1
        self.places["fits" if ended.code == 0 else place] += 1
        if ended.code != 0:
            more = len(ended.err.splitlines()) - self.usual
            self.most_lines = max(self.most_lines, more)
        problems = [ended.fault(0, 2, lines=LINES + self.usual)]
        problems += [f"half-written: {name}" for name in halves]
        self.add(size, place, problems)

    def with_room(self, ended: Ended, size: int, same: Callable[[], bool]) -> None:
        """Records the end of the command on the enlarged disk, and whether its bytes are right."""
        fault = ended.fault(0)
        self.add(size, "with room", [fault or (None if same() else "other bytes")])

    def add(self, size: int, place: str, problems: Sequence[str | None]) -> None:
        self.faults += [f"{self.what}, {size} bytes, {place}: {p}" for p in problems if p]

    def row(self) -> Row:
        places = ", ".join(f"{count} {place}" for place, count in self.places.items())
        note = f"{places}; at most {self.most_lines} lines more than usual"
        return Row(
            part="disks", what=self.what, tried=self.tried, faults=tuple(self.faults), note=note
        )


def train(campaign: Campaign, folder: Path, config: Path) -> Iterator[Row]:
    """Trains on disks that become full at every stage of a run."""
    whole, mounted = folder / "whole", folder / "disk"
    ended = command("train", config, f"--output={whole}")
    with disk(mounted, AMPLE):
        shutil.copytree(whole, mounted / "run")
        need = int(1.3 * used(mounted))  # a third checkpoint is written before the first is removed
    tally = Tally("train", len(ended.err.splitlines()))
    for size in sizes(campaign, "train", need, 20):
        with disk(mounted, size) as grow:
            output = mounted / "run"
            words = ("train", config, f"--output={output}")
            tally.filled(command(*words), size, stage(output), halves(output, whole))
            grow()
            tally.with_room(command(*words, "--resume"), size, partial(same_run, whole, output))
    yield tally.row()
    yield from alone(campaign, folder, config, tally.usual)


def alone(campaign: Campaign, folder: Path, config: Path, usual: int) -> Iterator[Row]:
    """Resumes a run with one of its folders on a separate full disk."""
    whole, midway = folder / "whole", folder / "midway"
    Trial(config, environment=os.environ | {"PYTHONPATH": str(ROOT)}).hit(midway, Moment(step=8))
    for name, room in {"tensorboard": 1, "checkpoints": 60}.items():
        tally = Tally(f"train, {name}/ alone on a disk", usual)
        for pages in sizes(campaign, name, room, 6):
            output = Path(shutil.copytree(midway, folder / "run", dirs_exist_ok=False))
            content = output / name
            with disk(folder / "content", AMPLE):
                shutil.copytree(content, folder / "content", dirs_exist_ok=True)
                size = used(folder / "content") + pages * PAGE
            moved = content.rename(output.parent / "moved")
            with disk(content, size) as grow:
                shutil.copytree(moved, content, dirs_exist_ok=True)
                words = ("train", config, f"--output={output}", "--resume")
                tally.filled(command(*words), size, stage(output), halves(output, whole))
                grow()
                tally.with_room(command(*words), size, partial(same_run, whole, output))
            shutil.rmtree(moved)
            shutil.rmtree(output)
        yield tally.row()


def stage(output: Path) -> str:
    """Returns the stage at which a run ended, by the first file that is missing."""
    steps = saved_steps(output)
    stages = {
        "the manifest": (output / "manifest.json").exists(),
        "the config": (output / "config.yaml").exists(),
        "the first checkpoint": bool(steps),
        "a later checkpoint or figures": STEPS in steps,
        "the adapter": (output / "adapter").exists(),
    }
    return next((f"before {name}" for name, there in stages.items() if not there), "at the end")


def halves(output: Path, whole: Path) -> list[str]:
    """Returns the files of a run that exist but are not complete."""
    checks: Mapping[str, Callable[[Path], object]] = {
        "manifest.json": lambda path: json.loads(path.read_bytes()),
        "config.yaml": lambda path: path.read_bytes().endswith(b"\n"),
        "adapter": lambda path: adapter_hash(output) == adapter_hash(whole),
        "report.md": lambda path: path.read_bytes().endswith(b"\n"),
    }
    found = []
    for name, is_whole in checks.items():
        with contextlib.suppress(ValueError, OSError):
            if not (output / name).exists() or is_whole(output / name):
                continue
        found.append(name)
    return found


def same_run(a: Path, b: Path) -> bool:
    """Returns whether two runs ended with the same adapter and figures."""
    return adapter_hash(a) == adapter_hash(b) and figures(a) == figures(b)


def outputs(campaign: Campaign, folder: Path) -> Iterator[Row]:
    """Runs the commands of `OUTPUTS` on full disks."""
    mounted = folder / "disk"
    for what, template in OUTPUTS.items():
        out = mounted / "out"
        places = {"run": folder / "whole", "model": campaign.model, "out": out}
        words = [word.format(**places) for word in template]
        with disk(mounted, AMPLE):
            ended = command(*words)
            need, right = used(mounted), contents(out)
        tally = Tally(what, len(ended.err.splitlines()))
        tally.add(AMPLE, "with room", [ended.fault(0)])
        for size in sizes(campaign, what, need, 6):
            with disk(mounted, size) as grow:
                ended = command(*words)
                left = [] if ended.code == 0 else sorted(path.name for path in mounted.iterdir())
                tally.filled(ended, size, "refused", left)
                grow()
                if ended.code != 0:
                    ended = command(*words)
                tally.with_room(ended, size, partial(same_folder, out, right))
        yield tally.row()


def contents(folder: Path) -> dict[str, str]:
    """Returns the digest of each file of a folder, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same_folder(out: Path, right: Mapping[str, str]) -> bool:
    """Returns whether a folder holds exactly the files with the digests of `right`."""
    return contents(out) == right


def sweep(campaign: Campaign, folder: Path) -> Iterator[Row]:
    """Runs a sweep on full disks; its cells write files and long rows."""
    experiment = folder / "full.py"
    experiment.write_text(SWEEP, encoding="utf-8")
    mounted = folder / "disk"
    out = mounted / "out"
    words = ("sweep", experiment, "--out", out)
    with disk(mounted, AMPLE):
        ended = command(*words)
        need, right = used(mounted), records(out)
    tally = Tally("sweep", len(ended.err.splitlines()))
    tally.add(AMPLE, "with room", [ended.fault(0)])
    for size in sizes(campaign, "sweep", need, 10):
        with disk(mounted, size) as grow:
            ended = command(*words)
            rows = len(records(out))
            tally.filled(ended, size, f"after {rows} rows", [])
            grow()
            tally.with_room(command(*words), size, lambda: records(out) == right)
    yield tally.row()


def main() -> None:
    """Prints the rows as JSON, one per line."""
    values = json.loads(sys.argv[1])
    folder = Path(values.pop("folder"))
    campaign = Campaign(folder=folder, say=lambda line: print(line, file=sys.stderr), **values)
    own = folder / "disks"
    config = campaign.config(own / "config.yaml", train__steps=STEPS, train__eval_every=4)
    for rows in (train(campaign, own, config), outputs(campaign, own), sweep(campaign, own)):
        for row in rows:
            print(json.dumps(dataclasses.asdict(row)), flush=True)


if __name__ == "__main__":
    main()

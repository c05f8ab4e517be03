"""Code that all parts share: a small model, its data, commands, and the rule for a fault."""

import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.runtime import compilation

ROOT = Path(__file__).parents[2]
"""Folder of the checkout; all processes of the campaign run its code."""
MIB = 2**20
HANGS_AFTER = 10.0
"""Seconds for one input above which it counts as a fault."""
HUGE = 1024 * MIB
"""Bytes of memory for one input above which it counts as a fault."""
LINES = 12
"""Lines on stderr of a refused command above which it counts as a fault."""
WORDS = ("copytree", "rmtree", "sorted", "divmod", "chr", "open", "hash", "zip", "slice", "repr")

SWEEP = """
from qlora_jax.sweep import Analysis, Experiment, Verdict, statistics

def run(cell, context):
    (context.folder / "file").write_bytes(bytes(6000))
    return {"loss": cell["rank"] / 8 + cell["seed"], "text": "x" * 3000}

def analyse(table):
    interval = statistics.mean(table.column("loss"))
    return Analysis(Verdict("the loss", interval, statistics.within(interval, 0)))

EXPERIMENT = Experiment(
    name="full", question="?", paper="-", expected="-", cost="seconds",
    axes={"rank": [2, 4]}, seeds=(0, 1, 2), run=run, analyse=analyse,
)
"""
"""Source of a module with an experiment of six cells that take almost no time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table at the end.

    Attributes:
      part: name of the part of the campaign.
      what: kind of fault that was tried.
      tried: number of tries.
      faults: one line for each fault that was found.
      note: figures, such as times.
    """

    part: str
    what: str
    tried: int
    faults: tuple[str, ...] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Campaign:
    """Settings of a campaign, which every part reads.

    Attributes:
      folder: new folder that only the campaign uses.
      seed: seed of every random choice.
      scale: share of the whole campaign's tries, at least one of a kind; 1.0 is the whole campaign.
      say: function that prints a line of progress to stderr.
    """

    folder: Path
    seed: int
    scale: float
    say: Callable[[str], None]

    def rng(self, *names: object) -> random.Random:
        """Returns a random generator for these names, which other parts do not advance."""
        return random.Random(f"{self.seed} {names}")

    def times(self, whole: int) -> int:
        """Returns the number of tries here for `whole` tries in the whole campaign; at least 1."""
        return max(1, round(self.scale * whole))

    @property
    def model(self) -> Path:
        """Folder with a Llama of two layers, its tokenizer and its chat template."""
        return self.folder / "seeds" / "model"

    @property
    def chats(self) -> Path:
        """Path of a .jsonl file with 24 conversations."""
        return self.folder / "seeds" / "chats.jsonl"

    def config(self, path: Path, **settings: Any) -> Path:
        """Writes the config of a run that takes seconds; returns `path`.

        Args:
          path: file to write; the run's output folder is `run` in the same folder.
          settings: changes to the config; `__` stands for the dot, as in `lora__rank=8`.
        """
        tree: dict[str, Any] = {
            "model": {"path": str(self.model), "compute_dtype": "float32"},
            "data": {
                "source": str(self.chats),
                "eval_source": str(self.chats),
                "sequence_length": 128,
            },
            "output": str(path.parent / "run"),
            "lora": {"rank": 4, "alpha": 8},
            "optimizer": {"learning_rate": 0.01},
            "train": {"steps": 24, "batch_size": 2, "eval_every": 6, "save_every": 3, "samples": 0},
        }
        for key, value in settings.items():
            *parents, last = key.split("__")
            node = tree
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = value
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree, indent=1), encoding="utf-8")  # JSON is YAML
        return path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended.

    Attributes:
      code: exit code; negative for a signal; None if it was killed after the time limit.
      out: text on stdout.
      err: text on stderr.
      seconds: wall time.
      computed: CPU seconds, which do not depend on the machine's other load.
      peak: peak resident bytes of the process.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    computed: float
    peak: int

    def fault(self, *codes: int, lines: int = LINES) -> str | None:
        """Returns what is wrong with this end, or None.

        An end is right if the exit code is one of `codes` and stderr has no traceback. If the code
        is above 0, stderr must also have at most `lines` lines, the last of them ours.
        """
        said = self.err.rstrip("\n").splitlines()
        last = said[-1] if said else ""
        if self.code is None:
            return f"still running after {self.seconds:.0f} s; last line: {last[:200]}"
        if (start := self.err.find("Traceback (most recent call last)")) >= 0:
            # the first line after the traceback's head that is not indented is the error
            error = next((x for x in self.err[start:].splitlines()[1:] if x[:1].strip()), last)
            return f"traceback, exit code {self.code}: {error[:200]}"
        if self.code not in codes:
            return f"exit code {self.code}: {last[:200]}"
        if self.code > 0 and not last.startswith("qlora-jax: "):
            return f"exit code {self.code} without a line of ours: {last[:200]}"
        if self.code > 0 and len(said) > lines:
            return f"{len(said)} lines on stderr around: {last[:200]}"
        return None


def command(
    *arguments: str | Path,
    timeout: float = 120.0,
    environment: Mapping[str, str | None] | None = None,
    hit: Callable[[subprocess.Popen[str]], None] | None = None,
    prepare: Callable[[], object] | None = None,
) -> Ended:
    """Runs a `qlora-jax` command in a separate process.

    Args:
      arguments: name of the command and its options.
      timeout: seconds after which the process is killed.
      environment: changes to this process's variables; None removes a variable.
      hit: function that a thread calls with the running process, to send signals.
      prepare: function that the new process calls before the command starts.
    """

    def begin() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job ignores SIGINT
        if prepare is not None:
            prepare()

    began, before = time.monotonic(), _computed()
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_jax", *map(str, arguments)],
        env=_environment(environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        preexec_fn=begin,
    )
    peak = Peak(process.pid)
    if hit is not None:
        threading.Thread(target=hit, args=(process,), daemon=True).start()
    try:
        out, err = process.communicate(timeout=timeout)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        code = None
    return Ended(
        code=code,
        out=out,
        err=err,
        seconds=time.monotonic() - began,
        computed=_computed() - before,
        peak=peak.stop(),
    )


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    laid = {**os.environ, "PYTHONPATH": str(ROOT), **changes}
    return {name: value for name, value in laid.items() if value is not None}


def _computed() -> float:
    """Returns the CPU seconds of this process's children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Peak:
    """A thread that watches the peak resident bytes of a process."""

    def __init__(self, pid: int) -> None:
        self._highest = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(pid,), daemon=True)
        self._thread.start()

    def _watch(self, pid: int) -> None:
        while not self._ended.wait(0.05):
            self._highest = max(self._highest, resident(pid, "VmHWM"))

    def stop(self) -> int:
        """Stops the thread and returns the peak in bytes."""
        self._ended.set()
        self._thread.join()
        return self._highest


def resident(pid: int, field: str = "VmRSS") -> int:
    """Returns a process's resident bytes (VmRSS) or their peak (VmHWM); 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def share_compiled(campaign: Campaign) -> None:
    """Makes all later processes of the campaign share their compiled programs."""
    os.environ[compilation.FOLDER] = str(campaign.folder / "compiled")
    os.environ.update(compilation.SETTINGS)


def make_seeds(campaign: Campaign) -> None:
    """Makes the model and the data that the parts use, unless the model exists.

    Raises:
      RuntimeError: the command that makes the model failed.
    """
    seeds = campaign.folder / "seeds"
    if campaign.model.exists():
        return
    seeds.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(24):
        word = WORDS[i % len(WORDS)]
        turns = (("user", f"What does {word} {i} do?"), ("assistant", f"{word} is number {i}."))
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    campaign.chats.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = seeds / "text.txt"
    text.write_text("\n".join(f"{word} is a function of Python." for word in WORDS * 40))
    config = {
        "method": "full",
        "model": {"path": "from-scratch", "storage_dtype": "float32", "remat": "none"},
        "pretrain": {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 128,
            "layers": 2,
            "heads": 4,
            "positions": 256,
        },
        "data": {"source": str(text), "format": "text", "sequence_length": 64},
        "output": str(seeds / "run"),
        "train": {"steps": 4, "batch_size": 4, "eval_every": 4, "save_every": 4, "samples": 0},
    }
    path = seeds / "pretrain.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    ended = command("pretrain", path)
    if ended.code != 0:
        raise RuntimeError(f"the campaign's model was not made: {ended.err.splitlines()[-1:]}")
    (seeds / "run" / "model").rename(campaign.model)


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as a Markdown table."""
    lines = ["| part | what | tried | faults | |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row.part} | {row.what} | {row.tried} | {len(row.faults)} | {row.note} |")
    return "\n".join(lines)

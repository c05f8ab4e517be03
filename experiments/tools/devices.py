"""Checks that one config trains equally on one device, on several, and in two processes.

Expected: losses equal to a relative 1e-5; they differ only by the rounding of float32.
Cost: one run of the config for each mesh.
Command: python -m experiments.tools.devices configs/quickstart.yaml \\
           --output docs/results/devices --model.compute_dtype=float32 \\
           --model.storage_dtype=float32 --train.batch_size=8 --train.steps=20
  Further arguments are settings of all runs.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from qlora_jax import config as configs
from qlora_jax.runtime.device import cpu_cores, cpu_name
from qlora_jax.runtime.processes import OWN
from qlora_jax.runtime.versions import versions
from qlora_jax.train.metrics import read_metrics

BOUND = 1e-5
"""Largest relative difference of a loss that the check accepts."""


class Devices(NamedTuple):
    """The devices of a run.

    Attributes:
      data, fsdp: sizes of the axes of the mesh.
      processes: number of processes that share the devices.
    """

    data: int = 1
    fsdp: int = 1
    processes: int = 1

    def __str__(self) -> str:
        if self.data * self.fsdp == 1:
            return "1 device"
        shared = f", {self.processes} processes" if self.processes > 1 else ""
        return f"data {self.data} x fsdp {self.fsdp}{shared}"


TRIED = (Devices(), Devices(1, 2), Devices(1, 8))


def places(count: int) -> list[dict[str, str]]:
    """Returns, for each process of a run on this machine, the variables that make it join the run.

    Args:
      count: number of processes; a single process needs no variables.
    """
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [dict(zip(OWN, (address, str(count), str(index)))) for index in range(count)]


def ended(
    processes: Sequence[subprocess.Popen[str]], timeout: float | None = None
) -> list[tuple[int, str, str]]:
    """Waits for processes; returns the exit code, stdout and stderr of each.

    Args:
      processes: processes with pipes for both streams.
      timeout: seconds for each process; None for no limit.

    Raises:
      subprocess.TimeoutExpired: a process took longer.
    """
    streams = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, streams)]


def start(
    config: str | Path, run: Path, on: Devices, *settings: str, each: Sequence[Sequence[str]] = ()
) -> list[subprocess.Popen[str]]:
    """Starts the processes of a run on devices of this CPU.

    Args:
      config: YAML file or run directory of the config.
      run: run directory to write.
      on: mesh and number of processes.
      settings: further arguments of every process.
      each: further arguments of each process.
    """
    command = [sys.executable, "-m", "qlora_jax", "train", str(config), f"--output={run}"]
    command += [f"--mesh.data={on.data}", f"--mesh.fsdp={on.fsdp}", *settings]
    devices = str(max(on.data * on.fsdp // on.processes, 1))
    started = []
    for index, place in enumerate(places(on.processes)):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices}
        started.append(
            subprocess.Popen(
                [*command, *(each[index] if each else ())],
                env=environment | place,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def losses(run: Path) -> list[float]:
    """Returns the loss of each step of a run."""
    rows = read_metrics(run / "metrics.jsonl")
    return [row["train/loss"] for row in rows if "train/loss" in row]


def compare(
    config: str, folder: Path, settings: Sequence[str], tried: Sequence[Devices] = TRIED
) -> dict[Devices, list[float]]:
    """Trains on each of the devices, one after another; does not repeat a finished run.

    Args:
      config: YAML file.
      folder: folder for the run directories, one per entry of `tried`.
      settings: further arguments of every run.
      tried: devices of each run.

    Returns:
      Losses of each run, one per step.

    Raises:
      RuntimeError: a run failed; the message holds its exit code and last line.
    """
    found = {}
    for on in tried:
        run = folder / "-".join(map(str, on))
        print(f"{on}: {run}", file=sys.stderr, flush=True)
        for code, _, err in ended(start(config, run, on, "--resume", *settings)):
            if code:
                raise RuntimeError(f"{on}: exit code {code}: {err.strip().splitlines()[-1]}")
        found[on] = losses(run)
    return found


def differences(found: Mapping[Devices, Sequence[float]]) -> dict[Devices, list[float]]:
    """Returns the relative difference of each loss from that of the first run."""
    first = next(iter(found.values()))
    return {on: [abs(x / y - 1) for x, y in zip(own, first)] for on, own in found.items()}


def draw(found: Mapping[Devices, Sequence[float]], path: Path) -> None:
    """Draws the losses, and below them their relative differences from the first run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for order, (on, own) in enumerate(found.items()):
        steps = range(1, len(own) + 1)
        # the widest line first, so that equal curves all stay visible
        above.plot(steps, own, label=str(on), linewidth=2 * (len(found) - order), alpha=0.8)
    for on, own in list(differences(found).items())[1:]:
        below.semilogy(range(1, len(own) + 1), [max(x, 1e-9) for x in own], "o-", label=str(on))
    below.axhline(BOUND, color="gray", linestyle="--", label="bound")
    above.set_ylabel("loss")
    below.set_ylabel("difference, relative")
    below.set_xlabel("step")
    above.legend()
    below.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Compares, prints, and writes OUTPUT.json and OUTPUT.png."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config")
    parser.add_argument("--output", type=Path, required=True, help="path without .json and .png")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "devices")
    parser.add_argument(
        "--processes", action="append", type=int, default=[], help="also try this many processes"
    )
    options, settings = parser.parse_known_args()
    configs.parse_overrides(settings)
    tried = [*TRIED, *(Devices(1, 8, count) for count in options.processes)]
    found = compare(options.config, options.runs, settings, tried)
    far = {str(on): max(own) for on, own in differences(found).items()}
    for on, largest in far.items():
        print(f"{on:30} {largest:.1e}")
    text = {
        "command": " ".join(["python -m experiments.tools.devices", *sys.argv[1:]]),
        "machine": f"{cpu_name()}, {cpu_cores()} cores",
        "versions": versions(),
        "bound": BOUND,
        "largest_difference": far,
        "losses": {str(on): own for on, own in found.items()},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(text, indent=1) + "\n")
    draw(found, options.output.with_suffix(".png"))
    if max(far.values()) > BOUND:
        sys.exit(f"differs by more than {BOUND}")


if __name__ == "__main__":
    main()

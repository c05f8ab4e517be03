"""Traces a step and an answer: the time of the kernels, and the gaps between them."""

import collections
import gzip
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from qlora_jax.bench import generate as generation
from qlora_jax.bench import step
from qlora_jax.bench.gpu import steps
from qlora_jax.bench.gpu.lane import FULL, REHEARSAL, PartContext
from qlora_jax.bench.gpu.programs import BenchProgram
from qlora_jax.bench.options import GenerateOptions, StepOptions

TOP = 15
"""Number of listed kernels, those with the most time."""

LONGEST = 80
"""Largest number of characters kept of a kernel's name."""


class Sizes(NamedTuple):
    """The step and the answer that are traced."""

    step: StepOptions
    answer: GenerateOptions


SIZES: Mapping[str, Sizes] = {
    FULL: Sizes(
        steps.qlora("llama-7b"), GenerateOptions("llama-7b", prompt=34, tokens=33, samples=1)
    ),
    REHEARSAL: Sizes(
        steps.qlora("smollm2-135m", 16, rank=4, steps=1),
        GenerateOptions("smollm2-135m", prompt=4, tokens=3, samples=1),
    ),
}
KINDS = ("step", "answer")
FIELDS = ("busy", "span", "kernels")


class Event(NamedTuple):
    """One run of a kernel: name, and start and duration in microseconds."""

    name: str
    start: float
    length: float


def names(scale: str) -> list[str]:
    """Returns the names of the results."""
    return [f"{kind}: {field}" for kind in KINDS for field in FIELDS]


def programs(scale: str, device: Any) -> Iterator[BenchProgram]:
    """Yields the programs of the step and of the answer."""
    sizes = SIZES[scale]
    if not steps.too_large(sizes.step.model, sizes.step.method, device.memory):
        yield from steps.case_programs([steps.StepCase("step", sizes.step, flags="")], device)
    for name, function, arguments in generation.programs(sizes.answer):
        yield BenchProgram(f"answer: {name}", function, arguments)


def run(lane: PartContext) -> None:
    """Traces one step and one answer."""
    sizes = SIZES[lane.scale]
    for kind, make in zip(KINDS, (_step, _answer)):
        own = [f"{kind}: {field}" for field in FIELDS]
        if lane.due(8, *own):
            with lane.guard(*own):
                call = make(sizes)
                call()
                summarize(lane, kind, traced(call))


def traced(call: Callable[[], Any]) -> list[Event]:
    """Returns the kernels that the device ran during a call, in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        (path,) = Path(folder).rglob("*.trace.json.gz")
        return device_events(json.loads(gzip.decompress(path.read_bytes())))


def device_events(trace: Mapping[str, Any]) -> list[Event]:
    """Returns the kernels of a trace: those in a GPU's streams or, on a CPU, in XLA's threads."""
    processes, threads = {}, {}
    for e in trace["traceEvents"]:
        if e.get("name") == "process_name":
            processes[e["pid"]] = e["args"]["name"]
        if e.get("name") == "thread_name":
            threads[e["pid"], e["tid"]] = e["args"]["name"]

    def of_device(e: Mapping[str, Any]) -> bool:
        thread = threads.get((e["pid"], e["tid"]), "")
        if any("GPU" in name for name in processes.values()):
            return "GPU" in processes.get(e["pid"], "") and "Stream" in thread
        return "XLA" in thread or "xla" in thread

    found = [
        Event(e["name"][:LONGEST], e["ts"], e["dur"])
        for e in trace["traceEvents"]
        if e.get("ph") == "X" and of_device(e)
    ]
    return sorted(found, key=lambda event: event.start)


def summarize(lane: PartContext, kind: str, events: Sequence[Event]) -> None:
    """Records busy time, time from the first kernel to the last, launches, and top kernels."""
    if not events:
        raise ValueError("the trace holds no event of the device")
    total: dict[str, float] = collections.defaultdict(float)
    count: dict[str, int] = collections.defaultdict(int)
    busy, until = 0.0, -np.inf
    for event in events:
        total[event.name] += event.length
        count[event.name] += 1
        end = event.start + event.length
        busy += max(0.0, end - max(event.start, until))
        until = max(until, end)
    top = sorted(total, key=lambda name: -total[name])[:TOP]
    rows = [[name, round(total[name], 1), count[name]] for name in top]
    lane.record.figure(f"{kind}: busy", "us", round(busy, 1), top=rows)
    lane.record.figure(f"{kind}: span", "us", round(until - events[0].start, 1))
    lane.record.figure(f"{kind}: kernels", "launches", len(events))


def _step(sizes: Sizes) -> Callable[[], Any]:
    prepared = step.prepare(sizes.step)

    def call() -> Any:
        arguments = (prepared.state, prepared.frozen, prepared.batch, None)
        return jax.block_until_ready(prepared.program.gradient(*arguments))

    return call


def _answer(sizes: Sizes) -> Callable[[], Any]:
    return generation.prepare(sizes.answer).answer

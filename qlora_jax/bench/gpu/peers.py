"""Measures peers on the same GPU: bitsandbytes' products, and PEFT's step on its weights."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from qlora_jax.bench import tools
from qlora_jax.bench.gpu import steps, times
from qlora_jax.bench.gpu.lane import FULL, REHEARSAL, PartContext
from qlora_jax.bench.gpu.programs import BenchProgram
from qlora_jax.bench.options import KernelOptions, StepOptions
from qlora_jax.models.shapes import config_json
from qlora_jax.runtime.errors import UserError

PEER = "bitsandbytes"
STEPS: dict[str, dict[str, StepOptions]] = {
    FULL: {"PEFT, 7B, 512 tokens": steps.qlora("llama-7b")},
    REHEARSAL: {"PEFT, 135M, 16 tokens": steps.qlora("smollm2-135m", 16, rank=4, steps=1)},
}
KINDS = {"speed": ("tokens/s", "speed"), "peak": ("MiB", "peak memory, device")}


def names(scale: str) -> list[str]:
    """Returns the names of the results."""
    return [case.name for case in _products(scale)] + [
        f"{name}: {kind}" for name in STEPS[scale] for kind in KINDS
    ]


def programs(scale: str, device: Any) -> Iterator[BenchProgram]:
    """Yields nothing, because peers compile no program of ours."""
    yield from ()


def run(lane: PartContext) -> None:
    """Measures each benchmark with the first interpreter that has bitsandbytes for it."""
    products = [case.name for case in _products(lane.scale)]
    rest = [name for name in names(lane.scale) if name not in products]
    for what, own, measure in (("step", rest, _steps), ("kernels", products, _kernels)):
        tool = _first(lane, what)
        if tool is None:
            for name in own:
                lane.record.absent(name, f"{PEER} for bench {what} is not installed; --peer PYTHON")
        elif lane.due(15, *own):
            with lane.guard(*own):
                measure(lane, tool)


def _first(lane: PartContext, what: str) -> tools.Tool | None:
    for python in lane.peers:
        try:
            return next(tool for tool in tools.peers(python, what) if tool.name == PEER)
        except (UserError, StopIteration):
            continue
    return None


def _steps(lane: PartContext, tool: tools.Tool) -> None:
    for name, options in STEPS[lane.scale].items():
        shape = config_json(options.model)
        asked = dataclasses.replace(options, shape=shape, dtype=lane.dtype())
        report = tools.measured(tool, "step", asked, print, timeout=lane.left())
        lane.figures(report, name, KINDS)


def _kernels(lane: PartContext, tool: tools.Tool) -> None:
    size = times.SIZES[lane.scale]
    device = "cpu" if lane.rehearsing else "gpu"
    for shape in size.shapes:
        cases = [case for case in _products(lane.scale) if (case.k, case.n) == shape]
        if not lane.due(12, *(case.name for case in cases)):
            continue
        options = KernelOptions(
            (shape,), size.rows, (lane.dtype(),), size.samples, times.DIRECTIONS, device
        )
        report = tools.measured(tool, "kernels", options, print, timeout=lane.left())
        for case in (case._replace(dtype=lane.dtype()) for case in cases):
            each = report["figures"][case.product.name]["value"] / 1e3
            lane.record.figure(case.name, "us", 1e6 * each, field="time", **case._asdict())


def _products(scale: str) -> list[times.TimeCase]:
    return [
        case._replace(implementation=PEER)
        for case in times.cases(scale)
        if case.implementation == times.GEMM
    ]

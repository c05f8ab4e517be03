"""Measures generation from published shapes with random codes: tokens/s and prefill."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qlora_jax.bench import generate
from qlora_jax.bench.gpu.facts import MEMORY
from qlora_jax.bench.gpu.lane import FULL, REHEARSAL, PartContext
from qlora_jax.bench.gpu.programs import BenchProgram, as_options
from qlora_jax.bench.gpu.steps import measured, too_large
from qlora_jax.bench.options import GenerateOptions

UNFUSED = "--xla_gpu_enable_dynamic_slice_fusion=false"
"""Flag that copies each layer's codes out of the stack before a kernel reads them."""

ONE_GRAPH = "--xla_gpu_enable_command_buffer=+WHILE --xla_gpu_command_buffer_unroll_loops=true"
"""Flags that make one CUDA graph per token. By default, XLA makes one per layer, and the host runs
the loop over the layers."""

KINDS = {
    "decode": ("tokens/s", "decode"),
    "prefill": ("ms", "prefill"),
    "peak": ("MiB", "peak memory, device"),
}
"""Figures of a case: kind to its unit and its name in the report of `bench generate`."""


class DecodeCase(NamedTuple):
    """One generation: a name, options of `bench generate`, and flags for XLA."""

    name: str
    options: GenerateOptions
    flags: str = ""


SEVEN = GenerateOptions("llama-7b", tokens=129, samples=3)

CASES: Mapping[str, Sequence[DecodeCase]] = {
    FULL: (
        DecodeCase("7B, 1 row", SEVEN),
        DecodeCase("7B, 1 row, xla", dataclasses.replace(SEVEN, kernel="xla")),
        DecodeCase("7B, 16 rows", dataclasses.replace(SEVEN, rows=16)),
        DecodeCase("7B, 1 row, codes copied out of the stack", SEVEN, UNFUSED),
        DecodeCase("7B, 1 row, a CUDA graph a token", SEVEN, ONE_GRAPH),
    ),
    REHEARSAL: (
        DecodeCase(
            "135M, 2 rows", GenerateOptions("smollm2-135m", prompt=4, tokens=3, samples=1, rows=2)
        ),
    ),
}


def names(scale: str) -> list[str]:
    """Returns the names of the results."""
    return [f"{case.name}: {kind}" for case in CASES[scale] for kind in KINDS]


def programs(scale: str, device: Any) -> Iterator[BenchProgram]:
    """Yields the two programs of each case, for prefill and for decoding."""
    for case in CASES[scale]:
        for name, function, arguments in generate.programs(case.options):
            yield BenchProgram(f"{case.name}: {name}", function, arguments, as_options(case.flags))


def run(lane: PartContext) -> None:
    """Measures every case, each in a process of its own."""
    memory = lane.fact(MEMORY)
    for case in CASES[lane.scale]:
        own = [f"{case.name}: {kind}" for kind in KINDS]
        if reason := too_large(case.options.model, "qlora", memory):
            for name in own:
                lane.record.absent(name, reason)
        elif lane.due(12, *own):
            with lane.guard(*own):
                _one(lane, case)


def _one(lane: PartContext, case: DecodeCase) -> None:
    report = measured(lane, "generate", case.options, case.flags)
    lane.figures(report, case.name, KINDS, rows=case.options.rows)

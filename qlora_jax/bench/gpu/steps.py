"""Measures training steps of published shapes with random codes: tokens/s, memory, and plan.

Each case has a process of its own, because a device counts its peak from the process's start.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qlora_jax.bench import step, tools
from qlora_jax.bench.gpu.facts import MEMORY
from qlora_jax.bench.gpu.lane import CUBLAS, FULL, REHEARSAL, PartContext
from qlora_jax.bench.gpu.programs import BenchProgram, as_options
from qlora_jax.bench.options import GenerateOptions, StepOptions
from qlora_jax.config import Config
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.shapes import find
from qlora_jax.plan import compiled_memory
from qlora_jax.plan.ledger import parameters

KINDS = {
    "speed": ("tokens/s", "speed"),
    "step": ("ms", "step, median"),
    "update": ("ms", "update"),
    "moments": ("MiB", "moments"),
    "peak": ("MiB", "peak memory, device"),
    "planned": ("MiB", "planned, device"),
    "compile": ("s", "compile"),
}
"""Figures of a case: kind to its unit and its name in the report of `bench step`."""

FINITE = "losses are finite"

BYTES = {"qlora": 0.56, "lora": 2.0}
"""Method to the least bytes that a run holds for each parameter of the base."""


class StepCase(NamedTuple):
    """One measured training step.

    Attributes:
      name: name of the case, in words.
      options: options of `bench step`.
      least: seconds that must be left for the case to begin.
      flags: flags for XLA.
    """

    name: str
    options: StepOptions
    least: int = 14
    flags: str = CUBLAS


PAPER = StepOptions("llama-7b", remat="full", batch=1, seq=512, rank=64, steps=4)
"""The QLoRA paper's set-up: rank 64 on every linear, one row, everything recomputed."""


def qlora(model: str, seq: int = 512, **more: Any) -> StepOptions:
    """Returns `PAPER` with another model, another length and further changed options."""
    return dataclasses.replace(PAPER, model=model, seq=seq, **more)


TORCHTUNE = {
    "batch": 2,
    "rank": 8,
    "alpha": 16.0,
    "target_modules": ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
"""torchtune's recipe for Llama 3.1 8B."""

CASES: Mapping[str, Sequence[StepCase]] = {
    FULL: (
        StepCase("7B, 512 tokens", qlora("llama-7b")),
        StepCase("7B, 512 tokens, xla", qlora("llama-7b", kernel="xla")),
        StepCase("7B, 512 tokens, moments on the host", qlora("llama-7b", offload="host")),
        StepCase("7B, 512 tokens, products tuned as XLA likes", qlora("llama-7b"), 30, ""),
        StepCase("7B, 2048 tokens", qlora("llama-7b", 2048)),
        StepCase("7B, 512 tokens, 16-bit LoRA", qlora("llama-7b", method="lora")),
        StepCase("8B, 2 x 2048 tokens, rank 8", qlora("llama3-8b", 2048, **TORCHTUNE)),
    ),
    REHEARSAL: (
        StepCase("135M, 16 tokens", qlora("smollm2-135m", 16, rank=4, steps=1)),
        StepCase(
            "135M, 16 tokens, moments on the host",
            qlora("smollm2-135m", 16, rank=4, steps=1, offload="host"),
        ),
    ),
}


def result_names(cases: Sequence[StepCase]) -> list[str]:
    """Returns the names of the results of some cases."""
    return [f"{case.name}: {kind}" for case in cases for kind in (*KINDS, FINITE)]


def case_programs(cases: Sequence[StepCase], device: Any) -> Iterator[BenchProgram]:
    """Yields the gradient and update programs of those cases that fit on the device."""
    for case in cases:
        if too_large(case.options.model, case.options.method, device.memory):
            continue
        config, decoder = step.config_of(case.options), find(case.options.model)
        yield from step_programs(case.name, config, decoder, device, case.flags)


def step_programs(
    name: str, config: Config, decoder: DecoderConfig, device: Any, flags: str
) -> Iterator[BenchProgram]:
    """Yields the gradient and update programs of a run's step.

    Args:
      name: beginning of the programs' names.
      config: config of the run.
      decoder: shapes of the run's model.
      device: `kernels.target.Hardware`, or the GPU to compile for.
      flags: flags for XLA.
    """
    made, options = compiled_memory.abstract_step(config, decoder, device), as_options(flags)
    for piece in compiled_memory.list_gradient_programs(made):
        title = f"{name}: {piece.name}"
        yield BenchProgram(title, piece.function, piece.arguments, options, donate=piece.donate)
    for what, update, inputs in compiled_memory.layer_updates(made):
        yield BenchProgram(f"{name}: {what}", update, inputs, options, donate=(0, 3))


def too_large(model: str, method: str, memory: int | None) -> str:
    """Returns the reason why a model does not fit into `memory` bytes; empty if it may fit.

    Args:
      model: published name of the model.
      method: qlora or lora.
      memory: bytes of device memory; None if they are unknown.
    """
    held = int(parameters(find(model)) * BYTES[method])
    if memory is None or held < memory:
        return ""
    return f"its weights take {held / 2**30:.0f} GiB, and the device has {memory / 2**30:.0f}"


def names(scale: str) -> list[str]:
    """Returns the names of the results."""
    return result_names(CASES[scale])


def programs(scale: str, device: Any) -> Iterator[BenchProgram]:
    """Yields the programs of all cases that fit on the device."""
    return case_programs(CASES[scale], device)


def run(lane: PartContext) -> None:
    """Measures every case."""
    run_cases(lane, CASES[lane.scale])


def run_cases(lane: PartContext, cases: Sequence[StepCase]) -> None:
    """Measures some cases, each in a process of its own, and records their figures."""
    # Read the recorded fact: asking jax would take the device's memory for this process.
    memory = lane.fact(MEMORY)
    for case in cases:
        own = result_names([case])
        if reason := too_large(case.options.model, case.options.method, memory):
            for name in own:
                lane.record.absent(name, reason)
            continue
        if not lane.due(case.least, *own):
            continue
        with lane.guard(*own):
            _one(lane, case)


def measured(
    lane: PartContext, benchmark: str, options: StepOptions | GenerateOptions, flags: str
) -> Mapping[str, Any]:
    """Runs a benchmark in its own process with the lane's dtype and kernel; returns the report.

    Args:
      lane: lane of the part.
      benchmark: step or generate.
      options: options of the benchmark; the dtype is replaced, and the kernel if it is not set.
      flags: flags for XLA.
    """
    kernel = options.kernel or lane.kernel()
    options = dataclasses.replace(options, dtype=lane.dtype(), kernel=kernel)
    return tools.measured(tools.ours(), benchmark, options, print, timeout=lane.left(), flags=flags)


def _one(lane: PartContext, case: StepCase) -> None:
    report = measured(lane, "step", case.options, case.flags)
    lane.figures(report, case.name, KINDS)
    finite = all(math.isfinite(loss) for loss in report["losses"])
    lane.record.check(f"{case.name}: {FINITE}", finite, losses=report["losses"])

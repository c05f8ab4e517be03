"""Measures a QLoRA step of models from 13B to 70B that fit into the device's memory."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_jax.bench.gpu import steps
from qlora_jax.bench.gpu.lane import FULL, REHEARSAL, PartContext
from qlora_jax.bench.gpu.programs import BenchProgram
from qlora_jax.bench.gpu.steps import StepCase, qlora

CASES: Mapping[str, Sequence[StepCase]] = {
    FULL: (
        StepCase("65B, 512 tokens", qlora("llama-65b", steps=2), 45),
        StepCase(
            "65B, 512 tokens, moments on the host", qlora("llama-65b", steps=2, offload="host"), 45
        ),
        StepCase("70B, 512 tokens", qlora("llama2-70b", steps=2), 45),
        StepCase("33B, 512 tokens", qlora("llama-33b", steps=2), 20),
        StepCase("13B, 512 tokens", qlora("llama-13b", steps=2), 15),
        StepCase("70B, 2048 tokens", qlora("llama2-70b", 2048, steps=2), 50),
    ),
    REHEARSAL: (StepCase("135M, 32 tokens", qlora("smollm2-135m", 32, rank=4, steps=1)),),
}


def names(scale: str) -> list[str]:
    """Returns the names of the results."""
    return steps.result_names(CASES[scale])


def programs(scale: str, device: Any) -> Iterator[BenchProgram]:
    """Yields the programs of all cases that fit on the device."""
    return steps.case_programs(CASES[scale], device)


def run(lane: PartContext) -> None:
    """Measures every case that fits."""
    steps.run_cases(lane, CASES[lane.scale])

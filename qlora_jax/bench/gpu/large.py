"""A QLoRA step of 13B to 70B, as the device's memory allows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_jax.bench.gpu import steps
from qlora_jax.bench.gpu.lane import FULL, REHEARSAL, Lane
from qlora_jax.bench.gpu.programs import Program
from qlora_jax.bench.gpu.steps import Case, qlora

CASES: Mapping[str, Sequence[Case]] = {
    FULL: (
        Case("65B, 512 tokens", qlora("llama-65b", steps=2), 45),
        Case(
            "65B, 512 tokens, moments on the host", qlora("llama-65b", steps=2, offload="host"), 45
        ),
        Case("70B, 512 tokens", qlora("llama2-70b", steps=2), 45),
        Case("33B, 512 tokens", qlora("llama-33b", steps=2), 20),
        Case("13B, 512 tokens", qlora("llama-13b", steps=2), 15),
        Case("70B, 2048 tokens", qlora("llama2-70b", 2048, steps=2), 50),
    ),
    REHEARSAL: (Case("135M, 32 tokens", qlora("smollm2-135m", 32, rank=4, steps=1)),),
}


def names(scale: str) -> list[str]:
    """Returns the names of the results."""
    return steps.result_names(CASES[scale])


def programs(scale: str, device: Any) -> Iterator[Program]:
    """Yields the programs of all cases that fit on the device."""
    return steps.case_programs(CASES[scale], device)


def run(lane: Lane) -> None:
    """Measures every case that fits."""
    steps.run_cases(lane, CASES[lane.scale])

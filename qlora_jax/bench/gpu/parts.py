"""Lists the parts of the report, the most valuable first.

To add a part, write a module with `names(scale)`, `programs(scale, device)` and `run(lane)`, and
add a row to `PARTS`. Then `make gpu-check` compiles its programs, and `--rehearse` runs it.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from qlora_jax.bench.gpu.lane import CUBLAS


class BenchPart(NamedTuple):
    """One part of the report, with its time limits.

    Attributes:
      name: name of its module in this folder.
      limit: seconds after which its process is ended.
      least: seconds that must be left for the part to begin.
      what: description for users.
      flags: flags for XLA.
    """

    name: str
    limit: int
    least: int
    what: str
    flags: str = ""

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"qlora_jax.bench.gpu.{self.name}")


PARTS: Sequence[BenchPart] = (
    BenchPart(
        "ceilings", 60, 10, "device, driver, versions; peak memory and product rates", CUBLAS
    ),
    BenchPart("products", 110, 25, "every kernel against float64", CUBLAS),
    BenchPart("contexts", 70, 20, "kernels in scan, remat, vmap, CUDA graphs, beyond 2^31", CUBLAS),
    BenchPart("attention", 60, 20, "fused attention against float32, and its time", CUBLAS),
    BenchPart("identity", 45, 15, "fresh adapters change nothing, however XLA tunes products"),
    BenchPart(
        "steps", 130, 30, "a QLoRA step of published shapes: tokens/s, memory against the plan"
    ),
    BenchPart("training", 200, 40, "quickstart, resume, moments on the host, float16", CUBLAS),
    BenchPart("times", 120, 30, "products: kernels, decode + GEMM, 16-bit GEMM", CUBLAS),
    BenchPart("curves", 60, 25, "the loss of 50 steps with each implementation", CUBLAS),
    BenchPart("decode", 90, 25, "generated tokens/s and prefill"),
    BenchPart("large", 110, 50, "a QLoRA step of 13B to 70B as memory allows"),
    BenchPart("traces", 60, 25, "which kernels take the time of a step and of a token"),
    BenchPart("peers", 120, 40, "bitsandbytes' products and PEFT's step on the same card"),
)


def chosen(only: Sequence[str], skip: Sequence[str]) -> list[BenchPart]:
    """Returns the parts to run.

    Args:
      only: names; empty means all.
      skip: names to leave out.
    """
    return [p for p in PARTS if (not only or p.name in only) and p.name not in skip]

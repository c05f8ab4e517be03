"""Models a kernel's time on a GPU: the longest of the times of bytes, tensor cores and issue.

All assumptions favour the kernel. Every byte of the HLO's operands and results moves once, at the
memory's full rate by the data sheet or by measurement; reading a byte again is free (cache). Each
of the four schedulers of a multiprocessor issues one instruction per clock, and never waits for
another scheduler or for a latency. The clock is the boost clock. A launch takes no time.

A multiprocessor runs whole blocks, so the time of a grid that does not fill the GPU includes the
idle multiprocessors.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qlora_jax.gpu.described import read_gpu
from qlora_jax.gpu.sass import Instruction, SassKernel, classify, mma_flop

SCHEDULERS = 4
"""Number of schedulers of a multiprocessor, each with a quarter of the lanes."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """The rates of one multiprocessor per clock.

    Attributes:
      clock: boost clock in Hz.
      tensor: dense 16-bit flop with float32 accumulation.
      mma: share of `tensor` that `mma.sync` (HMMA) reaches.
      float32: lanes for float32.
      float16: lanes for pairs of float16.
      bfloat16: lanes for pairs of bfloat16.
      blocks: largest number of resident blocks.
    """

    clock: float
    tensor: int
    mma: float
    float32: int
    float16: int
    bfloat16: int
    blocks: int


RATES: Mapping[str, Rates] = {
    "t4": Rates(1.59e9, 1024, 1.0, 64, 64, 0, 16),
    "a100": Rates(1.41e9, 2048, 1.0, 64, 128, 64, 32),
    "a6000": Rates(1.80e9, 1024, 1.0, 128, 64, 64, 16),
    "rtx4090": Rates(2.52e9, 512, 1.0, 128, 64, 64, 24),
    "h100": Rates(1.83e9, 4096, 0.63, 128, 128, 128, 32),
    "b200": Rates(1.86e9, 8192, 0.315, 128, 128, 128, 32),
}
"""GPU to rates. `clock` and `tensor` give the data sheets' dense peaks: T4 65, A100 312, RTX A6000
154.8 and RTX 4090 165.2 (GA102 and AD102 white papers, float32 accumulation), H100 SXM 989 and B200
2250 TFLOPS (half of the figure with sparsity). Lanes: CUDA C++ Programming Guide, "Throughput of
Native Arithmetic Instructions", halved if a lane holds a pair; blocks: "Technical Specifications
per Compute Capability" in the same guide. `mma` of the h100: 63% of the peak (arXiv 2402.13499);
only wgmma reaches the peak. The lanes and this share are quoted from memory and must still be
checked. **Assumed**, because no source is known: the b200 has the h100's `mma` rate per
multiprocessor and clock (its peak needs tcgen05)."""

INTEGER_LANES = 64
CONVERT_LANES = 16
WAVEFRONT = {"128": 4, "64": 2, "4": 4, "2": 2}
"""Modifier of a load or store (bits, or matrices of LDSM) to passes through shared memory, which
moves 128 bytes per clock. Without a modifier, there is 1 pass."""


class Ceilings(NamedTuple):
    """The two rates of a whole GPU that a benchmark can measure.

    Attributes:
      bandwidth: bandwidth of the device memory, bytes per second.
      tensor: dense 16-bit flop per second with float32 accumulation.
    """

    bandwidth: float
    tensor: float


def data_sheet(gpu: str) -> Ceilings:
    """Returns the ceilings of a GPU's data sheet; `gpu` is a name in `RATES`."""
    limits, rates = read_gpu(gpu), RATES[gpu]
    return Ceilings(limits.bandwidth, rates.tensor * rates.clock * limits.cores)


class KernelTime(NamedTuple):
    """Seconds of a kernel by each bound alone; the kernel takes the largest of the three."""

    bytes: float
    tensor: float
    issue: float

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        """Returns the name of the bound that is the largest."""
        return self._fields[self.index(max(self))]

    def at(self, old: Ceilings, new: Ceilings) -> "KernelTime":
        """Returns the time of the same kernel under other ceilings.

        The share of the peak that a tensor instruction reaches (`Rates.mma`) stays the same. The
        issue time stays the same, because it depends on the clock and on no ceiling.
        """
        return KernelTime(
            self.bytes * old.bandwidth / new.bandwidth,
            self.tensor * old.tensor / new.tensor,
            self.issue,
        )


def occupancy(kernel: SassKernel, gpu: str) -> int:
    """Returns the number of blocks of a kernel that one multiprocessor holds at the same time.

    A warp's registers are allocated in steps of 256 from its scheduler's quarter. From sm_80 on, a
    block takes 1 KiB of shared memory in addition to its own. Source: NVIDIA's cuda_occupancy.h.
    """
    assert kernel.launch is not None
    limits, threads = read_gpu(gpu), kernel.launch.threads
    registers = 256 * math.ceil(kernel.registers * 32 / 256)
    warps = SCHEDULERS * (limits.registers_per_core // SCHEDULERS // registers)
    reserved = 1024 if limits.capability >= (8, 0) else 0
    return min(
        RATES[gpu].blocks,
        limits.threads_per_core // threads,
        warps // math.ceil(threads / 32),
        limits.shared_per_core // max(1, kernel.shared + reserved),
    )


def fused_time(kernel: SassKernel, gpu: str, flop: float, moved: int) -> KernelTime:
    """Models a kernel whose main loop multiplies.

    Args:
      kernel: kernel with a main loop of tensor instructions.
      gpu: a name in `RATES`.
      flop: floating-point operations of the whole grid, including the padding of tiles.
      moved: bytes moved.
    """
    assert kernel.launch is not None
    loop = kernel.main_loop()
    warps = kernel.launch.threads / 32
    per_turn = sum(mma_flop(i.name) for i in loop if classify(i.name) == "tensor") * warps
    turns = flop / kernel.launch.blocks / per_turn
    return _time(gpu, loop, kernel.launch.blocks, warps * turns, moved)


def straight_time(kernel: SassKernel, gpu: str, moved: int) -> KernelTime:
    """Models a kernel that runs each of its instructions once, such as an elementwise fusion."""
    assert kernel.launch is not None
    return _time(gpu, kernel.code, kernel.launch.blocks, kernel.launch.threads / 32, moved)


def product_time(gpu: str, m: int, k: int, n: int, moved: int) -> KernelTime:
    """Models a matrix product by a library at the data sheet's peak, rows padded to 16."""
    sheet = data_sheet(gpu)
    flop = 2 * math.ceil(m / 16) * 16 * k * n
    return KernelTime(moved / sheet.bandwidth, flop / sheet.tensor, 0.0)


def _time(
    gpu: str, code: Sequence[Instruction], blocks: int, repeats: float, moved: int
) -> KernelTime:
    limits, rates = read_gpu(gpu), RATES[gpu]
    clocks = pipe_clocks(code, rates)
    tensor = clocks.pop("tensor")
    # The multiprocessor with the most blocks decides; its warps are spread over the schedulers.
    each = math.ceil(blocks / limits.cores) * repeats / SCHEDULERS / rates.clock
    return KernelTime(moved / limits.bandwidth, tensor * each, max(clocks.values()) * each)


def pipe_clocks(code: Sequence[Instruction], rates: Rates) -> dict[str, float]:
    """Returns for how many clocks a warp's pass through `code` occupies each pipe.

    Source for the pipe of each instruction: Nsight Compute's documentation, "Pipelines". float32
    and integer products share a pipe; if it has 128 lanes, half of them take only float32.
    """
    clocks: dict[str, float] = collections.defaultdict(float)
    for i in code:
        kind = classify(i.name)
        clocks["issue"] += 1
        if kind == "tensor":
            share = rates.mma if i.name.startswith("HMMA") else 1.0
            clocks["tensor"] += mma_flop(i.name) / (rates.tensor * share / SCHEDULERS)
        elif kind == "integer":
            clocks["integer"] += _clocks(INTEGER_LANES)
        elif kind == "convert":
            clocks["convert"] += _clocks(CONVERT_LANES)
        elif kind in ("float32", "multiply"):
            clocks["float32"] += _clocks(rates.float32)
            if kind == "multiply":
                clocks["multiply"] += _clocks(INTEGER_LANES)
        elif kind == "float16":
            clocks["float16"] += _clocks(rates.bfloat16 if "BF16" in i.name else rates.float16)
        elif kind in ("shared", "global", "local"):
            clocks["memory"] += _passes(i.name) * SCHEDULERS
    return {**clocks, "tensor": clocks["tensor"]}


def _clocks(lanes: int) -> float:
    return 32 / (lanes / SCHEDULERS)


def _passes(name: str) -> int:
    if name.startswith("U"):
        return 0  # the engine that copies tiles does this
    return max((WAVEFRONT.get(part, 1) for part in name.split(".")[1:]), default=1)

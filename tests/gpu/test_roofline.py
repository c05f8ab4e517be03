"""Checks the time model against sums by hand, and its rates against NVIDIA's data sheets."""

import pytest

from qlora_jax.gpu import roofline
from qlora_jax.gpu.described import GPUS, description, read_gpu
from qlora_jax.gpu.roofline import RATES, KernelTime, pipe_clocks
from qlora_jax.gpu.sass import Instruction, Launch, SassKernel

PEAK_TFLOPS = {
    "t4": 65,
    "a100": 312,
    "a6000": 154.8,
    "rtx4090": 165.2,
    "h100": 989.4,
    "b200": 2250,
}
"""Peak of dense 16-bit products with float32 sums, from NVIDIA's data sheets and white papers."""


@pytest.mark.parametrize("gpu", GPUS)
def test_rates_give_the_data_sheets_peak(gpu: str) -> None:
    rates = RATES[gpu]
    peak = rates.tensor * rates.clock * read_gpu(gpu).cores / 1e12
    assert peak == pytest.approx(PEAK_TFLOPS[gpu], rel=0.01)
    assert rates.clock / 1e9 == pytest.approx(_described_clock(gpu), rel=0.08)


def _described_clock(gpu: str) -> float:
    return float(description(gpu).split("clock_rate_ghz: ")[1].split()[0])


def kernel(registers: int, shared: int, threads: int, code=(), blocks: int = 1) -> SassKernel:
    return SassKernel("k", "sm_80", registers, 0, 0, Launch(blocks, threads, shared), tuple(code))


@pytest.mark.parametrize(
    ("gpu", "registers", "shared", "threads", "blocks"),
    [
        # The blocks are from CUDA's occupancy calculator; the comment names the limit.
        ("a100", 168, 29696, 128, 3),  # registers: 65536 // (4 warps x 21 x 256)
        ("a100", 32, 0, 128, 16),  # threads: 2048 // 128
        ("a100", 32, 0, 32, 32),  # blocks
        ("a6000", 32, 0, 32, 16),
        ("rtx4090", 32, 49152, 128, 2),  # shared memory: 102400 // (49152 + 1024)
        ("t4", 255, 0, 256, 1),
    ],
)
def test_occupancy(gpu: str, registers: int, shared: int, threads: int, blocks: int) -> None:
    assert roofline.occupancy(kernel(registers, shared, threads), gpu) == blocks


LOOP = (
    Instruction("LDSM.16.M88.4", "R0, [R1]", labels=(".L",)),
    *[Instruction("LOP3.LUT", "R2, R3, R4")] * 4,
    *[Instruction("HMUL2.BF16_V2", "R2, R3, R4")] * 2,
    Instruction("IMAD", "R2, R3, R4"),
    Instruction("HMMA.16816.F32.BF16", "R4, R8, R12, R4"),
    Instruction("BRA", "`(.L)", conditional=True),
    Instruction("EXIT", ""),
)


def test_clocks_of_each_unit() -> None:
    a100 = pipe_clocks(LOOP[:-1], RATES["a100"])
    assert a100 == {
        "tensor": 4096 / (2048 / 4),  # 8 clocks per HMMA and scheduler
        "issue": 10,
        "integer": 4 * 2,
        "float32": 2,  # 64 lanes; IMAD uses them, too
        "multiply": 2,
        "float16": 2 * 2,
        "memory": 4 * 4,  # four passes; four schedulers share one unit
    }
    h100 = pipe_clocks(LOOP[:-1], RATES["h100"])
    assert h100["tensor"] == pytest.approx(4096 / (4096 * 0.63 / 4))
    assert (h100["float16"], h100["float32"]) == (2, 1)


def test_time_of_a_kernel_by_hand() -> None:
    # One of 108 multiprocessors has two of the 109 blocks, so the time equals that of 216.
    turns, warps, blocks = 64, 4, 109
    flop = turns * warps * blocks * 4096
    time = roofline.fused_time(kernel(64, 0, 128, LOOP, blocks), "a100", flop, 2_039_040)
    each = 2 * warps * turns / 4 / 1.41e9
    assert time.bytes == pytest.approx(1e-6)
    assert time.tensor == pytest.approx(8 * each)
    assert time.issue == pytest.approx(16 * each)
    assert (time.seconds, time.bound) == (time.issue, "issue")


def test_time_of_a_kernel_without_loop() -> None:
    code = [Instruction("LOP3.LUT", "R2, R3, R4")] * 50
    time = roofline.straight_time(kernel(64, 0, 128, code, 108 * 3), "a100", 2_039_040)
    assert time == pytest.approx(KernelTime(1e-6, 0.0, 100 * 3 / 1.41e9))


def test_time_of_a_library_product() -> None:
    time = roofline.product_time("a100", 2048, 4096, 4096, 0)
    assert time.tensor == pytest.approx(2 * 2048 * 4096 * 4096 / 312e12, rel=0.01)
    few = roofline.product_time("a100", 1, 4096, 4096, 1000)
    assert few.tensor == roofline.product_time("a100", 16, 4096, 4096, 0).tensor

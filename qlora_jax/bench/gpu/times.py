"""Times products: each kernel, decode + GEMM (`xla`), and a GEMM on a 16-bit weight."""

import functools
import itertools
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.bench import jax_timing, random_codes
from qlora_jax.bench.cases import CODEBOOK
from qlora_jax.bench.cases import OperationCase as Product
from qlora_jax.bench.gpu.lane import FULL, HANGS, REHEARSAL, PartContext
from qlora_jax.bench.gpu.products import PLAIN, interpreted, reason_to_skip
from qlora_jax.bench.gpu.programs import BenchProgram, compile_all, usable
from qlora_jax.bench.kernels import operation
from qlora_jax.kernels.target import capability_of, half_dtype
from qlora_jax.quant import quantize

GEMM = "gemm"
"""Implementation name for the product with an unquantized weight."""

ORDER = (("mosaic", PLAIN, GEMM), ("triton",))
"""Groups of implementations: all shapes are timed with the first group, then with the second."""

DIRECTIONS = ("forward", "backward")
MOST_SETS = 24
"""Largest number of input sets in turn; together they are larger than the level 2 cache."""


class Sizes(NamedTuple):
    """Rows, shapes of weights, and timed samples."""

    rows: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    samples: int


SIZES = {
    FULL: Sizes((1, 16, 512, 64, 2048, 4, 8192), ((4096, 11008), (4096, 4096), (8192, 28672)), 5),
    REHEARSAL: Sizes((1, 16), ((128, 192),), 2),
}
"""The most important rows and shapes come first, because time may run out."""


class TimeCase(NamedTuple):
    """One product and the implementation that computes it."""

    implementation: str
    direction: str
    rows: int
    k: int
    n: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.implementation} {self.direction} {self.k}x{self.n} M={self.rows}"

    @property
    def product(self) -> Product:
        return Product(self.direction, self.k, self.n, self.dtype, self.rows)


def cases(scale: str, dtype: str = "bfloat16") -> list[TimeCase]:
    """Returns all cases, the most important first."""
    size = SIZES[scale]
    return [
        TimeCase(name, direction, rows, k, n, dtype)
        for some, (k, n) in itertools.product(ORDER, size.shapes)
        for rows, direction, name in itertools.product(size.rows, DIRECTIONS, some)
    ]


def names(scale: str) -> list[str]:
    """Returns the names of the results."""
    return [case.name for case in cases(scale)]


def programs(scale: str, device: Any) -> Iterator[BenchProgram]:
    """Yields the program of every case that runs on the device."""
    dtype = half_dtype(capability_of(device))
    yield from (program(case) for case in cases(scale, dtype) if not _excuse(case, scale, device))


def program(case: TimeCase) -> BenchProgram:
    """Returns the program that times a case over several sets of inputs."""
    # With jit, the operation is traced once for all sets.
    once = jax.jit(operation(case.product, _implementation(case)))
    over = functools.partial(jax_timing.over_all, once)
    x = jax.ShapeDtypeStruct(case.product.operand_shape, case.dtype)
    sets = [(x, _weight(case))] * _sets(case)
    return BenchProgram(case.name, over, (jax.ShapeDtypeStruct((), jnp.int32), sets))


def run(lane: PartContext) -> None:
    """Compiles and times every case, shape by shape."""
    device = jax.devices()[0]
    dtype = half_dtype(capability_of(device))
    able = []
    for case in cases(lane.scale, dtype):
        if reason := _excuse(case, lane.scale, device):
            lane.record.absent(case.name, reason)
        elif case.name not in lane.told:
            able.append(case)
    with interpreted(lane):
        for _, group in itertools.groupby(able, lambda c: (c.k, c.n, c.implementation in ORDER[0])):
            _group(lane, list(group))


def _group(lane: PartContext, group: list[TimeCase]) -> None:
    """Times cases of one shape after compiling all, because XLA tunes on the device meanwhile."""
    made = list(compile_all(map(program, group), lambda: lane.left() > 10))
    weights: dict[bool, list[Any]] = {}
    for case, outcome in zip(group, made):
        if not lane.due(4, case.name):
            continue
        with lane.guard(case.name, within=HANGS):
            ready = usable(outcome)
            own = weights.setdefault(case.implementation == GEMM, [])
            own += [_made(case, i) for i in range(len(own), _sets(case))]
            measure(lane, case, ready, own)


def measure(lane: PartContext, case: TimeCase, program: Any, weights: list[Any]) -> None:
    """Times one compiled case and records it."""
    product, quantized = case.product, case.implementation != GEMM
    keys = jax.random.split(jax.random.key(case.rows), _sets(case))
    sets = [
        (jax.random.normal(key, product.operand_shape, case.dtype), w)
        for key, w in zip(keys, weights)
    ]
    seconds = jax_timing.program_seconds(program, sets, SIZES[lane.scale].samples)
    each = statistics.median(seconds)
    rates = {
        "GB/s": product.nbytes(quantized) / each / 1e9,
        "TFLOP/s": product.flop / each / 1e12,
    }
    samples = [1e6 * s for s in seconds]
    own = case._asdict() | rates
    lane.record.figure(case.name, "us", 1e6 * each, field="time", **own, samples=samples)


def _sets(case: TimeCase) -> int:
    return min(MOST_SETS, case.product.copies)


def _implementation(case: TimeCase) -> str | None:
    return None if case.implementation == GEMM else case.implementation


def _excuse(case: TimeCase, scale: str, device: Any) -> str:
    return "" if case.implementation == GEMM else reason_to_skip(case.implementation, scale, device)


def _weight(case: TimeCase) -> Any:
    shape = jax.ShapeDtypeStruct((case.k, case.n), jnp.float32)
    if case.implementation == GEMM:
        return jax.ShapeDtypeStruct(shape.shape, case.dtype)
    return jax.eval_shape(functools.partial(quantize, codebook=CODEBOOK), shape)


def _made(case: TimeCase, seed: int) -> Any:
    weight = _weight(case)
    if case.implementation != GEMM:
        return random_codes.quantized(weight, CODEBOOK, random_codes.OnDevice(np.uint32(seed)))
    return 0.02 * jax.random.normal(jax.random.key(seed), weight.shape, weight.dtype)

"""Measures the device's limits: memory bandwidth, matrix products, and copies to the host."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlora_jax.bench.gpu.lane import FULL, HANGS, REHEARSAL, PartContext
from qlora_jax.bench.gpu.programs import BenchProgram, compiled
from qlora_jax.kernels.target import capability_of, half_dtype

COPY = "copy"
TO_HOST, FROM_HOST, DISPATCH = "to pinned host memory", "from pinned host memory", "dispatch"


class Sizes(NamedTuple):
    """Sizes of the measurements: words copied, side of the square products, repetitions."""

    words: int
    side: int
    repeat: int


SIZES = {FULL: Sizes(2**30, 8192, 20), REHEARSAL: Sizes(2**16, 64, 2)}


def names(scale: str) -> list[str]:
    """Returns the names of the results."""
    return [COPY, TO_HOST, FROM_HOST, DISPATCH, "matmul"]


def programs(scale: str, device: Any) -> Iterator[BenchProgram]:
    """Yields the programs that `run` measures."""
    sizes = SIZES[scale]
    words = jax.ShapeDtypeStruct((sizes.words,), jnp.uint32)
    yield BenchProgram(COPY, lambda x: x ^ jnp.uint32(1), (words,))
    square = jax.ShapeDtypeStruct((sizes.side, sizes.side), half_dtype(capability_of(device)))
    yield BenchProgram("matmul", lambda a, b: a @ b, (square, square))


def run(lane: PartContext) -> None:
    """Measures and records the results of `names`."""
    device, sizes = jax.devices()[0], SIZES[lane.scale]
    copy, product = programs(lane.scale, device)
    for own, measure in (
        ([COPY], lambda: _copy(lane, copy, sizes)),
        (["matmul"], lambda: _matmul(lane, product, sizes)),
        ([TO_HOST, FROM_HOST], lambda: _host(lane, device, sizes)),
        ([DISPATCH], lambda: _dispatch(lane, sizes)),
    ):
        if lane.due(2, *own):
            with lane.guard(*own, within=HANGS):
                measure()


def median_seconds(call: Callable[[], Any], count: int) -> float:
    """Returns the median of the seconds from a call until its result is ready."""
    jax.block_until_ready(call())
    times = []
    for _ in range(count):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _copy(lane: PartContext, copy: BenchProgram, sizes: Sizes) -> None:
    x = jnp.zeros((sizes.words,), jnp.uint32)
    seconds = median_seconds(functools.partial(compiled(copy), x), sizes.repeat)
    lane.record.figure(COPY, "GB/s", 8 * sizes.words / seconds / 1e9)  # 4 bytes read, 4 written


def _matmul(lane: PartContext, product: BenchProgram, sizes: Sizes) -> None:
    square = product.arguments[0]
    a = jax.random.normal(jax.random.key(0), square.shape, square.dtype)
    seconds = median_seconds(functools.partial(compiled(product), a, a), sizes.repeat)
    rate = 2 * sizes.side**3 / seconds / 1e12
    lane.record.figure("matmul", "TFLOP/s", rate, field=f"matmul {square.dtype.name}")


def _dispatch(lane: PartContext, sizes: Sizes) -> None:
    one, zero = jax.jit(lambda x: x + 1), jnp.int32(0)
    seconds = median_seconds(lambda: one(zero), 10 * sizes.repeat)
    lane.record.figure(DISPATCH, "us", 1e6 * seconds)


def _host(lane: PartContext, device: Any, sizes: Sizes) -> None:
    place = jax.sharding.SingleDeviceSharding(device)
    pinned = place.with_memory_kind("pinned_host")
    x = jnp.zeros((sizes.side, sizes.side), jnp.bfloat16)
    away = jax.block_until_ready(jax.device_put(x, pinned))
    for name, array, to in ((TO_HOST, x, pinned), (FROM_HOST, away, place)):
        seconds = median_seconds(functools.partial(jax.device_put, array, to), sizes.repeat)
        lane.record.figure(name, "GB/s", x.nbytes / seconds / 1e9)

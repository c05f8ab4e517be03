"""Checks each kernel on new inputs against float64, over a pairwise cover of cases."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.bench import random_codes
from qlora_jax.bench.gpu import reference
from qlora_jax.bench.gpu.cover import pairwise
from qlora_jax.bench.gpu.lane import FULL, HANGS, REHEARSAL, PartContext
from qlora_jax.bench.gpu.programs import BenchProgram, compile_all, usable
from qlora_jax.kernels import matmul, select, triton
from qlora_jax.kernels.select import FUSED
from qlora_jax.kernels.target import capability_of
from qlora_jax.quant import CODEBOOKS, quantize

MOST = 150
"""Largest number of programs."""

OUTPUTS = 4096
"""Least number of elements compared for each case; small products are repeated."""

TILE = 16
"""Rows of the smallest tile of a kernel."""

PLAIN = "xla"
IMPLEMENTATIONS = (*FUSED, PLAIN)

COMMON: Mapping[str, Sequence[Any]] = {
    "direction": ("forward", "backward"),
    "double_quant": (True, False),
}
FACTORS: Mapping[str, Mapping[str, Sequence[Any]]] = {
    FULL: {
        **COMMON,
        "rows": (1, 3, 16, 33, 64, 512, 2049),
        "shape": ((1000, 712), (4096, 4096), (576, 1536), (1408, 2752)),
        "codebook": ("nf4", *sorted(set(CODEBOOKS) - {"nf4"})),
        "block_size": (64, 32, 256, 4096),
    },
    REHEARSAL: {
        **COMMON,
        "rows": (1, 3, 16, 33),
        "shape": ((256, 128), (136, 72)),
        "codebook": ("nf4", "fp4_bnb"),
        "block_size": (64, 32),
    },
}
FEWER: Mapping[str, Mapping[str, Sequence[Any]]] = {
    FULL: {"rows": (1, 33, 512)},
    REHEARSAL: {"rows": (1, 33)},
}
"""Factors that `PLAIN` has instead, because it is no kernel of ours."""

LARGE = {FULL: (4096, 11008), REHEARSAL: (128, 344)}
"""Shape of additional cases of each kernel; the full-scale shape is one of a 7B model."""

LARGE_ROWS = (1, 16, 512)
DTYPES = {name: fused.dtypes for name, fused in FUSED.items()} | {PLAIN: ("bfloat16", "float16")}


class ProductCase(NamedTuple):
    """One product: x [rows, K] @ W (forward) or g [rows, N] @ W.T (backward), W of `shape`."""

    implementation: str
    direction: str
    dtype: str
    rows: int
    shape: tuple[int, int]
    codebook: str
    block_size: int
    double_quant: bool

    @property
    def name(self) -> str:
        k, n = self.shape
        scales = "double" if self.double_quant else "plain"
        return (
            f"{self.implementation} {self.direction} {self.dtype} M={self.rows} {k}x{n} "
            f"{self.codebook} block {self.block_size} {scales}"
        )

    @property
    def operand(self) -> tuple[int, int]:
        return self.rows, self.shape[0 if self.direction == "forward" else 1]

    @property
    def outputs(self) -> int:
        return self.rows * self.shape[1 if self.direction == "forward" else 0]


def cases(scale: str, implementation: str) -> list[ProductCase]:
    """Returns a pairwise cover of cases; for a kernel, cases of a large shape come first."""
    factors = {**FACTORS[scale], "dtype": DTYPES[implementation]}
    if implementation == PLAIN:
        return [ProductCase(PLAIN, **case) for case in pairwise({**factors, **FEWER[scale]})]
    large = [
        ProductCase(implementation, direction, "bfloat16", rows, LARGE[scale], "nf4", 64, True)
        for rows in LARGE_ROWS
        for direction in factors["direction"]
    ]
    return large + [ProductCase(implementation, **case) for case in pairwise(factors)]


def names(scale: str) -> list[str]:
    """Returns the names of the results, one for each case."""
    return [case.name for name in IMPLEMENTATIONS for case in cases(scale, name)]


def programs(scale: str, device: Any) -> Iterator[BenchProgram]:
    """Yields the program of every case that runs on the device."""
    for implementation in IMPLEMENTATIONS:
        if not reason_to_skip(implementation, scale, device):
            yield from (program(case) for case in cases(scale, implementation))


def reason_to_skip(implementation: str, scale: str, device: Any) -> str:
    """Returns the reason why an implementation is not run on the device; empty if it is run.

    A rehearsal runs Triton's kernels in Pallas' interpreter.
    """
    if implementation == PLAIN or (scale == REHEARSAL and implementation == "triton"):
        return ""
    if implementation in select.usable(capability_of(device), FUSED[implementation].dtypes[0]):
        return ""
    return f"{implementation} needs {FUSED[implementation]}"


def program(case: ProductCase) -> BenchProgram:
    """Returns the product of one case."""
    dtype = jnp.dtype(case.dtype)
    product = one_product(case.implementation, case.direction, case.shape[0])
    return BenchProgram(
        case.name, product, (jax.ShapeDtypeStruct(case.operand, dtype), weight(case))
    )


def one_product(implementation: str, direction: str, k: int) -> Callable[..., jax.Array]:
    """Returns the function (x, q) -> x @ W, or its gradient by JAX: (g, q) -> g @ W.T."""

    def forward(x: jax.Array, q: Any) -> jax.Array:
        return matmul(x, q, implementation)

    def backward(g: jax.Array, q: Any) -> jax.Array:
        x = jnp.zeros((*g.shape[:-1], k), g.dtype)
        return jax.vjp(lambda x: forward(x, q), x)[1](g)[0]

    return forward if direction == "forward" else backward


def weight(case: ProductCase) -> Any:
    """Returns a case's QTensor with shapes for arrays."""
    return _weight(case.shape, case.block_size, case.double_quant)


@functools.cache
def _weight(shape: tuple[int, int], block_size: int, double_quant: bool) -> Any:
    make = functools.partial(quantize, block_size=block_size, double_quant=double_quant)
    return jax.eval_shape(make, jax.ShapeDtypeStruct(shape, jnp.float32))


@contextlib.contextmanager
def interpreted(lane: PartContext) -> Iterator[None]:
    """Runs Triton's kernels in an interpreter inside the `with`, if the lane rehearses."""
    before, triton.INTERPRET = triton.INTERPRET, lane.rehearsing
    try:
        yield
    finally:
        triton.INTERPRET = before


def run(lane: PartContext) -> None:
    """Compiles and checks every case, with new inputs in each run."""
    device, seed = jax.devices()[0], time.time_ns() % 2**31
    lane.record.fact("seed of the products", seed)
    with interpreted(lane):
        for implementation in IMPLEMENTATIONS:
            chosen = [c for c in cases(lane.scale, implementation) if c.name not in lane.told]
            if reason := reason_to_skip(implementation, lane.scale, device):
                for case in chosen:
                    lane.record.absent(case.name, reason)
                continue
            made = compile_all(map(program, chosen), lambda: lane.left() > 5)
            for i, (case, outcome) in enumerate(zip(chosen, made)):
                if not lane.due(3, case.name):
                    continue
                with lane.guard(case.name, within=HANGS):
                    verdict, same = check(case, usable(outcome), seed + i)
                    right = verdict.right and same
                    lane.record.check(case.name, right, **verdict.measures, repeats=same)


def check(
    case: ProductCase, product: Callable[..., jax.Array], seed: int
) -> tuple[reference.ErrorVerdict, bool]:
    """Runs a compiled case on new inputs and compares the results with float64.

    Returns:
      The verdict on all inputs together, and whether a second run gave the same bits.
    """
    # Draw on the host: a device program per shape would take longer to compile than to run.
    source, same, lefts, results = np.random.default_rng(seed), True, [], []
    q = random_codes.quantized(weight(case), case.codebook, random_codes.OnHost(source))
    exact = reference.decoded(q)
    for _ in range(max(1, -(-OUTPUTS // case.outputs))):
        drawn = source.standard_normal(case.operand, np.float32).astype(jnp.dtype(case.dtype))
        x = jax.device_put(drawn)
        for rows in (case.rows, -(-case.rows // TILE) * TILE):  # a kernel may pad its result
            poison((rows, case.outputs // case.rows), case.dtype)
        y, again = (np.asarray(product(x, q)) for _ in range(2))
        same &= y.tobytes() == again.tobytes()
        lefts.append(drawn)
        results.append(y)
    exact = exact if case.direction == "forward" else exact.T
    return reference.judge(np.concatenate(results), np.concatenate(lefts), exact, seed), same


def poison(shape: tuple[int, ...], dtype: str) -> None:
    """Writes NaN to the memory that the next array of this shape gets."""
    jax.block_until_ready(jax.device_put(np.full(shape, np.nan, jnp.dtype(dtype)))).delete()

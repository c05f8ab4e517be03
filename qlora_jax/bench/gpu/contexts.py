"""Checks kernels in contexts that JAX and XLA make: scan, remat, vmap, CUDA graphs.

Every context (corner) computes the same function with an implementation in 16 bits, with decoded
weights and 16-bit GEMMs, and in float32. The implementation is right if its error is at most twice
the error of the GEMMs.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.bench import random_codes
from qlora_jax.bench.gpu import products, reference
from qlora_jax.bench.gpu.lane import FULL, HANGS, REHEARSAL, PartContext
from qlora_jax.bench.gpu.products import PLAIN, interpreted, reason_to_skip
from qlora_jax.bench.gpu.programs import (
    BenchProgram,
    CompiledOrError,
    compile_all,
    compiled,
    usable,
)
from qlora_jax.kernels import matmul
from qlora_jax.kernels.select import FUSED
from qlora_jax.quant import QLayer, quantize

CALLS = 3
"""Runs of each program, each on new buffers; the second and third may replay a CUDA graph."""

GRAPHS = {"xla_gpu_graph_min_graph_size": 1}
"""XLA's option that puts every command that can be in a CUDA graph into one."""

SHARE = 0.125
"""Each layer adds this share of its product to its input. A larger share amplifies rounding errors
from layer to layer, until two right results differ as much as a right and a wrong one."""

CODEBOOK, DTYPE = "nf4", jnp.bfloat16
BEYOND = (80_000, 1024, 28_672)
"""Rows, K and N of a result of more than 2^31 elements."""

LAST = 64
"""Number of that result's last rows that are compared."""


class Sizes(NamedTuple):
    """Layers of a stack, features, and rows of the corners."""

    layers: int
    features: int
    rows: tuple[int, ...]


SIZES = {FULL: Sizes(6, 2048, (1, 40, 300)), REHEARSAL: Sizes(3, 128, (1, 20))}


def scanned(x: jax.Array, stack: Any, implementation: str) -> jax.Array:
    """Returns the gradient in x of a scan over a stack of weights, each layer recomputed."""
    return _gradient(x, stack, lambda q: q, implementation)


def scanned_places(x: jax.Array, stack: Any, implementation: str) -> jax.Array:
    """Returns the same gradient from a scan over the layers' indices, as in a model."""
    places = jnp.arange(jax.tree.leaves(stack)[0].shape[0])
    return _gradient(x, places, functools.partial(QLayer, stack), implementation)


def _gradient(
    x: jax.Array, scanned: Any, weight: Callable[[Any], Any], implementation: str
) -> jax.Array:
    @jax.checkpoint
    def layer(x: jax.Array, one: Any) -> tuple[jax.Array, None]:
        y = matmul(x, weight(one), implementation)
        return (x + SHARE * jnp.tanh(y)).astype(x.dtype), None

    def total(x: jax.Array) -> jax.Array:
        # Random signs: without them, the rounded codebook's mean error adds up over the columns.
        signs = jax.random.rademacher(jax.random.key(0), x.shape, jnp.float32)
        return (jax.lax.scan(layer, x, scanned)[0] * signs).sum()

    return jax.grad(total)(x)


def chained(x: jax.Array, stack: Any, implementation: str) -> jax.Array:
    """Returns a chain of products with the weights of a stack."""
    for i in range(jax.tree.leaves(stack)[0].shape[0]):
        q = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        x = (x + SHARE * jnp.tanh(matmul(x, q, implementation))).astype(x.dtype)
    return x


def mapped_rows(x: jax.Array, stack: Any, implementation: str) -> jax.Array:
    """Returns products of a batch of rows with one weight, under vmap."""
    q = jax.tree.map(lambda leaf: leaf[0], stack)
    return jax.vmap(lambda row: matmul(row[None], q, implementation)[0])(x)


def mapped_weights(x: jax.Array, stack: Any, implementation: str) -> jax.Array:
    """Returns products of the same rows with each weight of a stack, under vmap."""
    return jax.vmap(lambda q: matmul(x, q, implementation))(stack)


CORNERS: dict[str, tuple[Callable[..., jax.Array], dict[str, Any]]] = {
    "gradient of a recomputed scan": (scanned, {}),
    "gradient of a recomputed scan over places": (scanned_places, {}),
    "chain in CUDA graphs": (chained, GRAPHS),
    "vmap over rows": (mapped_rows, {}),
    "vmap over weights": (mapped_weights, {}),
}
"""Name to function and XLA's options."""


EXACT = "float32"
"""Implementation name for decoded weights and products in float32."""


class KernelContext(NamedTuple):
    """One context of products, with one implementation and one number of rows."""

    implementation: str
    what: str
    rows: int

    @property
    def name(self) -> str:
        return f"{self.implementation} {self.what} M={self.rows}"


def corners(scale: str) -> list[KernelContext]:
    """Returns all corners except the one beyond 2^31 elements."""
    return [
        KernelContext(implementation, what, rows)
        for implementation in FUSED
        for what in CORNERS
        for rows in SIZES[scale].rows
    ]


def names(scale: str) -> list[str]:
    """Returns the names of the results."""
    return [corner.name for corner in corners(scale)] + [_beyond_name(name) for name in FUSED]


def programs(scale: str, device: Any) -> Iterator[BenchProgram]:
    """Yields the programs of each corner that runs on the device, and the compared programs."""
    able = [name for name in FUSED if not reason_to_skip(name, scale, device)]
    for corner in corners(scale):
        if corner.implementation in able:
            yield program(corner, scale)
    for what, rows in itertools.product(CORNERS, SIZES[scale].rows) if able else ():
        yield from (program(KernelContext(name, what, rows), scale) for name in (PLAIN, EXACT))
    if scale == FULL:
        yield from map(_beyond, able)


def program(corner: KernelContext, scale: str) -> BenchProgram:
    """Returns the program of a corner."""
    function, options = CORNERS[corner.what]
    exact = corner.implementation == EXACT
    dtype = jnp.float32 if exact else DTYPE

    def run(x: jax.Array, stack: Any) -> jax.Array:
        with jax.default_matmul_precision("highest" if exact else "default"):
            return function(x, stack, PLAIN if exact else corner.implementation)

    x = jax.ShapeDtypeStruct((corner.rows, SIZES[scale].features), dtype)
    return BenchProgram(corner.name, run, (x, _stack(scale)), options)


def run(lane: PartContext) -> None:
    """Compiles and checks every corner."""
    device = jax.devices()[0]
    with interpreted(lane):
        left_out = {*map(_beyond_name, FUSED), *lane.told}
        asked = [p for p in programs(lane.scale, device) if p.name not in left_out]
        made = dict(zip((p.name for p in asked), compile_all(asked, lambda: lane.left() > 5)))
        for corner in corners(lane.scale):
            if reason := reason_to_skip(corner.implementation, lane.scale, device):
                lane.record.absent(corner.name, reason)
            elif lane.due(3, corner.name):
                with lane.guard(corner.name, within=HANGS):
                    verdict = check(corner, lane.scale, made)
                    lane.record.check(corner.name, verdict.right, **verdict.measures)
        for implementation in FUSED:
            _check_beyond(lane, implementation, device)


def check(
    corner: KernelContext, scale: str, made: Mapping[str, CompiledOrError]
) -> reference.ErrorVerdict:
    """Returns the worst verdict of `CALLS` runs on new inputs.

    Args:
      corner: corner with a fused implementation.
      scale: scale of the sizes.
      made: name to the compiled program, or to the error of its compilation.
    """
    ours, theirs, exact = (
        usable(made[corner._replace(implementation=name).name])
        for name in (corner.implementation, PLAIN, EXACT)
    )
    verdicts, size = [], SIZES[scale]
    for i in range(CALLS):
        source = random_codes.OnDevice(np.uint32(i))
        stack = random_codes.quantized(_stack(scale), CODEBOOK, source)
        x = jax.random.normal(jax.random.key(i), (corner.rows, size.features)).astype(DTYPE)
        wide = exact(x.astype(jnp.float32), stack)
        verdicts.append(reference.agree(ours(x, stack), theirs(x, stack), wide))
    return max(verdicts, key=lambda verdict: (not verdict.right, verdict.mean))


def _stack(scale: str) -> Any:
    layers, features, _ = SIZES[scale]
    weights = jax.ShapeDtypeStruct((layers, features, features), jnp.float32)
    return jax.eval_shape(functools.partial(quantize, codebook=CODEBOOK), weights)


def _beyond_name(implementation: str) -> str:
    return f"{implementation} result of more than 2^31 elements"


def _beyond(implementation: str) -> BenchProgram:
    rows, k, n = BEYOND
    product = products.one_product(implementation, "forward", k)
    q = jax.eval_shape(quantize, jax.ShapeDtypeStruct((k, n), jnp.float32))
    x = jax.ShapeDtypeStruct((rows, k), DTYPE)
    return BenchProgram(_beyond_name(implementation), product, (x, q))


def _check_beyond(lane: PartContext, implementation: str, device: Any) -> None:
    name, (rows, k, n) = _beyond_name(implementation), BEYOND
    reason = reason_to_skip(implementation, lane.scale, device)
    if lane.rehearsing or reason:
        lane.record.absent(name, reason or "takes 5 GB and minutes on a CPU")
        return
    room = (device.memory_stats() or {}).get("bytes_limit", 0)
    if room < 3 * rows * n * 2:
        lane.record.absent(name, f"takes {3 * rows * n * 2 / 2**30:.0f} GiB")
        return
    if not lane.due(10, name):
        return
    with lane.guard(name, within=2 * HANGS):
        made = _beyond(implementation)
        source = random_codes.OnDevice(np.uint32(7))
        q = random_codes.quantized(made.arguments[1], CODEBOOK, source)
        x = jax.random.normal(jax.random.key(8), (rows, k)).astype(DTYPE)
        y = compiled(made)(x, q)
        verdict = reference.judge(
            np.asarray(y[-LAST:]), np.asarray(x[-LAST:]), reference.decoded(q), 9
        )
        lane.record.check(name, verdict.right, **verdict.measures)

"""Our quantizer, decoder and products, timed case by case.

Beside what `matmul` picks stand, as variants, every implementation where the device has several
(`xla` is dequantize-then-GEMM) and the product with a weight that was never quantized.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.bench import measure
from qlora_jax.bench.cases import BLOCK_SIZE, CODEBOOK, OperationCase, case_figure, cases, settle
from qlora_jax.bench.jax_timing import Inputs, copies, drawn, seconds
from qlora_jax.bench.measure import Figure, Neighbours
from qlora_jax.bench.options import KernelOptions, to_tree
from qlora_jax.bench.worker import OURS
from qlora_jax.kernels import IMPLEMENTATIONS, dense, matmul
from qlora_jax.quant import QTensor, dequantize, quantize
from qlora_jax.runtime.device import describe_devices, warn_if_gpu_idle
from qlora_jax.runtime.errors import UserError, first_line
from qlora_jax.runtime.manifest import git_state

PICKED = ""
UNQUANTIZED = "never quantized"


def run(options: KernelOptions) -> dict[str, Any]:
    """Times every case of `cases.cases`.

    Raises:
      UserError: the options ask for a device that jax does not run on.
    """
    backend = jax.default_backend()
    if options.device not in ("", backend):
        raise UserError(f"--device {options.device}: jax runs on {backend} here; leave it out")
    options = settle(options, backend)
    figures: dict[str, dict[str, Figure]] = {}
    notes = dict.fromkeys(filter(None, [warn_if_gpu_idle()]))
    with Neighbours() as neighbours:
        for case in cases(options):
            for variant in variants(case, backend):
                try:
                    time = median_time(case, variant, options.samples)
                except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as e:
                    if variant == PICKED:
                        raise
                    notes[f"{variant}, {case.dtype}: not here ({first_line(e)})"] = None
                else:
                    figures.setdefault(variant, {})[case.name] = time
    return measure.report(
        OURS,
        ["jax", "jaxlib"],
        to_tree(options),
        figures.pop(PICKED),
        variants=figures,
        notes=list(notes),
        others_cores=neighbours.cores,
        device=str(describe_devices()),
        git=git_state(),
    )


def variants(case: OperationCase, backend: str) -> Iterator[str]:
    """What else is timed on a case, after what a user gets."""
    yield PICKED
    if case.rows:
        if backend == "gpu":
            yield from IMPLEMENTATIONS
        yield UNQUANTIZED


def median_time(case: OperationCase, variant: str, samples: int) -> Figure:
    """Milliseconds of one call, as `cases.case_figure` has them.

    Args:
      case: the operation.
      variant: PICKED, UNQUANTIZED or an implementation.
      samples: how many to take; see `jax_timing.seconds`.
    """
    implementation = None if variant in (PICKED, UNQUANTIZED) else variant
    quantized = variant != UNQUANTIZED
    sets = copies(arguments(case, quantized), case.copies)
    # the quantizer is timed with the check that it makes outside of its program
    jit = case.operation != "quantize"
    times = seconds(operation(case, implementation), sets, samples, jit)
    return case_figure(case, times, quantized)


def operation(case: OperationCase, implementation: str | None) -> Callable[..., Any]:
    """The function of one case; of (w), (q) or (x or g, weight)."""
    dtype = jnp.dtype(case.dtype)
    if case.operation == "quantize":
        return functools.partial(
            quantize, codebook=CODEBOOK, block_size=BLOCK_SIZE, double_quant=case.double
        )
    if case.operation == "dequantize":
        return functools.partial(dequantize, dtype=dtype)

    def product(x: jax.Array, w: QTensor | jax.Array) -> jax.Array:
        return matmul(x, w, implementation) if isinstance(w, QTensor) else dense(x, w)

    if case.operation == "forward":
        return product

    def backward(g: jax.Array, w: QTensor | jax.Array) -> jax.Array:
        # x is no part of its own gradient: its product falls away
        x = jnp.zeros((*g.shape[:-1], case.k), dtype)
        return jax.vjp(lambda x: product(x, w), x)[1](g)[0]

    return backward


def arguments(case: OperationCase, quantized: bool = True) -> Inputs:
    """What `operation` takes; the weight in 4 bits or, for a product, in floats."""
    w, x = drawn(case)
    if case.operation == "quantize":
        return (w,)
    weight = quantize(w, CODEBOOK, BLOCK_SIZE, case.double) if quantized else w.astype(case.dtype)
    return (x.astype(case.dtype), weight) if case.rows else (weight,)

"""Times our quantizer, our decoder and our products with 4-bit weights, case by case.

A product is timed with the implementation that `matmul` picks. The report's variants are the
product with an unquantized weight and, on a GPU, every implementation (`xla` is
dequantize-then-GEMM).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.bench import measure
from qlora_jax.bench.cases import BLOCK_SIZE, CODEBOOK, OperationCase, case_figure, cases, settle
from qlora_jax.bench.jax_timing import Inputs, copies, drawn, seconds
from qlora_jax.bench.measure import Figure, OtherProcesses
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
      UserError: the options name a device that jax does not run on.
    """
    backend = jax.default_backend()
    if options.device not in ("", backend):
        raise UserError(f"--device {options.device}: jax runs on {backend} here; leave it out")
    options = settle(options, backend)
    figures: dict[str, dict[str, Figure]] = {}
    notes = dict.fromkeys(filter(None, [warn_if_gpu_idle()]))
    with OtherProcesses() as neighbours:
        for case in cases(options):
            for variant in variants(case, backend):
                try:
                    time = median_time(case, variant, options.samples)
                except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as e:
                    if variant == PICKED:
                        raise
                    notes[f"{variant}, {case.dtype}: cannot run ({first_line(e)})"] = None
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
    """Yields the variants of a case; the first is the implementation that `matmul` picks."""
    yield PICKED
    if case.rows:
        if backend == "gpu":
            yield from IMPLEMENTATIONS
        yield UNQUANTIZED


def median_time(case: OperationCase, variant: str, samples: int) -> Figure:
    """Returns the median time of one call in ms, with the entries of `cases.case_figure`.

    Args:
      case: operation to time.
      variant: PICKED, UNQUANTIZED or the name of an implementation.
      samples: number of samples; see `jax_timing.seconds`.
    """
    implementation = None if variant in (PICKED, UNQUANTIZED) else variant
    quantized = variant != UNQUANTIZED
    sets = copies(arguments(case, quantized), case.copies)
    # `quantize` checks its input outside of its compiled program; time that check too.
    jit = case.operation != "quantize"
    times = seconds(operation(case, implementation), sets, samples, jit)
    return case_figure(case, times, quantized)


def operation(case: OperationCase, implementation: str | None) -> Callable[..., Any]:
    """Returns the function of one case; its arguments are (w), (q) or (x or g, weight)."""
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
        # The gradient in x does not depend on x, so XLA removes the forward product.
        x = jnp.zeros((*g.shape[:-1], case.k), dtype)
        return jax.vjp(lambda x: product(x, w), x)[1](g)[0]

    return backward


def arguments(case: OperationCase, quantized: bool = True) -> Inputs:
    """Returns the arguments of `operation`; a product's weight is in 4 bits if `quantized`."""
    w, x = drawn(case)
    if case.operation == "quantize":
        return (w,)
    weight = quantize(w, CODEBOOK, BLOCK_SIZE, case.double) if quantized else w.astype(case.dtype)
    return (x.astype(case.dtype), weight) if case.rows else (weight,)

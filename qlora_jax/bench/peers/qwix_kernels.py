"""Times qwix's quantizer, decoder and products on the same cases as ours."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import qwix

from qlora_jax.bench import measure
from qlora_jax.bench.cases import BLOCK_SIZE, CODEBOOK, OperationCase, case_figure, cases
from qlora_jax.bench.jax_timing import Inputs, copies, drawn, seconds
from qlora_jax.bench.options import KernelOptions, to_tree
from qlora_jax.runtime.errors import UserError

NOTES = (
    "qwix has no double quantization: its products read scales in the product's dtype, ours in 8 "
    "bits",
    "qwix takes a byte per 4-bit weight",
)


def run(options: KernelOptions) -> dict[str, Any]:
    """Times the products, and the other cases without double quantization.

    Raises:
      UserError: the peer's jax runs on another device than our jax.
    """
    if jax.default_backend() != options.device:
        raise UserError(
            f"--peer: its jax runs on {jax.default_backend()}, ours on {options.device}; give an "
            "interpreter whose jax runs on the same device"
        )
    figures = {}
    with measure.OtherProcesses() as neighbours:
        for case in cases(options):
            if case.double and not case.rows:
                continue
            sets = copies(arguments(case), case.copies)
            times = seconds(operation(case), sets, options.samples)
            figures[case.name] = case_figure(case, times)
    return measure.report(
        "qwix",
        ["qwix", "jax", "jaxlib"],
        to_tree(options),
        figures,
        notes=list(NOTES),
        others_cores=neighbours.cores,
    )


def operation(case: OperationCase) -> Callable[..., Any]:
    """Returns the function of one case; its arguments are (w), (q) or (x or g, q)."""
    dtype = jnp.dtype(case.dtype)
    if case.operation == "quantize":
        return quantized
    if case.operation == "dequantize":
        return qwix.dequantize

    def product(x: jax.Array, q: qwix.QArray) -> jax.Array:
        return qwix.dot_general(x, q, (((1,), (0,)), ((), ()))).astype(dtype)

    if case.operation == "forward":
        return product

    def backward(g: jax.Array, q: qwix.QArray) -> jax.Array:
        x = jnp.zeros((g.shape[0], case.k), dtype)
        return jax.vjp(lambda x: product(x, q), x)[1](g)[0]

    return backward


def quantized(w: jax.Array) -> qwix.QArray:
    """Returns w [k, n] quantized in blocks along k."""
    return qwix.quantize(w, CODEBOOK, channelwise_axes=(1,), tiled_axes={0: BLOCK_SIZE})


def arguments(case: OperationCase) -> Inputs:
    """Returns the arguments of `operation`."""
    w, x = (array.astype(case.dtype) for array in drawn(case))
    if case.operation == "quantize":
        return (w,)
    q = jax.jit(quantized)(w)
    return (x, q) if case.rows else (q,)

"""Models the seconds of a compiled product from its kernels, also at other rates."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from qlora_jax.gpu import hlo, roofline, sass
from qlora_jax.gpu.case import DECODE_FIRST, GpuProduct, tile
from qlora_jax.gpu.roofline import Ceilings, KernelTime
from qlora_jax.gpu.sass import SassKernel


def fused(case: GpuProduct, moved: int, kernels: Sequence[SassKernel]) -> dict[str, float]:
    """Models a program with a fused kernel by the time of the kernel that multiplies.

    Other operations of the program count only in `moved`, the bytes that the program moves.
    """
    m, o = tile(case)
    flop = 2.0 * -(-case.rows // m) * m * -(-case.outer // o) * o * case.inner
    for kernel in sass.launched(kernels):
        if sass.tensor_flop(kernel.main_loop()):
            time = roofline.fused_time(kernel, case.gpu, flop, moved)
            return {**time._asdict(), "total": time.seconds}
    return {}


def decode_first(
    case: GpuProduct, operations: Sequence[hlo.Operation], kernels: Sequence[SassKernel]
) -> dict[str, float]:
    """Models the compiled decoding kernels, and then the product as one of a library."""
    by_name = {kernel.name: kernel for kernel in sass.launched(kernels)}
    total: dict[str, float] = collections.defaultdict(float)
    for operation in operations:
        kernel = by_name.get(operation.name.replace(".", "_"))
        multiplies = operation.multiplies or (kernel is not None and sass.multiplies(kernel.code))
        if multiplies or kernel is None:
            rows = case.rows if multiplies else 0
            time = roofline.product_time(case.gpu, rows, case.k, case.n, operation.bytes)
        else:
            time = roofline.straight_time(kernel, case.gpu, operation.bytes)
        part = "product" if multiplies else "decode"
        for name, seconds in {**time._asdict(), part: time.seconds, "total": time.seconds}.items():
            total[name] += seconds
    return dict(total)


def seconds_at(record: Mapping[str, Any], new: Ceilings) -> dict[str, float]:
    """Converts the `seconds` of a record from the data sheet's rates to other rates.

    Nothing is compiled. For a program that decodes first, a record holds only sums over kernels, so
    the time of the product's bytes is estimated:

    - the product's time, if that exceeds the tensor time, because then bytes bound the product;
    - else all bytes' time minus the decoding time, if the decoding time exceeds the issue time;
    - else the time to move operands and result once.

    A sum over several kernels may exceed the largest of its three bounds; the excess is kept.

    Args:
      record: result of `product.describe`, without an error.
      new: other rates; for those of the data sheet, the result equals `record["seconds"]`.
    """
    case = GpuProduct(*(record[field] for field in GpuProduct._fields))
    old, seconds = roofline.data_sheet(case.gpu), record["seconds"]
    whole = KernelTime(*(seconds[measure] for measure in KernelTime._fields))
    if case.implementation != DECODE_FIRST:
        time = whole.at(old, new)
        return {**time._asdict(), "total": time.seconds}
    decode, product = seconds["decode"], seconds["product"]
    if product > whole.tensor:
        moved = product
    elif decode > whole.issue:
        moved = whole.bytes - decode
    else:
        elements = case.rows * (case.k + case.n) + case.k * case.n
        moved = elements * jnp.dtype(case.dtype).itemsize / old.bandwidth
    parts = {
        "decode": (decode, KernelTime(whole.bytes - moved, 0.0, whole.issue)),
        "product": (product, KernelTime(moved, whole.tensor, 0.0)),
    }
    changed = {
        name: total - time.seconds + time.at(old, new).seconds
        for name, (total, time) in parts.items()
    }
    return {**whole.at(old, new)._asdict(), **changed, "total": sum(changed.values())}

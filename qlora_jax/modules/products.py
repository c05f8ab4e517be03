"""Carries out products and look-ups of rows with a weight that stays in 4 bits."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn

from qlora_jax.modules.axes import TABLE, Axes
from qlora_jax.modules.lazy import Lazy, bound
from qlora_jax.quant import QTensor


def product(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any] | None:
    """Carries out dot_general if it contracts the kernel's axes; otherwise returns None."""
    first = isinstance(inputs[0], Lazy)
    held, x = (inputs[0], inputs[1]) if first else (inputs[1], inputs[0])
    if isinstance(x, Lazy):
        return None
    (lc, rc), (lb, rb) = equation.params["dimension_numbers"]
    (own_c, x_c), (own_b, x_b) = ((lc, rc), (lb, rb)) if first else ((rc, lc), (rb, lb))
    contract = tuple(held.order[i] for i in own_c)
    batch = tuple(held.order[i] for i in own_b)
    kernel, axes = held.kernel, held.kernel.axes
    if axes is None:
        others = tuple(i for i in sorted(held.order) if i not in (*batch, *contract))
        found = Axes(tuple(sorted(batch)), tuple(sorted(contract)), others)
        if not others:
            return None
        held.used("product", "dot_general", found)
        return bound(equation, [y.base() if isinstance(y, Lazy) else y for y in inputs])
    fits = set(contract) == set(axes.contract) and set(batch) == set(axes.batch)
    if kernel.stack or not fits or not jax.numpy.issubdtype(x.dtype, np.inexact):
        return None
    held.used("product", "dot_general")

    x_batch = [x_b[batch.index(i)] for i in axes.batch]
    x_contract = [x_c[contract.index(i)] for i in axes.contract]
    free = [i for i in range(x.ndim) if i not in (*x_batch, *x_contract)]
    aval: Any = equation.outvars[0].aval
    rows = [x.shape[i] for i in free]
    sizes = [kernel.shape[i] for i in axes.batch]
    # places of the result's axes among [*batch, *free, *kept]
    kept = [i for i in held.order if i in axes.keep]
    k_places = [len(sizes) + len(free) + axes.keep.index(i) for i in kept]
    f_places = list(range(len(sizes), len(sizes) + len(free)))
    places = [axes.batch.index(i) for i in batch]
    places += k_places + f_places if first else f_places + k_places

    base = None
    if not isinstance(kernel.value, QTensor):
        (y,) = bound(equation, [z.base() if isinstance(z, Lazy) else z for z in inputs])
        outputs = math.prod(kernel.shape[i] for i in axes.keep)
        base = y.transpose(*np.argsort(places)).reshape(*sizes, math.prod(rows), outputs)
        x = x.astype(y.dtype)
    elif np.dtype(aval.dtype).itemsize > np.dtype(x.dtype).itemsize:
        # the operation asks for sums in a wider dtype than x's
        x = x.astype(aval.dtype)
    contracted = math.prod(x.shape[i] for i in x_contract)
    x = x.transpose(*x_batch, *free, *x_contract).reshape(*sizes, math.prod(rows), contracted)
    y = kernel.product(x, base).reshape(*sizes, *rows, *(kernel.shape[i] for i in axes.keep))
    return [y.transpose(*places).astype(aval.dtype)]


def gather_vectors(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any] | None:
    """Carries out a gather of whole rows of a table; otherwise returns None."""
    held, index = inputs
    p = equation.params
    numbers = p["dimension_numbers"]
    if isinstance(index, Lazy) or not _is_table(held, numbers, p["slice_sizes"]):
        return None
    if held.kernel.axes is None:
        held.used("rows", "gather", TABLE)
        return bound(equation, [held.base(), index])
    held.used("rows", "gather")
    size = held.kernel.shape[0]
    places = index.reshape(-1)
    inside = (places >= 0) & (places < size)
    near = jax.numpy.clip(places, 0, size - 1)
    base = held.base()[near] if not isinstance(held.kernel.value, QTensor) else None
    rows = held.kernel.rows(near, base).astype(held.dtype)
    if p["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill = np.nan if p["fill_value"] is None else p["fill_value"]
        rows = jax.numpy.where(inside[:, None], rows, jax.numpy.asarray(fill, rows.dtype))
    rows = rows.reshape(*index.shape[:-1], rows.shape[-1])
    return [jax.numpy.moveaxis(rows, -1, numbers.offset_dims[0])]


def _is_table(held: Lazy, numbers: Any, sizes: Sequence[int]) -> bool:
    shape = held.kernel.shape
    return (
        len(shape) == 2
        and held.kernel.axes in (None, TABLE)
        and held.untouched()
        and numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and tuple(sizes) == (1, shape[1])
    )

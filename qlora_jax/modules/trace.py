"""Runs a function of weights so that their products never need the weights as arrays.

The function is traced once (`jax.make_jaxpr`), and its operations are carried out one by one. A
weight stays a `Lazy` through casts, transpositions, calls and loops. Where a product reads it, the
product is that of 4 bits and adapters; where a table's rows are looked up, these rows alone are
decoded. Any other operation gets the whole weight as an array.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from qlora_jax.modules.axes import TABLE, Axes
from qlora_jax.modules.kernel import Kernel
from qlora_jax.modules.uses import Use
from qlora_jax.quant import QTensor


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A weight that no operation has needed as an array yet.

    Attributes:
      name: its name, for `uses`.
      kernel: its value and adapters.
      order: its axes, as transpositions have moved them.
      dtype: dtype to which it has been cast.
      uses: what is told of each operation on it.
    """

    name: str
    kernel: Kernel
    order: tuple[int, ...]
    dtype: Any
    uses: list[Use]

    def array(self) -> jax.Array:
        """Returns the weight as an array, with what its adapters add."""
        return self.kernel.whole().astype(self.dtype).transpose(self.order)

    def base(self) -> jax.Array:
        """Returns the weight as an array, without adapters."""
        return self.kernel.plain().astype(self.dtype).transpose(self.order)

    def used(self, kind: str, operation: str, axes: Axes | None = None) -> None:
        """Tells of an operation."""
        self.uses.append(Use(self.name, kind, operation, axes))

    def untouched(self) -> bool:
        """Returns whether no axis has been moved."""
        return self.order == tuple(range(len(self.order)))


def lazy(name: str, kernel: Kernel, uses: list[Use], dtype: Any = None) -> Lazy:
    """Returns a weight as it is before any operation."""
    order = tuple(range(len(kernel.stack) + len(kernel.shape)))
    return Lazy(name, kernel, order, dtype or kernel.dtype, uses)


def run(
    function: Callable[..., Any],
    kernels: Mapping[str, Kernel],
    args: Sequence[Any],
    uses: list[Use] | None = None,
) -> Any:
    """Returns function(arrays, *args), where arrays are the kernels' by name.

    Args:
      function: what JAX can trace; all that it returns are arrays.
      kernels: the weights.
      args: pytrees of arrays.
      uses: where to tell of the operations on the weights.
    """
    told = [] if uses is None else uses
    held = {name: lazy(name, kernel, told) for name, kernel in kernels.items()}
    shapes = {
        name: jax.ShapeDtypeStruct((*k.stack, *k.shape), k.dtype) for name, k in kernels.items()
    }
    closed, shape = jax.make_jaxpr(function, return_shape=True)(shapes, *args)
    out = _closed(closed, [*(held[name] for name in sorted(held)), *jax.tree.leaves(args)])
    return jax.tree.unflatten(jax.tree.structure(shape), [_array(x, "returned") for x in out])


def _array(x: Any, operation: str) -> Any:
    if not isinstance(x, Lazy):
        return x
    x.used("decoded", operation)
    return x.array()


def _closed(closed: ClosedJaxpr, values: Sequence[Any]) -> list[Any]:
    return _interpreted(closed.jaxpr, closed.consts, values)


def _interpreted(jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Returns the results of a program, of which any value may be lazy."""
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values]))
    for equation in jaxpr.eqns:
        inputs = [v.val if isinstance(v, Literal) else known[v] for v in equation.invars]
        out = None
        if any(isinstance(x, Lazy) for x in inputs):
            handler = HANDLERS.get(equation.primitive.name)
            out = handler(equation, inputs) if handler else None
        if out is None:
            arrays = [_array(x, equation.primitive.name) for x in inputs]
            out = _bound(equation, arrays)
        known.update(zip(equation.outvars, out))
    return [v.val if isinstance(v, Literal) else known[v] for v in jaxpr.outvars]


def _bound(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Returns the results of one operation on arrays."""
    found = equation.primitive.get_bind_params(equation.params)
    # a pair with functions until jax 0.10
    functions, params = found if isinstance(found, tuple) else ((), found)
    with equation.ctx.manager:
        out = equation.primitive.bind(*functions, *inputs, **params)
    return list(out) if equation.primitive.multiple_results else [out]


def _cast(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any] | None:
    dtype = equation.params["new_dtype"]
    return [dataclasses.replace(inputs[0], dtype=dtype)]


def _transposed(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any] | None:
    (x,) = inputs
    order = tuple(x.order[i] for i in equation.params["permutation"])
    return [dataclasses.replace(x, order=order)]


def _same(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any] | None:
    return list(inputs)


def _called(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any] | None:
    return _closed(equation.params["jaxpr"], inputs)


def _with_arrays(function: Callable[..., list[Any]], inputs: Sequence[Any]) -> tuple[Any, list]:
    """Returns a function of the arrays among inputs alone, and these; what is lazy is closed over.

    Lazy results are decoded, so that JAX can take the function.
    """
    places = [i for i, x in enumerate(inputs) if not isinstance(x, Lazy)]

    def inner(*arrays: Any) -> list[Any]:
        full = list(inputs)
        for i, x in zip(places, arrays):
            full[i] = x
        return [_array(x, "returned") for x in function(full)]

    return inner, [inputs[i] for i in places]


def _checkpointed(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any] | None:
    p = equation.params
    inner, arrays = _with_arrays(lambda full: _interpreted(p["jaxpr"], (), full), inputs)
    again = jax.checkpoint(inner, policy=p["policy"], prevent_cse=p["prevent_cse"])
    return list(again(*arrays))


def _branched(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any] | None:
    which, *rest = inputs
    if isinstance(which, Lazy):
        return None

    def branch(closed: ClosedJaxpr) -> tuple[Any, list]:
        return _with_arrays(lambda full: _closed(closed, full), rest)

    branches = [branch(closed) for closed in equation.params["branches"]]
    return list(jax.lax.switch(which, [inner for inner, _ in branches], *branches[0][1]))


def _scanned(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any] | None:
    p = equation.params
    first, second = p["num_consts"], p["num_consts"] + p["num_carry"]
    consts, carry, xs = inputs[:first], inputs[first:second], inputs[second:]
    carry = [_array(x, "scan") for x in carry]
    stacks = {i: x for i, x in enumerate(xs) if isinstance(x, Lazy) and _is_stack(x)}
    moving = [None if i in stacks else _array(x, "scan") for i, x in enumerate(xs)]
    kernels = {i: x.kernel for i, x in stacks.items()}

    def body(carry: list[Any], one: Any) -> tuple[list[Any], list[Any]]:
        arrays, layers = one
        full = [
            _layer(stacks[i], layers[i]) if i in stacks else arrays[i] for i in range(len(arrays))
        ]
        out = [_array(x, "returned") for x in _closed(p["jaxpr"], [*consts, *carry, *full])]
        return out[: len(carry)], out[len(carry) :]

    last, ys = jax.lax.scan(
        body,
        carry,
        (moving, kernels),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*last, *ys]


def _is_stack(x: Lazy) -> bool:
    return x.untouched() and (x.kernel.axes is None or bool(x.kernel.stack))


def _layer(stack: Lazy, kernel: Kernel) -> Lazy:
    """Returns one layer of a stack that a loop goes through."""
    if kernel.axes is None:
        kernel = dataclasses.replace(kernel, shape=kernel.shape[1:])
    return lazy(stack.name, kernel, stack.uses, stack.dtype)


def _repeated(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any] | None:
    p = equation.params
    first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    test, body, carry = inputs[:first], inputs[first:second], inputs[second:]
    if any(isinstance(x, Lazy) for x in carry):
        return None
    out = jax.lax.while_loop(
        lambda state: _array(_closed(p["cond_jaxpr"], [*test, *state])[0], "while"),
        lambda state: [_array(x, "while") for x in _closed(p["body_jaxpr"], [*body, *state])],
        list(carry),
    )
    return list(out)


def _product(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any] | None:
    """Carries out dot_general where its axes are the kernel's; else returns None."""
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
        held.used("product", "dot_general", found)
        return _bound(equation, [y.base() if isinstance(y, Lazy) else y for y in inputs])
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
    # [*batch, *free, *kept]: where the result's axes are among these
    kept = [i for i in held.order if i in axes.keep]
    k_places = [len(sizes) + len(free) + axes.keep.index(i) for i in kept]
    f_places = list(range(len(sizes), len(sizes) + len(free)))
    places = [axes.batch.index(i) for i in batch]
    places += k_places + f_places if first else f_places + k_places

    base = None
    if not isinstance(kernel.value, QTensor):
        (y,) = _bound(equation, [z.base() if isinstance(z, Lazy) else z for z in inputs])
        outputs = math.prod(kernel.shape[i] for i in axes.keep)
        base = y.transpose(*np.argsort(places)).reshape(*sizes, math.prod(rows), outputs)
        x = x.astype(y.dtype)
    elif np.dtype(aval.dtype).itemsize > np.dtype(x.dtype).itemsize:
        # the caller asks for sums in a wider dtype
        x = x.astype(aval.dtype)
    contracted = math.prod(x.shape[i] for i in x_contract)
    x = x.transpose(*x_batch, *free, *x_contract).reshape(*sizes, math.prod(rows), contracted)
    y = kernel.product(x, base).reshape(*sizes, *rows, *(kernel.shape[i] for i in axes.keep))
    return [y.transpose(*places).astype(aval.dtype)]


def _looked_up(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any] | None:
    """Carries out a gather of whole rows along the one kept axis; else returns None."""
    held, index = inputs
    p = equation.params
    numbers = p["dimension_numbers"]
    if isinstance(index, Lazy) or not _is_table(held, numbers, p["slice_sizes"]):
        return None
    if held.kernel.axes is None:
        held.used("rows", "gather", TABLE)
        return _bound(equation, [held.base(), index])
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


HANDLERS: Mapping[str, Callable[[JaxprEqn, Sequence[Any]], list[Any] | None]] = {
    "convert_element_type": _cast,
    "transpose": _transposed,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "sharding_constraint": _same,
    "optimization_barrier": _same,
    "jit": _called,
    "pjit": _called,
    "checkpoint": _checkpointed,
    "remat2": _checkpointed,
    "cond": _branched,
    "scan": _scanned,
    "while": _repeated,
    "dot_general": _product,
    "gather": _looked_up,
}
"""JAX's primitives that leave a weight lazy, or do not need all of it; None decodes it."""

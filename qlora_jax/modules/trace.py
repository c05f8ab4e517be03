"""Runs a function of weights without decoding the weights for its products.

The function is traced once (`jax.make_jaxpr`), and its operations are carried out one by one. A
weight stays a `Lazy` through casts, transpositions, calls and loops. A product with the weight is
computed from the 4-bit codes and the adapters. A look-up decodes only the rows that it needs. Any
other operation gets the whole weight as an array.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from qlora_jax.modules.kernel import Kernel
from qlora_jax.modules.lazy import Lazy, as_array, bound, is_stack, layer_of, lazy
from qlora_jax.modules.products import gather_vectors, product
from qlora_jax.modules.stacks import sliced, sliced_at, squeezed
from qlora_jax.modules.uses import Use


def run(
    function: Callable[..., Any],
    kernels: Mapping[str, Kernel],
    args: Sequence[Any],
    uses: list[Use] | None = None,
) -> Any:
    """Returns function(arrays, *args), where `arrays` maps each kernel's name to its weight.

    Args:
      function: function that JAX can trace, and that returns a pytree of arrays.
      kernels: name to weight.
      args: pytrees of arrays.
      uses: list to which the operations on the weights are appended; None records nothing.
    """
    told = [] if uses is None else uses
    held = {name: lazy(name, kernel, told) for name, kernel in kernels.items()}
    shapes = {
        name: jax.ShapeDtypeStruct((*k.stack, *k.shape), k.dtype) for name, k in kernels.items()
    }
    closed, shape = jax.make_jaxpr(function, return_shape=True)(shapes, *args)
    out = _closed(closed, [*(held[name] for name in sorted(held)), *jax.tree.leaves(args)])
    return jax.tree.unflatten(jax.tree.structure(shape), [as_array(x, "returned") for x in out])


def _closed(closed: ClosedJaxpr, values: Sequence[Any]) -> list[Any]:
    return _interpreted(closed.jaxpr, closed.consts, values)


def _interpreted(jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Runs a jaxpr, whose inputs may be lazy, and returns its results, which may be lazy too."""
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values]))
    for equation in jaxpr.eqns:
        inputs = [v.val if isinstance(v, Literal) else known[v] for v in equation.invars]
        out = None
        if any(isinstance(x, Lazy) for x in inputs):
            handler = HANDLERS.get(equation.primitive.name)
            out = handler(equation, inputs) if handler else None
        if out is None:
            arrays = [as_array(x, equation.primitive.name) for x in inputs]
            out = bound(equation, arrays)
        known.update(zip(equation.outvars, out))
    return [v.val if isinstance(v, Literal) else known[v] for v in jaxpr.outvars]


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
    """Returns a function of only the arrays among `inputs`, and these arrays.

    The function closes over the lazy inputs and decodes lazy results, so that JAX's transformations
    accept it.
    """
    places = [i for i, x in enumerate(inputs) if not isinstance(x, Lazy)]

    def inner(*arrays: Any) -> list[Any]:
        full = list(inputs)
        for i, x in zip(places, arrays):
            full[i] = x
        return [as_array(x, "returned") for x in function(full)]

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
    consts, carry, xs = _parts_of_scan(p, inputs)
    carry = [as_array(x, "scan") for x in carry]
    stacks = {i: x for i, x in enumerate(xs) if isinstance(x, Lazy) and is_stack(x)}
    moving = [None if i in stacks else as_array(x, "scan") for i, x in enumerate(xs)]
    kernels = {i: x.kernel for i, x in stacks.items()}

    def body(carry: list[Any], one: Any) -> tuple[list[Any], list[Any]]:
        arrays, layers = one
        full = [
            layer_of(stacks[i], layers[i]) if i in stacks else arrays[i] for i in range(len(arrays))
        ]
        out = [as_array(x, "returned") for x in _closed(p["jaxpr"], [*consts, *carry, *full])]
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


def _parts_of_scan(params: Mapping[str, Any], inputs: Sequence[Any]) -> list[list[Any]]:
    """Splits the inputs of a scan into constants, initial carry and scanned arrays."""
    if "ft_in" in params:  # from jax 0.12 on
        return [list(part) for part in params["ft_in"].update(list(inputs)).unpack()]
    first, second = params["num_consts"], params["num_consts"] + params["num_carry"]
    return [list(part) for part in (inputs[:first], inputs[first:second], inputs[second:])]


def _repeated(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any] | None:
    p = equation.params
    first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    test, body, carry = inputs[:first], inputs[first:second], inputs[second:]
    if any(isinstance(x, Lazy) for x in carry):
        return None
    out = jax.lax.while_loop(
        lambda state: as_array(_closed(p["cond_jaxpr"], [*test, *state])[0], "while"),
        lambda state: [as_array(x, "while") for x in _closed(p["body_jaxpr"], [*body, *state])],
        list(carry),
    )
    return list(out)


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
    "slice": sliced,
    "dynamic_slice": sliced_at,
    "squeeze": squeezed,
    "dot_general": product,
    "gather": gather_vectors,
}
"""JAX primitive to its handler for lazy weights; a handler that returns None needs arrays."""

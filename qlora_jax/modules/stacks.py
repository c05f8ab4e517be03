"""Takes one layer or expert out of a stack by its index, without decoding the stack."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn

from qlora_jax.modules.kernel import Kernel
from qlora_jax.modules.lazy import Lazy, is_stack, layer_of, lazy


def sliced(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any] | None:
    """Carries out a slice of one layer at a constant index; otherwise returns None."""
    (stack,) = inputs
    p = equation.params
    start, *rest = p["start_indices"]
    stop, *ends = p["limit_indices"]
    strides = p["strides"] or [1] * len(p["limit_indices"])
    whole = not any(rest) and tuple(ends) == _shape(stack)[1:] and set(strides) == {1}
    if not (is_stack(stack) and whole and stop - start == 1):
        return None
    return [_stack_of_one(stack, jax.tree.map(lambda x: x[start:stop], stack.kernel))]


def sliced_at(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any] | None:
    """Carries out a slice of one layer at a traced index; otherwise returns None."""
    stack, place, *rest = inputs
    if not isinstance(stack, Lazy) or any(isinstance(x, Lazy) for x in (place, *rest)):
        return None
    # The other axes are whole, so JAX clamps their start indices to 0.
    if not is_stack(stack) or tuple(equation.params["slice_sizes"]) != (1, *_shape(stack)[1:]):
        return None
    kernel = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, place, 1), stack.kernel)
    return [_stack_of_one(stack, kernel)]


def squeezed(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any] | None:
    """Removes the first axis of a stack of one layer; otherwise returns None."""
    (stack,) = inputs
    if tuple(equation.params["dimensions"]) != (0,) or not is_stack(stack):
        return None
    return [layer_of(stack, jax.tree.map(lambda x: x[0], stack.kernel))]


def _stack_of_one(stack: Lazy, kernel: Kernel) -> Lazy:
    if kernel.axes is None:
        kernel = dataclasses.replace(kernel, shape=(1, *kernel.shape[1:]))
    return lazy(stack.name, kernel, stack.uses, stack.dtype)


def _shape(x: Lazy) -> tuple[int, ...]:
    return (*x.kernel.stack, *x.kernel.shape)

"""Computes the outputs, gradients, losses and expected bytes of a case."""

import math
import re
from types import ModuleType
from typing import Any

import jax
import numpy as np
import optax

from experiments.other_models import linen_way, nnx_way
from experiments.other_models.cases import Case, loss


def way_of(case: Case) -> ModuleType:
    """Returns the module with the calls for a case: `linen_way` or `nnx_way`."""
    return linen_way if case.linen else nnx_way


def outputs(case: Case, model: Any) -> np.ndarray:
    """Returns a model's outputs for its example, in float32, from a compiled program."""
    arrays, again = way_of(case).whole(model)
    found = jax.jit(lambda a: way_of(case).call(case, again(a)))(arrays)
    return np.asarray(found, np.float32)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the largest difference, relative to the largest absolute value of `b`."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def chosen(case: Case, model: Any, where: str) -> dict[str, Any]:
    """Returns the weights whose dotted paths match an expression: arrays or `QTensor`s."""
    found = way_of(case).weights(model)
    return {path: value for path, value in found.items() if re.fullmatch(where, path)}


def nudged(trained: Any, size: float = 0.05) -> Any:
    """Returns adapters with random numbers added to A and B, so that B is not zero."""
    leaves, tree = jax.tree.flatten(trained)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [x + size * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys)]
    return jax.tree.unflatten(tree, moved)


def gradients(case: Case, model: Any, change: Any = lambda trained: trained) -> list[np.ndarray]:
    """Returns the loss's gradient for each trained array, after `change` of these arrays."""
    trained, frozen, join = way_of(case).split(model)

    @jax.jit
    def gradient(trained: Any, frozen: Any) -> Any:
        return jax.grad(lambda t: loss(way_of(case).call(case, join(t, frozen))))(trained)

    return [np.asarray(g) for g in jax.tree.leaves(gradient(change(trained), frozen))]


def losses(case: Case, model: Any, steps: int = 20, rate: float = 0.01) -> list[float]:
    """Trains the adapters with Adam; returns the loss before each step and after the last."""
    trained, frozen, join = way_of(case).split(model)
    optimizer = optax.adam(rate)

    @jax.jit
    def step(trained: Any, state: Any, frozen: Any) -> Any:
        value, slope = jax.value_and_grad(lambda t: loss(way_of(case).call(case, join(t, frozen))))(
            trained
        )
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(trained, updates), state, value

    state, told = optimizer.init(trained), []
    for _ in range(steps + 1):
        trained, state, value = step(trained, state, frozen)
        told.append(float(value))
    return told


def expected_bytes(shape: tuple[int, ...]) -> int:
    """Returns the bytes of matrices [..., K, N] in NF4 with double quantization (QLoRA, section 3).

    A weight takes 4 bits, a block of 64 weights 8 bits, and 256 blocks 32 bits: 4.127 bits per
    weight if K is a multiple of 64; otherwise K is padded to one. Each matrix also stores a mean
    and a codebook.
    """
    *stack, summed, columns = shape
    blocks = -(-summed // 64) * columns
    return math.prod(stack) * (32 * blocks + blocks + 4 * -(-blocks // 256) + 4 + 64)

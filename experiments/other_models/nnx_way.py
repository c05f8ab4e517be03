"""Quantizes, adapts and splits an NNX model for training, by the calls that a user makes."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

import qlora_jax as qj
from experiments.other_models.cases import RANK, Case


def build(case: Case, seed: int) -> nnx.Module:
    """Returns the model as its package builds it."""
    return case.build(seed)


def quantize(case: Case, model: nnx.Module) -> nnx.Module:
    """Quantizes the case's kernels, in place."""
    qj.discover(model, *case.example())
    return qj.quantize_model(model, where=case.kernels)


def adapt(case: Case, model: nnx.Module) -> nnx.Module:
    """Adds the case's adapters, in place."""
    qj.discover(model, *case.example())
    return qj.add_lora(model, where=case.adapted, rank=RANK, alpha=2 * RANK, rngs=nnx.Rngs(1))


def call(case: Case, model: nnx.Module) -> jax.Array:
    """Calls the model with the case's example; returns its outputs."""
    return case.outputs(model(*case.example()))


def split(model: nnx.Module) -> tuple[Any, Any, Callable[[Any, Any], nnx.Module]]:
    """Returns the trained arrays, the frozen arrays, and a function that joins them to a model."""
    graph, trained, frozen = qj.split(model)
    return trained, frozen, lambda trained, frozen: qj.join(graph, trained, frozen)


def whole(model: nnx.Module) -> tuple[Any, Callable[[Any], nnx.Module]]:
    """Returns the arrays of any model, and a function from arrays to the model."""
    graph, state = nnx.split(model)
    return state, lambda state: nnx.merge(graph, state, copy=True)


def merge(case: Case, model: nnx.Module) -> nnx.Module:
    """Returns the model merged into plain arrays."""
    return qj.merge(model)


def weights(model: nnx.Module) -> dict[str, Any]:
    """Returns each variable's array or `QTensor` by its dotted path."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable.get_raw_value() for path, variable in flat}

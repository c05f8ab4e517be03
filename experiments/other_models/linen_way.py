"""Quantizes, adapts and splits a Linen model for training, by the calls that a user makes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import traverse_util

import qlora_jax as qj
from experiments.other_models.cases import RANK, Case


class Model(NamedTuple):
    """A module and its params."""

    module: Any
    params: Any


def build(case: Case, seed: int) -> Model:
    """Returns the model as its package builds it."""
    return Model(*case.build(seed))


def quantize(case: Case, model: Model) -> Model:
    """Returns the model with the case's kernels quantized."""
    params = qj.linen.quantize(model.module, model.params, case.kernels, *case.example())
    return Model(model.module, params)


def adapt(case: Case, model: Model) -> Model:
    """Returns the model with the case's adapters added."""
    params = qj.linen.add_lora(
        model.module,
        model.params,
        case.adapted,
        *case.example(),
        rank=RANK,
        alpha=2 * RANK,
        key=jax.random.key(1),
    )
    return Model(model.module, params)


def call(case: Case, model: Model) -> jax.Array:
    """Calls the model with the case's example; returns its outputs."""
    return case.outputs(qj.linen.apply(model.module, model.params, *case.example()))


def split(model: Model) -> tuple[Any, Any, Callable[[Any, Any], Model]]:
    """Returns the trained arrays, the frozen arrays, and a function that joins them to a model."""
    trained, frozen = qj.linen.split(model.params)

    def join(trained: Any, frozen: Any) -> Model:
        return Model(model.module, qj.linen.join(trained, frozen))

    return trained, frozen, join


def whole(model: Model) -> tuple[Any, Callable[[Any], Model]]:
    """Returns the params of any model, and a function from params to the model."""
    return model.params, lambda params: Model(model.module, params)


def merge(case: Case, model: Model) -> Model:
    """Returns the model merged into plain arrays."""
    return Model(model.module, qj.linen.merge(model.params))


def weights(model: Model) -> dict[str, Any]:
    """Returns each parameter's array or `QTensor` by its dotted path."""
    flat = traverse_util.flatten_dict(model.params, sep=".")
    return {path: getattr(leaf, "value", leaf) for path, leaf in flat.items()}

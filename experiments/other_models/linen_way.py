"""How a Linen model is quantized, adapted and trained: the calls that a user makes."""

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
    """Makes the model as its package does."""
    return Model(*case.build(seed))


def quantize(case: Case, model: Model) -> Model:
    """Returns the model with the case's kernels quantized."""
    params = qj.linen.quantize(model.module, model.params, case.kernels, *case.example())
    return Model(model.module, params)


def adapt(case: Case, model: Model) -> Model:
    """Returns the model with the case's adapters."""
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
    """Calls the model with the case's example."""
    return case.outputs(qj.linen.apply(model.module, model.params, *case.example()))


def split(model: Model) -> tuple[Any, Any, Callable[[Any, Any], Model]]:
    """Returns what is trained, what is frozen, and what puts the two together."""
    trained, frozen = qj.linen.split(model.params)

    def join(trained: Any, frozen: Any) -> Model:
        return Model(model.module, qj.linen.join(trained, frozen))

    return trained, frozen, join


def whole(model: Model) -> tuple[Any, Callable[[Any], Model]]:
    """Returns the params of any model, and what makes them the model again."""
    return model.params, lambda params: Model(model.module, params)


def merge(case: Case, model: Model) -> Model:
    """Returns the model as plain arrays."""
    return Model(model.module, qj.linen.merge(model.params))


def weights(model: Model) -> dict[str, Any]:
    """Returns each parameter's array or `QTensor` by its dotted path."""
    flat = traverse_util.flatten_dict(model.params, sep=".")
    return {path: getattr(leaf, "value", leaf) for path, leaf in flat.items()}

"""Counts, to the byte, the inputs and outputs of a training step on a device.

The counted trees are the model of `abstract_model` and the state of the optimizer's own `init`,
both as shapes. No array is made, and no size comes from a formula.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import TypeAdapter

from qlora_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from qlora_jax.lora.variables import LoraConstant, LoraParam, LoraScale, Vector, Weight
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.sharding import MeshLayout
from qlora_jax.plan.abstract import (
    abstract_key,
    abstract_model,
    mesh_in_shapes,
    spread_moments,
    with_shardings,
)
from qlora_jax.plan.device_bytes import nbytes
from qlora_jax.quant import QTensor
from qlora_jax.train import layer_groups
from qlora_jax.train import step as steps
from qlora_jax.train.assemble import optimizer_of
from qlora_jax.train.state import init_state

PARTS: Sequence[tuple[type[nnx.Variable], str | None, str]] = (
    (Vector, None, "norms and biases"),
    (Weight, "embed", "embeddings"),
    (Weight, "positions", "embeddings"),
    (Weight, "head", "head"),
    (Weight, None, "linears"),
    (LoraParam, None, "adapters"),
    (LoraConstant, "a", "adapters"),
    (LoraConstant, None, "adapter scales"),
    (LoraScale, None, "adapter scales"),
)
"""Class of variable, last name of its path (None is any name), and part of the model. The first
match counts."""

QUANTIZED: Mapping[str, str] = {
    "codes": "codes",
    "scales": "scales",
    "nested": "nested scales and codebooks",
    "offset": "nested scales and codebooks",
    "codebook": "nested scales and codebooks",
}
"""Array of a `QTensor` to the part of the model."""

ORDER = (
    "embeddings",
    "norms and biases",
    "linears",
    "codes",
    "scales",
    "nested scales and codebooks",
    "head",
    "adapters",
    "adapter scales",
)
"""Parts of a model, in the order of the output."""


CONFIG = TypeAdapter(Config)
"""Converts a `Config` to JSON and back."""


class Exact(NamedTuple):
    """Bytes of a run's trees on a device, and ranks of the adapters.

    Attributes:
      model: part of the model to bytes, of the trained and the frozen tree, in `ORDER`.
      trained: bytes of the trained tree.
      gradients: bytes of the gradients of the whole tree, in the dtype that the update takes.
      layer_gradients: bytes of the gradients of one layer, or of the parameters outside the layers
        if these are more.
      moments: bytes of the optimizer's moments of all layers.
      counters: bytes of step counts, loss scale and, with dropout, the key.
      ranks: path to rank: of each adapter of a layer, by the linear's path below the layer, and of
        the adapters of embedding and head. A stack of layers has the largest rank of its layers.
    """

    model: Mapping[str, int]
    trained: int
    gradients: int
    layer_gradients: int
    moments: int
    counters: int
    ranks: Mapping[str, int]


def count(model: DecoderConfig, run: Config) -> Exact:
    """Counts the bytes of a run's trees on a device.

    Args:
      model: shapes of the pretrained decoder.
      run: config of the run; only the settings in `_read` are read. Runs that differ only in other
        settings share one cached count.

    Raises:
      UserError: settings do not fit the shapes.
    """
    return _count(model, CONFIG.dump_json(_read(run)))


def _read(run: Config) -> Config:
    """Returns a config with the settings that decide the bytes; all others are defaults."""
    return Config(
        model=ModelConfig(path="", storage_dtype=run.model.storage_dtype),
        data=DataConfig(source=""),
        output="",
        method=run.method,
        quant=run.quant,
        lora=run.lora,
        mesh=run.mesh,
        optimizer=OptimizerConfig(moments=run.optimizer.moments),
        train=TrainConfig(gradient_accumulation=run.train.gradient_accumulation),
    )


@functools.cache
def _count(model: DecoderConfig, settings: bytes) -> Exact:
    """Counts a run whose config is JSON, because a `Config` has no hash for the cache."""
    run = CONFIG.validate_json(settings)
    parts, layout = abstract_model(run, model, None), None
    if (mesh := mesh_in_shapes(run.mesh)) is not None:
        parts, layout = with_shardings(mesh, parts)
    moments, counters = optimizer_bytes(parts.trained, run, layout)
    slopes = gradients(parts.trained, run.train.gradient_accumulation)
    return Exact(
        by_part(parts.trained, parts.frozen),
        nbytes(parts.trained),
        nbytes(slopes),
        largest_unit(parts.trained, slopes),
        moments,
        counters + nbytes(abstract_key(run)),
        _ranks(nnx.merge(*parts)),
    )


def by_part(*trees: nnx.State) -> dict[str, int]:
    """Returns part of the model to bytes, for trees of variables, in `ORDER`."""
    found = dict.fromkeys(ORDER, 0)
    for tree in trees:
        for path, variable in nnx.to_flat_state(tree):
            value = variable.get_value()
            if isinstance(value, QTensor):
                for array, part in QUANTIZED.items():
                    found[part] += nbytes(getattr(value, array))
            else:
                found[_part(variable, path[-1])] += nbytes(value)
    return found


def _part(variable: nnx.Variable, name: Any) -> str:
    return next(
        part for kind, place, part in PARTS if isinstance(variable, kind) and place in (None, name)
    )


def gradients(trained: Any, micro_batches: int) -> Any:
    """Returns the shapes of a trained tree's gradients.

    Args:
      trained: trained tree of shapes.
      micro_batches: micro-batches of a step; sums over several are in float32.
    """

    def kept(x: Any) -> jax.ShapeDtypeStruct:
        dtype = steps.gradient_dtype(x.dtype if micro_batches == 1 else jnp.float32)
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return jax.tree.map(kept, trained)


def largest_unit(trained: Any, slopes: Any) -> int:
    """Returns the bytes of the largest layer's gradients.

    Args:
      trained: trained tree of shapes.
      slopes: gradients of this tree, as shapes.
    """
    leaves = jax.tree.leaves(slopes)
    return max(
        nbytes([leaves[p] for p in group.places]) // group.size
        for group in layer_groups.find_groups(trained)
    )


def optimizer_bytes(trained: Any, run: Config, layout: MeshLayout | None = None) -> tuple[int, int]:
    """Returns the bytes of the moments and of the counters of a run's state, for all layers.

    Moments are the arrays with axes. The layers of a group have equal shapes, so the function
    builds the state of only one layer of each group.
    """
    optimizer = optimizer_of(run)
    leaves, structure = jax.tree.flatten(trained)
    groups = layer_groups.find_groups(trained)
    for place in (place for group in groups if group.layers for place in group.places):
        stack = leaves[place]
        leaves[place] = jax.ShapeDtypeStruct((1, *stack.shape[1:]), stack.dtype)
    single = jax.tree.unflatten(structure, leaves)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer, False), single)
    each = state.optimizer
    if layout is not None:
        each = spread_moments(layout, single, each)
    moments, counters = 0, nbytes((state.step, state.scale, state.finite_steps))
    for group, layer in zip(groups, each, strict=True):
        arrays = jax.tree.leaves(layer)
        moments += group.size * nbytes([x for x in arrays if x.ndim])
        counters += group.size * nbytes([x for x in arrays if not x.ndim])
    return moments, counters


def _ranks(model: Decoder) -> dict[str, int]:
    layers = {
        path: linear.adapter.a.get_value().shape[-1]
        for run in model.runs
        for path, linear in run.linears().items()
        if linear.adapter is not None
    }
    outer = model.outer_adapters().items()
    return layers | {path: adapter.a.get_value().shape[-1] for path, adapter in outer}

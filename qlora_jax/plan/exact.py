"""Counts, to the byte, what a training step takes and gives on a device.

What is counted is the model as `abstract_model` builds it, and the state that the optimizer's own
`init` makes for it, all in shapes: no array is made, and no size is worked out here.
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
    spread,
    spread_moments,
)
from qlora_jax.plan.share import nbytes
from qlora_jax.quant import QTensor
from qlora_jax.train import layer_groups
from qlora_jax.train import step as steps
from qlora_jax.train.assemble import optimizer_of

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
"""Kind of variable, the last name of its path where that decides too, and the part that it belongs
to. The first match counts."""

QUANTIZED: Mapping[str, str] = {
    "codes": "codes",
    "scales": "scales",
    "nested": "nested scales and codebooks",
    "offset": "nested scales and codebooks",
    "codebook": "nested scales and codebooks",
}
"""Array of a `QTensor` to the part that it belongs to."""

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
"""The parts of a model."""


CONFIG = TypeAdapter(Config)
"""To JSON and back."""


class Exact(NamedTuple):
    """Bytes of a run's trees on a device.

    Attributes:
      model: bytes of the trained and the frozen tree, by part, in `ORDER`.
      trained: bytes of the trained tree.
      gradients: of the whole tree, as the update takes them.
      layer_gradients: of one layer, or of what is outside the layers, whichever is more.
      moments: bytes of the optimizer's moments, of all units.
      counters: counts of steps, the loss scale, and with dropout the key.
      ranks: rank of each of a layer's adapters, by the linear's path below the layer, and of those
        of embedding and head; a stack is as wide as its widest layer.
    """

    model: Mapping[str, int]
    trained: int
    gradients: int
    layer_gradients: int
    moments: int
    counters: int
    ranks: Mapping[str, int]


def count(model: DecoderConfig, run: Config) -> Exact:
    """Returns the bytes of a run's trees on a device.

    Args:
      model: shapes of the pretrained decoder.
      run: of its settings those in `_read` are read. Two runs that differ in others alone are
        counted once.

    Raises:
      UserError: settings that do not fit the shapes.
    """
    return _count(model, CONFIG.dump_json(_read(run)))


def _read(run: Config) -> Config:
    """Returns a run with the settings that decide the bytes, all others at their defaults."""
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
    """Counts a run whose config is given as JSON, since a config itself has no hash."""
    run = CONFIG.validate_json(settings)
    parts, layout = abstract_model(run, model, None), None
    if (mesh := mesh_in_shapes(run.mesh)) is not None:
        parts, layout = spread(mesh, parts)
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
    """Returns the bytes of trees of variables by part, in `ORDER`."""
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
    """Returns the gradients of a trained tree, as shapes; sums of micro-batches are in float32."""

    def kept(x: Any) -> jax.ShapeDtypeStruct:
        dtype = steps.gradient_dtype(x.dtype if micro_batches == 1 else jnp.float32)
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return jax.tree.map(kept, trained)


def largest_unit(trained: Any, slopes: Any) -> int:
    """Returns the bytes of the largest unit's gradients."""
    leaves = jax.tree.leaves(slopes)
    return max(
        nbytes([leaves[p] for p in group.places]) // group.size
        for group in layer_groups.find_groups(trained)
    )


def optimizer_bytes(trained: Any, run: Config, layout: MeshLayout | None = None) -> tuple[int, int]:
    """Returns the bytes of the moments and of the counters of a run's state, of all units.

    Moments are the arrays with axes. A group's units are alike, so one of each group is made.
    """
    optimizer = optimizer_of(run)
    leaves, structure = jax.tree.flatten(trained)
    groups = layer_groups.find_groups(trained)
    for place in (place for group in groups if group.layers for place in group.places):
        stack = leaves[place]
        leaves[place] = jax.ShapeDtypeStruct((1, *stack.shape[1:]), stack.dtype)
    single = jax.tree.unflatten(structure, leaves)
    state = jax.eval_shape(lambda tree: steps.init(tree, optimizer, False), single)
    each = state.optimizer
    if layout is not None:
        each = spread_moments(layout, single, each)
    moments, counters = 0, nbytes((state.step, state.scale, state.finite_steps))
    for group, unit in zip(groups, each, strict=True):
        arrays = jax.tree.leaves(unit)
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

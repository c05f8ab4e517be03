"""Builds the inputs of a training step as shapes, without arrays: model, batch and key.

On a mesh each shape has a sharding (`jax.ShapeDtypeStruct.sharding`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from qlora_jax.config import Config, LoraConfig, MeshConfig, QuantConfig
from qlora_jax.data.packing import DTYPES
from qlora_jax.models import trees
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder, attach, use_kernel
from qlora_jax.models.sharding import MeshLayout, layout_of
from qlora_jax.models.trees import SplitModel
from qlora_jax.models.weight_shapes import expected_shapes, linears
from qlora_jax.quant import QTensor, quantize
from qlora_jax.runtime.mesh import DATA, FSDP
from qlora_jax.train import layer_groups
from qlora_jax.train.assemble import drops_out
from qlora_jax.train.targets import targets


def abstract_model(config: Config, decoder: DecoderConfig, kernel: str | None) -> SplitModel:
    """Returns the model that a run of this config trains, with shapes in place of arrays.

    Args:
      config: config of the run; the function does not open the model's files.
      decoder: shapes of the model.
      kernel: implementation of products with 4-bit weights; None chooses one.

    Returns:
      Trees of `jax.ShapeDtypeStruct`.

    Raises:
      UserError: settings do not fit the shapes.
    """

    def build() -> Decoder:
        model = _of_zeros(config, decoder)
        if config.method != "full":
            use_kernel(model, kernel)
            _adapt(model, config.lora)
        return model

    return trees.split(nnx.eval_shape(build), config.method)


def abstract_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one step's batch arrays, [micro-batches, rows, tokens]."""
    train = config.train
    shape = (train.gradient_accumulation, train.batch_size, config.data.sequence_length)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in DTYPES.items()}


def abstract_key(config: Config) -> jax.ShapeDtypeStruct | None:
    """Returns the shape of the key of one step's dropout; None without dropout."""
    return jax.eval_shape(lambda: jax.random.key(0)) if drops_out(config) else None


def mesh_in_shapes(asked: MeshConfig) -> AbstractMesh | None:
    """Returns a mesh without real devices, to count each device's bytes; None for one device."""
    if asked.devices == 1:
        return None
    return AbstractMesh((asked.data, asked.fsdp), (DATA, FSDP))


def with_shardings(mesh: Mesh | AbstractMesh, parts: SplitModel) -> tuple[SplitModel, MeshLayout]:
    """Returns a model of shapes with their shardings on a mesh, and the layout of the model."""
    layout = layout_of(mesh, parts.trained, parts.frozen)
    homes = layout.shardings(parts.trained, parts.frozen)
    trained, frozen = (_living(tree, home) for tree, home in zip(parts[1:], homes))
    return SplitModel(parts.graph, trained, frozen), layout


def spread_moments(layout: MeshLayout, trained: Any, states: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the optimizer's states of all layers as shapes with their shardings.

    Args:
      layout: layout of the model on the mesh.
      trained: trained tree of shapes.
      states: states of the layers of all groups, as shapes, in the order of
        `layer_groups.init_layers`.
    """
    leaves = jax.tree.leaves(trained)
    made: list[Any] = []
    for group in layer_groups.find_groups(trained):
        own = [leaves[place] for place in group.places]
        layer = jax.eval_shape(lambda own, group=group: layer_groups.take_layer(group, own, 0), own)
        first, *_ = alike = states[len(made) : len(made) + group.size]
        made += [_living(first, layout.moments(layer, first))] * len(alike)
    return tuple(made)


def everywhere(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """Returns a tree of shapes that are replicated: each device of the mesh holds all of them."""
    home = NamedSharding(mesh, PartitionSpec())
    return _living(tree, jax.tree.map(lambda _: home, tree))


def _living(tree: Any, homes: Any) -> Any:
    def one(x: Any, home: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home)

    return jax.tree.map(one, tree, homes)


def _of_zeros(config: Config, decoder: DecoderConfig) -> Decoder:
    """Returns the pretrained model in the dtypes of a run, with all weights zero."""
    names, shapes = decoder.names, expected_shapes(decoder)
    dtype = jnp.dtype(config.lora.dtype if config.method == "full" else config.model.storage_dtype)
    layers, first = f"{names.layers}.", f"{names.layers}.0."
    outer = {n: jnp.zeros(s, dtype) for n, s in shapes.items() if not n.startswith(layers)}
    layer = {n.removeprefix(first): s for n, s in shapes.items() if n.startswith(first)}
    stacks: dict[str, jax.Array | QTensor] = {
        name: jnp.zeros((decoder.num_layers, *reversed(shape)), dtype)
        for name, shape in layer.items()
    }
    if config.method == "qlora":
        for path in linears(decoder):
            stacks[f"{path}.weight"] = _quantized(stacks[f"{path}.weight"], config.quant)
    head = outer.get(f"{names.head}.weight")
    return Decoder(
        decoder,
        embed=outer[f"{names.embed}.weight"],
        runs=[stacks],
        norm=outer[f"{names.norm}.weight"],
        head=None if head is None else head.T,
        norm_bias=outer.get(f"{names.norm}.bias"),
        positions=outer.get(f"{names.positions}.weight"),
    )


def _quantized(weight: Any, quant: QuantConfig) -> QTensor:
    return quantize(
        weight, quant.codebook, quant.block_size, quant.double_quant, quant.nested_block
    )


def _adapt(model: Decoder, lora: LoraConfig) -> None:
    """Adds the adapters of a run to the model, in place."""
    attach(
        model,
        targets(lora, model.config),
        jax.random.key(0),
        init=lora.init,
        dropout=lora.dropout,
        dtype=jnp.dtype(lora.dtype),
        variant=lora.variant,
        freeze_a=lora.freeze_a,
    )

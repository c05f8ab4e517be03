"""A model of shapes alone: what a run would hold, before any weight is read."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.config import Config
from qlora_jax.lora import plan
from qlora_jax.models import trees
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder, attach, use_kernel
from qlora_jax.models.parts import expected_shapes, linears
from qlora_jax.quant import quantize


class Abstract(NamedTuple):
    """What `trees.split` gives for a model, with `jax.ShapeDtypeStruct` for arrays."""

    graph: nnx.GraphDef
    trained: Any
    frozen: Any


def abstract_model(config: Config, decoder: DecoderConfig, kernel: str | None) -> Abstract:
    """The model that a run of this config would train.

    Args:
      config: of the run; its model's files are not opened.
      decoder: shapes of the model.
      kernel: implementation of products with 4-bit weights; None picks.

    Raises:
      UserError: settings that do not fit the shapes.
    """
    full, quant = config.method == "full", config.quant
    dtype = jnp.dtype(config.lora.dtype if full else config.model.storage_dtype)
    shapes, names = expected_shapes(decoder), decoder.names
    first = f"{names.layers}.0."
    graph: list[nnx.GraphDef] = []

    def stack(name: str) -> Any:
        shape, linear = shapes[first + name], name.removesuffix(".weight") in linears(decoder)
        weight = jnp.zeros((decoder.num_layers, *reversed(shape)), dtype)
        if not linear or config.method != "qlora":
            return weight
        return quantize(
            weight, quant.codebook, quant.block_size, quant.double_quant, quant.nested_block
        )

    def zeros(name: str) -> jax.Array | None:
        return jnp.zeros(shapes[name], dtype) if name in shapes else None

    def build() -> tuple[Any, Any]:
        layer = [name.removeprefix(first) for name in shapes if name.startswith(first)]
        head = zeros(f"{names.head}.weight")
        model = Decoder(
            decoder,
            jnp.zeros(shapes[f"{names.embed}.weight"], dtype),
            [{name: stack(name) for name in layer}],
            jnp.zeros(shapes[f"{names.norm}.weight"], dtype),
            None if head is None else head.T,
            zeros(f"{names.norm}.bias"),
            zeros(f"{names.positions}.weight"),
        )
        if not full:
            lora = config.lora
            use_kernel(model, kernel)
            attach(
                model,
                plan(lora, model.linears()),
                jax.random.key(0),
                init=lora.init,
                dropout=lora.dropout,
                dtype=jnp.dtype(lora.dtype),
                variant=lora.variant,
                freeze_a=lora.freeze_a,
            )
        structure, trained, frozen = trees.split(model, config.method)
        graph.append(structure)
        return trained, frozen

    trained, frozen = jax.eval_shape(build)
    return Abstract(graph[0], trained, frozen)

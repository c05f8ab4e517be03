"""A model of shapes alone: what a run would hold, before any weight is read."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.config import Config
from qlora_jax.formats.load import PREFIX
from qlora_jax.formats.names import expected_shapes
from qlora_jax.lora import plan
from qlora_jax.models import trees
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder, attach, use_kernel
from qlora_jax.models.layers import LINEARS
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
    shapes = expected_shapes(decoder)
    graph: list[nnx.GraphDef] = []

    def stack(name: str) -> Any:
        shape, linear = shapes[f"{PREFIX}0.{name}"], name.removesuffix(".weight") in LINEARS
        weight = jnp.zeros((decoder.num_layers, *reversed(shape)), dtype)
        if not linear or config.method != "qlora":
            return weight
        return quantize(
            weight, quant.codebook, quant.block_size, quant.double_quant, quant.nested_block
        )

    def build() -> tuple[Any, Any]:
        first = f"{PREFIX}0."
        head = shapes.get("lm_head.weight")
        model = Decoder(
            decoder,
            jnp.zeros(shapes["model.embed_tokens.weight"], dtype),
            [
                {
                    n.removeprefix(first): stack(n.removeprefix(first))
                    for n in shapes
                    if n.startswith(first)
                }
            ],
            jnp.zeros(shapes["model.norm.weight"], dtype),
            None if head is None else jnp.zeros(head[::-1], dtype),
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

"""Builds the training step of a model from a config; no other module maps settings to a step."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qlora_jax.config import Config
from qlora_jax.kernels.target import Hardware, capability_of
from qlora_jax.models.decoder import WHOLE_LAYERS, Decoder
from qlora_jax.models.sharding import MeshLayout
from qlora_jax.models.trees import SplitModel
from qlora_jax.train import layered
from qlora_jax.train import step as steps
from qlora_jax.train.offload import ON_DEVICE, PLACEMENTS, Memory, memory_of
from qlora_jax.train.optimizer import adamw
from qlora_jax.train.state import TrainState, init_state


class Training(NamedTuple):
    """A model, the functions of its training step, and the training state.

    Attributes:
      graph: structure of the model.
      program: functions of a step.
      state: training state, which includes the trained tree.
      frozen: frozen tree, which no step changes.
    """

    graph: nnx.GraphDef
    program: steps.StepProgram
    state: TrainState
    frozen: Any

    def model(self) -> Decoder:
        """Returns the model with the trained tree of the current state."""
        return nnx.merge(self.graph, self.state.trained, self.frozen)

    def gathered(self) -> Decoder:
        """Returns the model like `model`, but with the whole trained tree on every device."""
        layout, trained = self.program.recipe.layout, self.state.trained
        if layout is not None:
            trained = layout.replicate(trained)
        return nnx.merge(self.graph, trained, self.frozen)


def assemble(
    config: Config,
    parts: SplitModel,
    memory: Memory | None = None,
    device: Hardware | None = None,
    layout: MeshLayout | None = None,
) -> Training:
    """Builds the training step of a config, and the state before the first step.

    Args:
      config: config of the run.
      parts: model, of arrays or of `jax.ShapeDtypeStruct`. With `ShapeDtypeStruct` the state is
        abstract too and takes no memory.
      memory: memory choices; None takes those of the config.
      device: device that will run the step; None for the default device.
      layout: split of `parts` over a mesh; None for one device.
    """
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(parts.trained))
    moments, remat = memory or memory_of(config)
    moments = ON_DEVICE if abstract else moments
    first = partial(
        init_state,
        optimizer=optimizer_of(config),
        dynamic_scale=scales_loss(config),
        moments=moments,
        layout=None if abstract else layout,
    )
    state = jax.eval_shape(first, parts.trained) if abstract else first(parts.trained)
    program = program_of(config, parts.graph, Memory(moments, remat), layout)
    if layout is None and remat in WHOLE_LAYERS and goes_by_layer(device or jax.local_devices()[0]):
        inputs = PLACEMENTS["host" if remat == "host" else "device"]
        program = layered.by_layer(program, moments, inputs, updates_at_once(config))
    return Training(parts.graph, program, state, parts.frozen)


def program_of(
    config: Config,
    graph: nnx.GraphDef,
    memory: Memory | None = None,
    layout: MeshLayout | None = None,
) -> steps.StepProgram:
    """Builds the step functions of a config, with the gradient as one program.

    Args:
      config: config of the run.
      graph: structure of the model, from `trees.split`.
      memory: memory choices; None takes those of the config.
      layout: split of the model over a mesh; None for one device.
    """
    memory = memory or memory_of(config)
    return steps.build(
        graph,
        optimizer_of(config),
        compute_dtype=jnp.dtype(config.model.compute_dtype),
        remat=memory.remat,
        clip_norm=config.optimizer.clip_norm,
        method=config.method,
        layer_inputs=config.model.layer_inputs,
        moments=memory.moments,
        layout=layout,
    )


def goes_by_layer(device: Hardware) -> bool:
    """Returns whether a gradient that recomputes whole layers runs layer by layer on a device.

    On a CPU the gradient is one program. That is faster and takes no more memory, because a CPU
    program allocates its memory in each call, and the device memory is the host memory.
    """
    return capability_of(device) is not None


def updates_at_once(config: Config) -> bool:
    """Returns whether a layer can be updated before the gradients of all layers are known.

    This needs a single micro-batch, no dynamic loss scale (which may have to undo a whole step),
    and either no clipping or `optimizer.norm_first`, which computes the norm before the updates.
    """
    several = config.train.gradient_accumulation > 1
    waits = config.optimizer.clip_norm > 0 and not config.optimizer.norm_first
    return not (waits or several or scales_loss(config))


def optimizer_of(config: Config) -> optax.GradientTransformation:
    """Returns the optimizer of a config."""
    return adamw(config.optimizer, config.train.step_count)


def scales_loss(config: Config) -> bool:
    """Returns whether the loss has a dynamic scale; without it float16 gradients underflow."""
    return config.model.compute_dtype == "float16"


def drops_out(config: Config) -> bool:
    """Returns whether a step draws random numbers, for dropout on the adapters' inputs."""
    return config.lora.dropout > 0 and config.method != "full"

"""From a model and a config to what trains it: the one place where settings become a step."""

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


class Training(NamedTuple):
    """A model with what trains it.

    Attributes:
      graph: the model's structure.
      program: the functions of a step.
      state: everything that a step changes, such as the trained tree.
      frozen: the tree that no step changes.
    """

    graph: nnx.GraphDef
    program: steps.StepProgram
    state: steps.TrainState
    frozen: Any

    def model(self) -> Decoder:
        """Returns the model with what has been trained so far."""
        return nnx.merge(self.graph, self.state.trained, self.frozen)

    def gathered(self) -> Decoder:
        """Returns the same with all that has been trained on every device."""
        layout, trained = self.program.recipe.layout, self.state.trained
        if layout is not None:
            trained = layout.everywhere(trained)
        return nnx.merge(self.graph, trained, self.frozen)


def assemble(
    config: Config,
    parts: SplitModel,
    memory: Memory | None = None,
    device: Hardware | None = None,
    layout: MeshLayout | None = None,
) -> Training:
    """Builds the step that a config asks for, and the state before the first one.

    Args:
      config: the run's config.
      parts: the model, of arrays or of `jax.ShapeDtypeStruct`; the state is of the same, and no
        memory holds it.
      memory: what is kept, and where; None is what the config asks for.
      device: where the step will run; None is the default device.
      layout: how `parts` is split over a mesh; None is one device.
    """
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(parts.trained))
    moments, remat = memory or memory_of(config)
    moments = ON_DEVICE if abstract else moments
    first = partial(
        steps.init,
        optimizer=optimizer_of(config),
        dynamic_scale=scales_loss(config),
        moments=moments,
        layout=None if abstract else layout,
    )
    state = jax.eval_shape(first, parts.trained) if abstract else first(parts.trained)
    program = program_of(config, parts.graph, Memory(moments, remat), layout)
    if layout is None and remat in WHOLE_LAYERS and goes_by_layer(device or jax.local_devices()[0]):
        inputs = PLACEMENTS["host" if remat == "host" else "device"]
        program = layered.of(program, moments, inputs, updates_at_once(config))
    return Training(parts.graph, program, state, parts.frozen)


def program_of(
    config: Config,
    graph: nnx.GraphDef,
    memory: Memory | None = None,
    layout: MeshLayout | None = None,
) -> steps.StepProgram:
    """Builds the functions of the step that a config asks for, with a gradient in one program.

    Args:
      config: the run's config.
      graph: the model's structure, from `trees.split`.
      memory: what is kept, and where; None is what the config asks for.
      layout: how the model is split over a mesh; None is one device.
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
    """Whether whole layers that are recomputed are programs of their own on a device.

    On a CPU one program is faster and takes no more memory: there a program's memory is made anew
    in each call, and the host is the device.
    """
    return capability_of(device) is not None


def updates_at_once(config: Config) -> bool:
    """Whether a layer can be updated before the gradients of all are known.

    Nothing waits for them: no clipping by a norm that is not known yet, no further micro-batch, no
    loss scale at which a whole step may have to be undone.
    """
    several = config.train.gradient_accumulation > 1
    waits = config.optimizer.clip_norm > 0 and not config.optimizer.norm_first
    return not (waits or several or scales_loss(config))


def optimizer_of(config: Config) -> optax.GradientTransformation:
    """Returns the optimizer that a config asks for."""
    return adamw(config.optimizer, config.train.step_count)


def scales_loss(config: Config) -> bool:
    """Whether the loss has a dynamic scale, since gradients in float16 would underflow."""
    return config.model.compute_dtype == "float16"


def drops_out(config: Config) -> bool:
    """Whether a step draws random numbers: dropout is on the input of adapters."""
    return config.lora.dropout > 0 and config.method != "full"

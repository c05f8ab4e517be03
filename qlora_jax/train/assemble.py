"""From a model and a config to what trains it: the one place where settings become a step."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qlora_jax.config import Config
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.trees import Split
from qlora_jax.train import step as steps
from qlora_jax.train.offload import ON_DEVICE, Placement
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
    program: steps.Program
    state: steps.State
    frozen: Any

    def model(self) -> Decoder:
        """Returns the model with what has been trained so far."""
        return nnx.merge(self.graph, self.state.trained, self.frozen)


def assemble(config: Config, parts: Split, moments: Placement = ON_DEVICE) -> Training:
    """Builds the step that a config asks for, and the state before the first one.

    Args:
      config: the run's config.
      parts: the model, of arrays or of `jax.ShapeDtypeStruct`; the state is of the same.
      moments: where the optimizer's state lives.
    """
    first = partial(
        steps.init,
        optimizer=optimizer_of(config),
        dynamic_scale=scales_loss(config),
        moments=moments,
    )
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(parts.trained))
    state = jax.eval_shape(first, parts.trained) if abstract else first(parts.trained)
    return Training(parts.graph, program_of(config, parts.graph, moments), state, parts.frozen)


def program_of(
    config: Config, graph: nnx.GraphDef, moments: Placement = ON_DEVICE
) -> steps.Program:
    """Builds the functions of the step that a config asks for, without a state.

    Args:
      config: the run's config.
      graph: the model's structure, from `trees.split`.
      moments: where the optimizer's state lives.
    """
    return steps.build(
        graph,
        optimizer_of(config),
        compute_dtype=jnp.dtype(config.model.compute_dtype),
        remat=config.model.remat,
        clip_norm=config.optimizer.clip_norm,
        train_head=config.method == "full",
        moments=moments,
    )


def optimizer_of(config: Config) -> optax.GradientTransformation:
    """Returns the optimizer that a config asks for."""
    return adamw(config.optimizer, config.train.step_count)


def scales_loss(config: Config) -> bool:
    """Whether the loss has a dynamic scale, since gradients in float16 would underflow."""
    return config.model.compute_dtype == "float16"


def drops_out(config: Config) -> bool:
    """Whether a step draws random numbers: dropout is on the input of adapters."""
    return config.lora.dropout > 0 and config.method != "full"

"""Adds up the device memory of a step's programs, by the compiler's own buffer assignment.

On a mesh the bytes are those of one device; all devices hold the same number of bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qlora_jax.config import Config
from qlora_jax.kernels.select import choose_kernel
from qlora_jax.kernels.target import Hardware
from qlora_jax.models.config import DecoderConfig
from qlora_jax.plan.abstract import (
    abstract_batch,
    abstract_key,
    abstract_model,
    everywhere,
    spread_moments,
    with_shardings,
)
from qlora_jax.plan.device_bytes import nbytes
from qlora_jax.plan.exact import gradients
from qlora_jax.plan.gradient_programs import GradientProgram, gradient_programs
from qlora_jax.train import layer_groups
from qlora_jax.train import step as steps
from qlora_jax.train.assemble import assemble
from qlora_jax.train.state import TrainState

Compile = Callable[..., jax.stages.Compiled]
"""Function (function, *arguments, donate) to compiled program; the arguments are shapes."""


class ProgramMemory(NamedTuple):
    """Memory of one compiled program, in bytes.

    Attributes:
      name: name of the program, such as "gradient" or "update of a layer".
      arguments, outputs, alias, temp: the compiler's figures; `alias` counts outputs that reuse the
        memory of an argument.
      elsewhere: device bytes of training arrays that exist while the program runs and are not its
        arguments.
      host: bytes in pinned host memory: temporaries, which `temp` does not count, and inputs of
        layers.
    """

    name: str
    arguments: int
    outputs: int
    alias: int
    temp: int
    elsewhere: int
    host: int = 0

    @property
    def device(self) -> int:
        return self.arguments + self.outputs - self.alias + self.temp + self.elsewhere


class AbstractStep(NamedTuple):
    """The functions of a step, and the shapes of their arguments.

    Attributes:
      program: functions of the step.
      state: shapes of the training state, with the moments of every layer.
      gradients: shapes of the gradients that the gradient program returns.
      frozen, batch, key: shapes of the gradient program's other arguments.
    """

    program: steps.StepProgram
    state: TrainState
    gradients: Any
    frozen: Any
    batch: Mapping[str, jax.ShapeDtypeStruct]
    key: jax.ShapeDtypeStruct | None


def abstract_step(
    config: Config, decoder: DecoderConfig, hardware: Hardware, mesh: Mesh | None = None
) -> AbstractStep:
    """Returns the step of a run in shapes, with the 4-bit kernel for this hardware.

    Args:
      config: config of the run.
      decoder: shapes of the model.
      hardware: device, real or described.
      mesh: devices over which the model is split; None is one device.

    Raises:
      UserError: settings exclude each other, or the hardware does not support them.
    """
    model, layout = abstract_model(config, decoder, choose_kernel(config, hardware)), None
    if mesh is not None:
        model, layout = with_shardings(mesh, model)
    program, state, frozen = assemble(config, model, device=hardware, layout=layout)[1:]
    rest = abstract_batch(config), abstract_key(config)
    if layout is not None:
        moments = spread_moments(layout, model.trained, state.optimizer)
        state = everywhere(layout.mesh, state._replace(trained=(), optimizer=()))
        state = state._replace(trained=model.trained, optimizer=moments)
        rest = everywhere(layout.mesh, rest)
    return step_of(program, state, frozen, *rest)


def step_of(
    program: steps.StepProgram,
    state: TrainState,
    frozen: Any,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    key: jax.ShapeDtypeStruct | None,
) -> AbstractStep:
    """Returns the abstract step of a program, with the shapes of its gradients.

    Args:
      program: functions of the step.
      state, frozen, batch, key: shapes of the arguments of `program.gradient`.
    """
    slopes = gradients(state.trained, batch["mask"].shape[0])
    return AbstractStep(program, state, slopes, frozen, batch, key)


def gradient_memory(step: AbstractStep, compile_: Compile) -> list[ProgramMemory]:
    """Compiles the gradient's programs; their memory is without moments (see `with_moments`)."""
    made = []
    for part in list_gradient_programs(step):
        compiled = compile_(part.function, *part.arguments, donate=part.donate)
        made.append(memory_of(part, compiled))
    return made


def list_gradient_programs(step: AbstractStep) -> list[GradientProgram]:
    """Returns the programs of a step's gradient."""
    return list(gradient_programs(step.program, step.state, step.frozen, step.batch, step.key))


class LayerUpdate(NamedTuple):
    """The update of one layer of a group.

    Attributes:
      name: name of the program.
      function: function to compile.
      arguments: trees of shapes; the first and the fourth argument are donated.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def layer_updates(step: AbstractStep) -> Iterator[LayerUpdate]:
    """Yields the update of one layer of each group."""
    leaves, slopes = jax.tree.leaves(step.state.trained), jax.tree.leaves(step.gradients)
    at_once = step.program.direct is not None
    first = 0
    for group in layer_groups.find_groups(step.state.trained):
        own, grads = ([xs[p] for p in group.places] for xs in (leaves, slopes))
        if at_once and group.layers:
            grads = [jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in grads]
        moments = step.state.optimizer[first]
        index, finite = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, jnp.bool_))

        def update(
            own: Any,
            grads: Any,
            i: Any,
            moments: Any,
            finite: Any,
            group: layer_groups.LayerGroup = group,
        ) -> Any:
            return step.program.update_layer(group, own, grads, i, moments, finite)

        name = "update of a layer" if group.layers else "update of the rest"
        yield LayerUpdate(name, update, (own, grads, index, moments, finite))
        first += group.size


def update_memory(step: AbstractStep, compile_: Compile) -> list[ProgramMemory]:
    """Compiles the update of one layer of each group; other layers' moments are not counted."""
    at_once = step.program.direct is not None
    alive = nbytes((step.state.trained, step.gradients, step.frozen))
    if at_once:  # the update runs during the backward pass, with the gradients of one layer
        alive = max(part.alive for part in list_gradient_programs(step))
    made = []
    for name, update, arguments in layer_updates(step):
        compiled = compile_(update, *arguments, donate=(0, 3))
        beside = alive - nbytes(arguments[0] if at_once else arguments[:2])
        made.append(_program_memory(name, compiled, beside))
    return made


def held_moments(step: AbstractStep, on_host: bool, updating: bool) -> tuple[int, int]:
    """Returns the (device, host) bytes of moments that are not an argument of the running program.

    Args:
      step: functions and shapes of the step.
      on_host: True if the moments are in host memory.
      updating: True while a layer's update runs, whose moments are its argument; False while a
        gradient runs.
    """
    sizes = [nbytes(state) for state in step.state.optimizer]
    if on_host:
        return (2 * max(sizes) if updating else 0), sum(sizes)
    return sum(sizes) - (max(sizes) if updating else 0), 0


def place_moments(
    step: AbstractStep,
    asked: str,
    before: Sequence[ProgramMemory],
    after: Sequence[ProgramMemory],
    limit: int,
) -> tuple[str, list[ProgramMemory]]:
    """Decides the memory of the moments, and adds the moments on the device to each program.

    Args:
      step: functions and shapes of the step.
      asked: `optimizer.offload`; auto is the host if the moments do not fit on the device.
      before, after: memory of the gradient's and of the update's programs, without moments.
      limit: device bytes that the run may use.

    Returns:
      "device" or "host", and the memory of all programs with moments, in the same order.
    """
    made: list[ProgramMemory] = []
    for offload in ("device", "host") if asked == "auto" else (asked,):
        away = offload == "host"
        made = [with_moments(step, away, memory, False) for memory in before]
        made += [with_moments(step, away, memory, True) for memory in after]
        if max(memory.device for memory in made) <= limit:
            break
    return offload, made


def with_moments(
    step: AbstractStep, on_host: bool, memory: ProgramMemory, updating: bool
) -> ProgramMemory:
    """Adds to a program's memory the moments on the device that are not its argument."""
    # If layers are updated during the backward pass, the moments of two layers may still be on the
    # device.
    device, _ = held_moments(
        step, on_host, updating or (on_host and step.program.direct is not None)
    )
    return memory._replace(elsewhere=memory.elsewhere + device)


def memory_of(part: GradientProgram, compiled: jax.stages.Compiled) -> ProgramMemory:
    """Returns the memory of a compiled gradient program, with the arrays that exist beside it."""
    memory = _program_memory(part.name, compiled, 0)
    return memory._replace(elsewhere=part.alive - memory.arguments, host=memory.host + part.host)


def _program_memory(name: str, compiled: jax.stages.Compiled, elsewhere: int) -> ProgramMemory:
    found: Any = compiled.memory_analysis()
    return ProgramMemory(
        name,
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        elsewhere,
        found.host_temp_size_in_bytes,
    )

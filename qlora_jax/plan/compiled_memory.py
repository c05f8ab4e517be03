"""Adds up what the programs of a step hold on a device, by the compiler's own assignment.

On a mesh the bytes are those of one of its devices, all of which hold the same.
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
    spread,
    spread_moments,
)
from qlora_jax.plan.exact import gradients
from qlora_jax.plan.gradient_programs import GradientProgram, gradient_programs
from qlora_jax.plan.share import nbytes
from qlora_jax.train import layer_groups
from qlora_jax.train import step as steps
from qlora_jax.train.assemble import assemble

Compile = Callable[..., jax.stages.Compiled]
"""(function, *arguments, donate) to a compiled program; the arguments are abstract."""


class ProgramMemory(NamedTuple):
    """One program's bytes on the device.

    Attributes:
      name: gradient, or update and what of.
      arguments, outputs, alias, temp: the compiler's figures; `alias` is of outputs that take an
        argument's place.
      elsewhere: arrays of the training that live meanwhile and are no argument.
      host: bytes in pinned host memory: temporaries, which `temp` leaves out, and inputs of layers.
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
    """The functions of a step with the shapes they are called with.

    Attributes:
      program: its functions.
      state: with the moments of every unit.
      gradients: as the gradient program returns them.
      frozen, batch, key: the gradient program's other arguments.
    """

    program: steps.StepProgram
    state: steps.TrainState
    gradients: Any
    frozen: Any
    batch: Mapping[str, jax.ShapeDtypeStruct]
    key: jax.ShapeDtypeStruct | None


def abstract_step(
    config: Config, decoder: DecoderConfig, hardware: Hardware, mesh: Mesh | None = None
) -> AbstractStep:
    """Returns the step of a run in shapes, with the kernel that it would take on this hardware.

    Args:
      config: of the run.
      decoder: the model's shapes.
      hardware: a device.
      mesh: the devices over which the model is split; None is one.

    Raises:
      UserError: settings that do not go together, or with the hardware.
    """
    model, layout = abstract_model(config, decoder, choose_kernel(config, hardware)), None
    if mesh is not None:
        model, layout = spread(mesh, model)
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
    state: steps.TrainState,
    frozen: Any,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    key: jax.ShapeDtypeStruct | None,
) -> AbstractStep:
    """Returns the step of a program, with the shapes of its gradients.

    Args:
      program: the functions.
      state, frozen, batch, key: in shapes, what `program.gradient` is called with.
    """
    slopes = gradients(state.trained, batch["mask"].shape[0])
    return AbstractStep(program, state, slopes, frozen, batch, key)


def gradient_memory(step: AbstractStep, compile_: Compile) -> list[ProgramMemory]:
    """Compiles the programs of the gradient, without moments: `with_moments` adds them."""
    made = []
    for piece in gradient_pieces(step):
        compiled = compile_(piece.function, *piece.arguments, donate=piece.donate)
        made.append(memory_of(piece, compiled))
    return made


def gradient_pieces(step: AbstractStep) -> list[GradientProgram]:
    """Returns the programs of the gradient."""
    return list(gradient_programs(step.program, step.state, step.frozen, step.batch, step.key))


class LayerUpdate(NamedTuple):
    """The update of one unit of a group: what it is of, the function, and its abstract arguments.

    The first and the fourth argument are donated.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def layer_updates(step: AbstractStep) -> Iterator[LayerUpdate]:
    """Yields the update of a unit of each group."""
    leaves, slopes = jax.tree.leaves(step.state.trained), jax.tree.leaves(step.gradients)
    at_once = step.program.direct is not None
    first = 0
    for group in layer_groups.find_groups(step.state.trained):
        own, grads = ([xs[p] for p in group.places] for xs in (leaves, slopes))
        if at_once and group.layers:
            grads = [jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in grads]
        moments = step.state.optimizer[first]
        index, finite = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, jnp.bool_))

        def update(own: Any, grads: Any, i: Any, moments: Any, finite: Any, group=group) -> Any:
            return step.program.update_layer(group, own, grads, i, moments, finite)

        name = "update of a layer" if group.layers else "update of the rest"
        yield LayerUpdate(name, update, (own, grads, index, moments, finite))
        first += group.size


def update_memory(step: AbstractStep, compile_: Compile) -> list[ProgramMemory]:
    """Compiles the update of a unit of each group, without the other units' moments."""
    at_once = step.program.direct is not None
    alive = nbytes((step.state.trained, step.gradients, step.frozen))
    if at_once:  # on the way back through the layers, beside the gradients of one
        alive = max(piece.alive for piece in gradient_pieces(step))
    made = []
    for name, update, arguments in layer_updates(step):
        compiled = compile_(update, *arguments, donate=(0, 3))
        beside = alive - nbytes(arguments[0] if at_once else arguments[:2])
        made.append(_account(name, compiled, beside))
    return made


def held_moments(step: AbstractStep, on_host: bool, updating: bool) -> tuple[int, int]:
    """Returns the (device, host) bytes of moments that are no argument of a program.

    Args:
      step: the step.
      on_host: whether they live there.
      updating: whether a unit's update runs, whose own moments are its argument; else a gradient.
    """
    sizes = [nbytes(unit) for unit in step.state.optimizer]
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
    """Decides where moments live, and adds those on the device to the accounts, in their order.

    Args:
      step: the step.
      asked: `optimizer.offload`; auto is the host where they do not fit on the device.
      before, after: accounts of the gradient's and of the update's programs, without moments.
      limit: bytes that there are.
    """
    made: list[ProgramMemory] = []
    for offload in ("device", "host") if asked == "auto" else (asked,):
        away = offload == "host"
        made = [with_moments(step, away, account, False) for account in before]
        made += [with_moments(step, away, account, True) for account in after]
        if max(account.device for account in made) <= limit:
            break
    return offload, made


def with_moments(
    step: AbstractStep, on_host: bool, account: ProgramMemory, updating: bool
) -> ProgramMemory:
    """Adds to an account the moments that are on the device and no argument of the program."""
    # where layers are updated on the way back, moments of two may still be on the device
    device, _ = held_moments(
        step, on_host, updating or (on_host and step.program.direct is not None)
    )
    return account._replace(elsewhere=account.elsewhere + device)


def memory_of(piece: GradientProgram, compiled: jax.stages.Compiled) -> ProgramMemory:
    """Returns the account of a compiled piece, with what lives beside it."""
    account = _account(piece.name, compiled, 0)
    return account._replace(
        elsewhere=piece.alive - account.arguments, host=account.host + piece.host
    )


def _account(name: str, compiled: jax.stages.Compiled, elsewhere: int) -> ProgramMemory:
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

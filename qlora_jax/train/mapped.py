"""Trains the K members of a population in one program, as trees with a leading axis K.

If a member has a smaller rank or fewer target modules than others, its adapters are padded with
zeros, whose gradients are exactly zero. The base has no axis K: a product with a base weight
treats the members as additional rows (`kernels/matmul.py`), so each weight is decoded only once.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax.config import Config
from qlora_jax.lora import LoraSet, LoraWeights, choose_adapters
from qlora_jax.lora.groups import group_labels
from qlora_jax.lora.masks import is_variable
from qlora_jax.lora.spec import AdapterSpec
from qlora_jax.lora.variables import LoraScale
from qlora_jax.models import trees
from qlora_jax.models.decoder import Decoder, attach, detach
from qlora_jax.runtime.mesh import DATA, on_devices, put_on_devices
from qlora_jax.train import export, layer_groups
from qlora_jax.train import step as steps
from qlora_jax.train.assemble import optimizer_of, program_of
from qlora_jax.train.offload import memory_of
from qlora_jax.train.state import TrainState


class MemberConstants(NamedTuple):
    """The constants that differ between members.

    Attributes:
      scales: adapter scales, float32[K, L] for each stack of adapters.
      rate: peak learning rates, float32[K].
      rate_of_b: peak learning rates of B, float32[K].
    """

    scales: Sequence[jax.Array]
    rate: jax.Array
    rate_of_b: jax.Array


class Adapters(NamedTuple):
    """The adapters of all members over one model, as trees.

    Attributes:
      graph: structure of the model, with an adapter on every linear that any member targets.
      trained: A and B of all adapters, [K, ...] each.
      own: constants of each member.
      frozen: base, with placeholders for the scales.
      specs: for each member, a map from module path to adapter spec.
      own_batches: whether the batches have a leading axis K, a different batch for each member.
    """

    graph: nnx.GraphDef
    trained: Any
    own: MemberConstants
    frozen: Any
    specs: Sequence[Mapping[str, AdapterSpec]]
    own_batches: bool = False


class PopulationProgram(NamedTuple):
    """The compiled functions of a population.

    Attributes:
      init: function (trained [K, ...]) -> moments.
      step: function (trained, moments, own, frozen, batch) -> (trained, moments, Figures with
        arrays [K]); donates trained and moments. The batch is [k, B, T], or [K, k, B, T] if
        members have different batches.
      evaluate: function (trained, own, frozen, batch [B, T]) -> loss sums [K], token counts [K].
    """

    init: Callable[[Any], Any]
    step: Callable[..., tuple[Any, Any, steps.Figures]]
    evaluate: Callable[..., tuple[jax.Array, jax.Array]]


def union(model: Decoder, configs: Sequence[Config]) -> dict[str, AdapterSpec]:
    """Returns all linears that any member targets, each with the largest rank of the members.

    Raises:
      UserError: `lora.target_modules` matches no module.
    """
    linears = model.linears()
    specs = [choose_adapters(config.lora, linears) for config in configs]
    return {
        path: AdapterSpec(max(s[path].rank for s in specs if path in s), 1.0, 1.0)
        for path in linears
        if any(path in s for s in specs)
    }


def draw(model: Decoder, configs: Sequence[Config], common: Mapping[str, AdapterSpec]) -> Adapters:
    """Draws the adapters of each member as a single run would, and stacks them.

    Args:
      model: loaded model; this function replaces its adapters by placeholders.
      configs: configs of the members.
      common: adapter specs to which all members are padded, from `union`.
    """
    specs = [choose_adapters(config.lora, model.linears()) for config in configs]
    drawn = []
    for config, planned in zip(configs, specs):
        _attach(model, planned, config)
        _, trained, frozen = trees.split(model, config.method)
        drawn.append(trees.flatten(trained) | _scales(frozen))
    _attach(model, common, configs[0])
    graph, trained, frozen = trees.split(model, configs[0].method)

    def stacked(like: Mapping[str, jax.Array]) -> list[jax.Array]:
        return [_stacked([leaves.get(path) for leaves in drawn], x) for path, x in like.items()]

    stacks = stacked(trees.flatten(trained))
    rate = jnp.array([c.optimizer.learning_rate for c in configs], jnp.float32)
    ratio = jnp.array([c.optimizer.lora_plus_ratio for c in configs], jnp.float32)
    own = MemberConstants(stacked(_scales(frozen)), rate, rate * ratio)
    return Adapters(
        graph, jax.tree.unflatten(jax.tree.structure(trained), stacks), own, frozen, specs
    )


def build(config: Config, adapters: Adapters, mesh: Mesh | None = None) -> PopulationProgram:
    """Builds the functions of a population; jax compiles each function at its first call.

    The functions accept other members too, with the same linears and the same number of members.

    Args:
      config: config with the settings that the members share.
      adapters: adapters of the first group of members.
      mesh: devices over which the members are split along `DATA`; None for one device.
    """
    # The learning rate is a factor on AdamW's update, decay included. So all members share an
    # optimizer with rate 1, and `_moved` multiplies the update by each member's rate.
    shared = dataclasses.replace(config.optimizer, learning_rate=1.0, lora_plus_ratio=1.0)
    config = dataclasses.replace(config, optimizer=shared)
    optimizer, single = optimizer_of(config), program_of(config, adapters.graph, memory_of(config))
    init: Callable[..., Any] = jax.vmap(partial(first_moments, optimizer))
    step: Callable[..., Any]
    look: Callable[..., Any]
    step, look = partial(take_step, single, optimizer), partial(evaluate, single)
    if mesh is not None:
        own, same = PartitionSpec(DATA), PartitionSpec()
        batch = own if adapters.own_batches else same
        init = on_devices(mesh, init, (own,), own)
        look = on_devices(mesh, look, (own, own, same, same), own)
        step = on_devices(mesh, step, (own, own, own, same, batch), own)
    return PopulationProgram(
        init=jax.jit(init),
        step=jax.jit(step, donate_argnums=(0, 1)),
        evaluate=jax.jit(look),
    )


def placed(mesh: Mesh | None, adapters: Adapters) -> Adapters:
    """Returns the adapters with the members split over the mesh, and the base on every device."""
    if mesh is None:
        return adapters
    own, same = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((DATA,), ()))

    def on(home: NamedSharding, tree: Any) -> Any:
        return put_on_devices(tree, jax.tree.map(lambda _: home, tree))

    return adapters._replace(
        trained=on(own, adapters.trained),
        own=on(own, adapters.own),
        frozen=on(same, adapters.frozen),
    )


def first_moments(optimizer: optax.GradientTransformation, trained: Any) -> list[Any]:
    """Returns one member's moments before the first step, for each layer group."""
    leaves = jax.tree.leaves(trained)
    return [
        jax.vmap(optimizer.init)(
            layer_groups.stack(group, [leaves[place] for place in group.places])
        )
        for group in layer_groups.find_groups(trained)
    ]


def take_step(
    single: steps.StepProgram,
    optimizer: optax.GradientTransformation,
    trained: Any,
    moments: Any,
    own: MemberConstants,
    frozen: Any,
    batch: Any,
) -> tuple[Any, Any, steps.Figures]:
    """Takes a step of every member with `jax.vmap`, the base unmapped; `PopulationProgram.step`."""

    def member(trained: Any, moments: Any, own: MemberConstants, batch: Any) -> Any:
        state = TrainState(trained, (), jnp.int32(0), jnp.float32(1), jnp.int32(0))
        grads, figures = single.gradient(state, _scaled(frozen, own), batch, None)
        return *_moved(optimizer, trained, grads, moments, own, figures.finite), figures

    axes = (0, 0, 0, 0 if batch["mask"].ndim == 4 else None)
    return jax.vmap(member, in_axes=axes)(trained, moments, own, batch)


def evaluate(
    single: steps.StepProgram, trained: Any, own: MemberConstants, frozen: Any, batch: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns each member's loss sum and token count of a batch; `PopulationProgram.evaluate`."""

    def member(trained: Any, own: MemberConstants) -> tuple[jax.Array, jax.Array]:
        return single.evaluate(trained, _scaled(frozen, own), batch)

    return jax.vmap(member)(trained, own)


def _moved(
    optimizer: optax.GradientTransformation,
    trained: Any,
    grads: Any,
    moments: Sequence[Any],
    own: MemberConstants,
    finite: jax.Array,
) -> tuple[Any, list[Any]]:
    """Returns one member's trained tree and moments after an update; unchanged if not finite."""
    leaves, slopes, after = jax.tree.leaves(trained), jax.tree.leaves(grads), []

    def moved(x: jax.Array, update: jax.Array, group: str) -> jax.Array:
        rate = own.rate_of_b if group == "b" else own.rate
        return jnp.where(finite, (x + update * rate).astype(x.dtype), x)

    for group, before in zip(layer_groups.find_groups(trained), moments):
        params, along = (
            layer_groups.stack(group, [xs[place] for place in group.places])
            for xs in (leaves, slopes)
        )
        # one layer at a time, as in a single run: a block of 8-bit moments never spans two layers
        updates, new = jax.vmap(optimizer.update)(along, before, params)
        params = jax.tree.map(moved, params, updates, group_labels(params))
        for place, leaf in zip(group.places, layer_groups.stack_leaves(group, params)):
            leaves[place] = leaf
        after.append(jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, before))
    return jax.tree.unflatten(jax.tree.structure(trained), leaves), after


def _scaled(frozen: Any, own: MemberConstants) -> Any:
    """Returns the frozen tree with the adapter scales of one member."""
    scales = iter(own.scales)

    def scaled(variable: Any) -> Any:
        if not isinstance(variable, LoraScale):
            return variable
        return jax.tree.map(lambda _: next(scales), variable)

    return jax.tree.map(scaled, frozen, is_leaf=is_variable)


def extract(adapters: Adapters, trained: Any, k: int) -> LoraSet:
    """Returns the adapters of member k without padding, by module path."""
    tree = jax.tree.map(lambda x: x[k], trained)
    model: Decoder = nnx.merge(adapters.graph, tree, adapters.frozen)
    return {
        path: LoraWeights(found.a[:, : spec.rank], found.b[: spec.rank], spec.alpha, spec.scale)
        for path, found in export.adapters(model).items()
        if (spec := adapters.specs[k].get(path))
    }


def _attach(model: Decoder, specs: Mapping[str, AdapterSpec], config: Config) -> None:
    detach(model)
    key, dtype = jax.random.key(config.train.seed), jnp.dtype(config.lora.dtype)
    attach(model, specs, key, init=config.lora.init, dtype=dtype)


def _scales(frozen: Any) -> dict[str, jax.Array]:
    found = trees.flatten(frozen, is_variable)
    return {path: x.get_value() for path, x in found.items() if isinstance(x, LoraScale)}


def _stacked(members: Sequence[jax.Array | None], like: jax.Array) -> jax.Array:
    """Stacks arrays, each padded with zeros to the shape of `like`; None becomes all zeros."""
    # with NumPy, because jax would compile a program for every rank
    whole = np.zeros((len(members), *like.shape), like.dtype)
    for place, x in zip(whole, members):
        if x is not None:
            place[tuple(slice(size) for size in x.shape)] = x
    return jnp.array(whole)

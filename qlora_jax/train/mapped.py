"""The members of a population as trees with an axis K, and the programs that train them all.

Ranks and targets that a member lacks are zeros, whose gradients are exactly zero. The base has no
axis K: products with its weights see the members as more rows (`kernels/matmul.py`), so that a
weight is decoded once for all.
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
from qlora_jax.runtime.mesh import DATA, on_devices, sent
from qlora_jax.train import export, layer_groups
from qlora_jax.train import step as steps
from qlora_jax.train.assemble import optimizer_of, program_of
from qlora_jax.train.offload import memory_of


class MemberConstants(NamedTuple):
    """What is fixed for each member.

    Attributes:
      scales: the scale of each stack of adapters, float32[K, L].
      rate: peak learning rate, float32[K].
      rate_of_b: peak learning rate of B, float32[K].
    """

    scales: Sequence[jax.Array]
    rate: jax.Array
    rate_of_b: jax.Array


class Adapters(NamedTuple):
    """The members' adapters over one model, as trees.

    Attributes:
      graph: the model's structure, with an adapter on every linear that a member targets.
      trained: A and B, [K, ...] each.
      own: the settings that are fixed for each member.
      frozen: the base, and placeholders for the scales.
      specs: module path to adapter, for each member.
      own_batches: whether each member has batches of its own.
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
      init: trained [K, ...] to moments.
      step: (trained, moments, own, frozen, batch) to (trained, moments, Figures of [K]); donates
        the first two. The batch is [k, B, T], or [K, k, B, T] where each member has its own.
      evaluate: (trained, own, frozen, batch [B, T]) to loss sums [K] and token counts [K].
    """

    init: Callable[[Any], Any]
    step: Callable[..., tuple[Any, Any, steps.Figures]]
    evaluate: Callable[..., tuple[jax.Array, jax.Array]]


def union(model: Decoder, configs: Sequence[Config]) -> dict[str, AdapterSpec]:
    """Every linear that some member targets, with the largest rank that one has there.

    Raises:
      UserError: targets that match nothing.
    """
    linears = model.linears()
    specs = [choose_adapters(config.lora, linears) for config in configs]
    return {
        path: AdapterSpec(max(s[path].rank for s in specs if path in s), 1.0, 1.0)
        for path in linears
        if any(path in s for s in specs)
    }


def draw(model: Decoder, configs: Sequence[Config], common: Mapping[str, AdapterSpec]) -> Adapters:
    """Draws every member's adapters as its own run would, and stacks them.

    Args:
      model: loaded; its adapters are replaced by placeholders.
      configs: the members' configs.
      common: the adapter specs to which all are padded, from `union`.
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
    """Compiles lazily, for any members over these linears; see `PopulationProgram`.

    Args:
      config: what the members have in common.
      adapters: of as many members as all others.
      mesh: devices over which the members are split along `DATA`; None is one device.
    """
    # A rate is a factor on AdamW's update, decay included: all members share one of rate 1.
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
    """Returns adapters whose members are split over the devices of a mesh, and the base on all."""
    if mesh is None:
        return adapters
    own, same = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((DATA,), ()))

    def on(home: NamedSharding, tree: Any) -> Any:
        return sent(tree, jax.tree.map(lambda _: home, tree))

    return adapters._replace(
        trained=on(own, adapters.trained),
        own=on(own, adapters.own),
        frozen=on(same, adapters.frozen),
    )


def first_moments(optimizer: optax.GradientTransformation, trained: Any) -> list[Any]:
    """Returns one member's moments before the first step, for each stack of layers."""
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
    """Takes a step of every member: `PopulationProgram.step`. One member's is mapped, the base is not."""

    def member(trained: Any, moments: Any, own: MemberConstants, batch: Any) -> Any:
        state = steps.TrainState(trained, (), jnp.int32(0), jnp.float32(1), jnp.int32(0))
        grads, figures = single.gradient(state, _scaled(frozen, own), batch, None)
        return *_moved(optimizer, trained, grads, moments, own, figures.finite), figures

    axes = (0, 0, 0, 0 if batch["mask"].ndim == 4 else None)
    return jax.vmap(member, in_axes=axes)(trained, moments, own, batch)


def evaluate(
    single: steps.StepProgram, trained: Any, own: MemberConstants, frozen: Any, batch: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns every member's loss sum and token count of a batch: `PopulationProgram.evaluate`."""

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
    """Returns one member's trained tree and moments after an update; as before if not finite."""
    leaves, slopes, after = jax.tree.leaves(trained), jax.tree.leaves(grads), []

    def moved(x: jax.Array, update: jax.Array, group: str) -> jax.Array:
        rate = own.rate_of_b if group == "b" else own.rate
        return jnp.where(finite, (x + update * rate).astype(x.dtype), x)

    for group, before in zip(layer_groups.find_groups(trained), moments):
        params, along = (
            layer_groups.stack(group, [xs[place] for place in group.places])
            for xs in (leaves, slopes)
        )
        # a layer at a time, as `layer_groups` does: what is stored in blocks is a layer's own
        updates, new = jax.vmap(optimizer.update)(along, before, params)
        params = jax.tree.map(moved, params, updates, group_labels(params))
        for place, leaf in zip(group.places, layer_groups.stack_leaves(group, params)):
            leaves[place] = leaf
        after.append(jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, before))
    return jax.tree.unflatten(jax.tree.structure(trained), leaves), after


def _scaled(frozen: Any, own: MemberConstants) -> Any:
    """Returns the frozen tree with one member's scales."""
    scales = iter(own.scales)

    def scaled(variable: Any) -> Any:
        if not isinstance(variable, LoraScale):
            return variable
        return jax.tree.map(lambda _: next(scales), variable)

    return jax.tree.map(scaled, frozen, is_leaf=is_variable)


def extract(adapters: Adapters, trained: Any, k: int) -> LoraSet:
    """One member's adapters, padding cut off, by module path."""
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
    """Zero-padded to one shape; nothing but padding where a member has no adapter."""
    # by NumPy, since jax would compile a program for every rank
    whole = np.zeros((len(members), *like.shape), like.dtype)
    for place, x in zip(whole, members):
        if x is not None:
            place[tuple(slice(size) for size in x.shape)] = x
    return jnp.array(whole)

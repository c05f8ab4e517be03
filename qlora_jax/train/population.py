"""Many adapters over one frozen base, trained by one program.

Members may differ in what their adapters hold and in how fast they learn. The single run's gradient
is mapped over them, so losses, norms and clipping are each member's own. Smaller ranks are padded
with zeros, whose gradients are exactly zero. The base is not mapped: products with its weights see
the members as more rows (`kernels/matmul.py`), so that a weight is decoded once for all.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qlora_jax.config import Config, changed
from qlora_jax.lora import LoraSet, LoraWeights, plan
from qlora_jax.lora.masks import is_variable
from qlora_jax.lora.spec import AdapterSpec
from qlora_jax.lora.variables import LoraScale
from qlora_jax.models import trees
from qlora_jax.models.decoder import Decoder, attach
from qlora_jax.runtime.errors import UserError
from qlora_jax.train import export, units
from qlora_jax.train import step as steps
from qlora_jax.train.assemble import optimizer_of, program_of
from qlora_jax.train.examples import Data, held_out, loader, read_data
from qlora_jax.train.optimizer import labels
from qlora_jax.train.setup import load_model, open_model

VARIED = (
    "lora.rank",
    "lora.alpha",
    "lora.scaling",
    "lora.target_modules",
    "lora.rank_pattern",
    "lora.alpha_pattern",
    "lora.init",
    "optimizer.learning_rate",
    "optimizer.lora_plus_ratio",
    "train.seed",
)
"""Settings in which members may differ."""

Overrides = Mapping[str, str]
"""Dotted setting to its text, as on the command line."""


@dataclasses.dataclass(frozen=True)
class MemberResult:
    """What became of one member.

    Attributes:
      config: its whole config.
      losses: mean loss over target tokens, a step each.
      norms: the gradient's norm before clipping, a step each.
      held_out: step to held-out loss; step 0 is before training.
      adapters: by module path, as `formats.peft.write_adapter` takes them.
      diverged: the first step whose loss or gradient was not finite, which changed nothing, as
        those after it; None where there is none.
    """

    config: Config
    losses: list[float]
    norms: list[float]
    held_out: dict[int, float]
    adapters: LoraSet
    diverged: int | None


class Own(NamedTuple):
    """What is fixed for each member.

    Attributes:
      scales: of each stack of adapters, float32[K, L].
      rate: peak learning rate, float32[K].
      rate_of_b: of B, float32[K].
    """

    scales: Sequence[jax.Array]
    rate: jax.Array
    rate_of_b: jax.Array


class Adapters(NamedTuple):
    """The members' adapters over one model, as trees.

    Attributes:
      graph: the model's structure, with an adapter on every linear that a member targets.
      trained: A and B, [K, ...] each.
      own: what is fixed for each.
      frozen: the base, and placeholders for the scales.
      specs: module path to adapter, for each member.
    """

    graph: nnx.GraphDef
    trained: Any
    own: Own
    frozen: Any
    specs: Sequence[Mapping[str, AdapterSpec]]


class Program(NamedTuple):
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


def fixed(overrides: Overrides) -> str:
    """What members must have in common: equal for overrides that can train together."""
    return json.dumps({k: v for k, v in sorted(overrides.items()) if not _varied(k)})


def train_population(
    config: Config,
    members: Sequence[Overrides],
    *,
    largest: int | None = None,
    data_seed: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int], None] = lambda step: None,
) -> list[MemberResult]:
    """Trains every member as a run of its own would be trained.

    Nothing is written. Dropout, float16 and moments on the host are a single run's.

    Args:
      config: of the run; method qlora or lora.
      members: what each changes, among `VARIED`.
      largest: members at a time, of more than that; each part runs the same program.
      data_seed: order of the data for all; None: each member's own train.seed, as in a run.
      say: called with warnings.
      progress: called with each finished step.

    Raises:
      UserError: members that differ in more, or settings that a population does not have.
    """
    configs = member_configs(config, members, data_seed)
    checkpoint, text = open_model(config, say)
    data = read_data(config, text, checkpoint.config.max_positions)
    model, _ = load_model(config, checkpoint, say)
    evaluated = held_out(config, data, text.pad_id)
    common, size = union(model, configs), largest or len(configs)
    found: list[MemberResult] = []
    program = None
    for start in range(0, len(configs), size):
        part = configs[start : start + size]
        # the last part is filled up, for the program's sake
        filled = part + [part[-1]] * (min(size, len(configs)) - len(part))
        adapters = assemble(model, filled, common)
        program = program or build(config, adapters)
        batches = _batches(filled, data, text.pad_id, data_seed)
        found += run(filled, adapters, batches, evaluated, program, progress)[: len(part)]
    return found


def run(
    configs: Sequence[Config],
    adapters: Adapters,
    batches: Iterator[Mapping[str, np.ndarray]],
    held_out: Sequence[Mapping[str, np.ndarray]],
    program: Program,
    progress: Callable[[int], None] = lambda step: None,
) -> list[MemberResult]:
    """The loop of `train_population` over one part; consumes `adapters.trained`."""
    train = configs[0].train
    trained, moments = adapters.trained, program.init(adapters.trained)
    rest = adapters.own, adapters.frozen
    evaluations: dict[int, np.ndarray] = {}

    def look(step: int) -> None:
        if held_out:
            sums = [program.evaluate(trained, *rest, batch) for batch in held_out]
            loss, count = (sum(np.asarray(x, np.float64) for x in xs) for xs in zip(*sums))
            evaluations[step] = loss / np.maximum(count, 1)

    look(0)
    figures = []
    for step in range(1, train.steps + 1):
        trained, moments, found = program.step(trained, moments, *rest, next(batches))
        figures.append(jax.device_get(found))
        if step == train.steps or (train.eval_every and step % train.eval_every == 0):
            look(step)
        progress(step)
    losses, norms, finite = (
        np.stack([getattr(f, name) for f in figures], 1) for name in ("loss", "norm", "finite")
    )
    return [
        MemberResult(
            config,
            losses[k].tolist(),
            norms[k].tolist(),
            {step: float(loss[k]) for step, loss in evaluations.items()},
            extract(adapters, trained, k),
            None if finite[k].all() else int(np.argmin(finite[k])) + 1,
        )
        for k, config in enumerate(configs)
    ]


def member_configs(
    config: Config, members: Sequence[Overrides], data_seed: int | None = None
) -> list[Config]:
    """Each member's config.

    Raises:
      UserError: as `train_population`.
    """
    if not members:
        raise UserError("a population has no members; give at least one")
    for overrides in members:
        for key in overrides:
            if not _varied(key):
                raise UserError(
                    f"{key}: members of a population have it in common; they may differ in "
                    f"{', '.join(VARIED)}"
                )
    refused = {
        "method full": config.method == "full",
        "lora.dropout": config.lora.dropout > 0,
        "model.compute_dtype float16": config.model.compute_dtype == "float16",
        "optimizer.offload host": config.optimizer.offload == "host",
    }
    if setting := next((name for name, used in refused.items() if used), None):
        raise UserError(f"{setting}: not for a population; change it, or train runs by themselves")
    configs = [changed(config, overrides) for overrides in members]
    if not config.data.packing and data_seed is None and len({c.train.seed for c in configs}) > 1:
        raise UserError(
            "data.packing false gives members of different train.seed rows of different lengths; "
            "set it to true, or give all the same order by data_seed"
        )
    return configs


def union(model: Decoder, configs: Sequence[Config]) -> dict[str, AdapterSpec]:
    """Every linear that some member targets, with the largest rank that one has there.

    Raises:
      UserError: targets that match nothing.
    """
    linears = model.linears()
    specs = [plan(config.lora, linears) for config in configs]
    return {
        path: AdapterSpec(max(s[path].rank for s in specs if path in s), 1.0, 1.0)
        for path in linears
        if any(path in s for s in specs)
    }


def assemble(
    model: Decoder, configs: Sequence[Config], common: Mapping[str, AdapterSpec]
) -> Adapters:
    """Draws every member's adapters as its own run would, and stacks them.

    Args:
      model: loaded; its adapters are replaced by placeholders.
      configs: of the members.
      common: what all are padded to, of `union`.
    """
    specs = [plan(config.lora, model.linears()) for config in configs]
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
    own = Own(stacked(_scales(frozen)), rate, rate * ratio)
    return Adapters(
        graph, jax.tree.unflatten(jax.tree.structure(trained), stacks), own, frozen, specs
    )


def build(config: Config, adapters: Adapters) -> Program:
    """Compiles lazily, for any members over these linears; see `Program`."""
    # A rate is a factor on AdamW's update, decay included: all members share one of rate 1.
    shared = dataclasses.replace(config.optimizer, learning_rate=1.0, lora_plus_ratio=1.0)
    config = dataclasses.replace(config, optimizer=shared)
    optimizer, single = optimizer_of(config), program_of(config, adapters.graph)
    return Program(
        init=jax.jit(jax.vmap(partial(first_moments, optimizer))),
        step=jax.jit(partial(take_step, single, optimizer), donate_argnums=(0, 1)),
        evaluate=jax.jit(partial(evaluate, single)),
    )


def first_moments(optimizer: optax.GradientTransformation, trained: Any) -> list[Any]:
    """Returns one member's moments before the first step, for each stack of layers."""
    leaves = jax.tree.leaves(trained)
    return [
        jax.vmap(optimizer.init)(units.stack(group, [leaves[place] for place in group.places]))
        for group in units.groups(trained)
    ]


def take_step(
    single: steps.Program,
    optimizer: optax.GradientTransformation,
    trained: Any,
    moments: Any,
    own: Own,
    frozen: Any,
    batch: Any,
) -> tuple[Any, Any, steps.Figures]:
    """`Program.step`: that of one member, mapped over all; the base is not mapped."""

    def member(trained: Any, moments: Any, own: Own, batch: Any) -> Any:
        state = steps.State(trained, (), jnp.int32(0), jnp.float32(1), jnp.int32(0))
        grads, figures = single.gradient(state, _scaled(frozen, own), batch, None)
        return *_moved(optimizer, trained, grads, moments, own, figures.finite), figures

    axes = (0, 0, 0, 0 if batch["mask"].ndim == 4 else None)
    return jax.vmap(member, in_axes=axes)(trained, moments, own, batch)


def evaluate(
    single: steps.Program, trained: Any, own: Own, frozen: Any, batch: Any
) -> tuple[jax.Array, jax.Array]:
    """`Program.evaluate`: that of one member, mapped over all; the base is not mapped."""

    def member(trained: Any, own: Own) -> tuple[jax.Array, jax.Array]:
        return single.evaluate(trained, _scaled(frozen, own), batch)

    return jax.vmap(member)(trained, own)


def _moved(
    optimizer: optax.GradientTransformation,
    trained: Any,
    grads: Any,
    moments: Sequence[Any],
    own: Own,
    finite: jax.Array,
) -> tuple[Any, list[Any]]:
    """One member's trained tree and moments after an update; the same ones if not finite."""
    leaves, slopes, after = jax.tree.leaves(trained), jax.tree.leaves(grads), []

    def moved(x: jax.Array, update: jax.Array, group: str) -> jax.Array:
        rate = own.rate_of_b if group == "b" else own.rate
        return jnp.where(finite, (x + update * rate).astype(x.dtype), x)

    for group, before in zip(units.groups(trained), moments):
        params, along = (
            units.stack(group, [xs[place] for place in group.places]) for xs in (leaves, slopes)
        )
        # a layer at a time, as `units` does: what is stored in blocks is a layer's own
        updates, new = jax.vmap(optimizer.update)(along, before, params)
        params = jax.tree.map(moved, params, updates, labels(params))
        for place, leaf in zip(group.places, units.arrays(group, params)):
            leaves[place] = leaf
        after.append(jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, before))
    return jax.tree.unflatten(jax.tree.structure(trained), leaves), after


def _scaled(frozen: Any, own: Own) -> Any:
    """The frozen tree with one member's scales."""
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
    for layers in model.runs:
        for linear in layers.linears().values():
            linear.adapter = None
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


def _batches(
    configs: Sequence[Config], data: Data, pad_id: int, data_seed: int | None
) -> Iterator[Mapping[str, np.ndarray]]:
    seeds = [c.train.seed if data_seed is None else data_seed for c in configs]
    loaders = {seed: loader(configs[0], data, pad_id, seed) for seed in dict.fromkeys(seeds)}
    while True:
        batches = {seed: next(own) for seed, own in loaders.items()}
        if len(batches) == 1:
            yield batches[seeds[0]]
        else:
            yield {
                name: np.stack([batches[seed][name] for seed in seeds])
                for name in batches[seeds[0]]
            }


def _varied(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in VARIED)

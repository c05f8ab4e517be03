"""Many adapters over one frozen base, trained by one program.

Members may differ in what adapters hold and in how fast they learn, not in the program: the single
run's gradient is mapped over them, so that losses, norms and clipping are each member's own. Smaller
ranks are padded with zeros, whose gradients are exactly zero. The base is not mapped: products with
its weights see the members as more rows (`kernels/matmul.py`), so a weight is decoded once for all.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.config import Config, changed
from qlora_jax.data.loader import Loader, held_out_batches
from qlora_jax.errors import UserError
from qlora_jax.formats import peft
from qlora_jax.lora import plan
from qlora_jax.lora.spec import AdapterSpec
from qlora_jax.models import trees
from qlora_jax.models.decoder import Decoder, attach
from qlora_jax.train import export, units
from qlora_jax.train import step as steps
from qlora_jax.train.optimizer import adamw, label
from qlora_jax.train.setup import Data, load_model, open_model, read_data

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

SCALE = "adapter.scale"
"""End of the path of what is frozen and yet a member's own."""


@dataclasses.dataclass(frozen=True)
class MemberResult:
    """What became of one member.

    Attributes:
      config: its whole config.
      losses: mean loss over target tokens, a step each.
      norms: the gradient's norm before clipping, a step each.
      held_out: step to held-out loss; step 0 is before training.
      adapters: module path to A, B, alpha and rank, as `formats.peft.write_adapter` takes them.
      diverged: the first step whose loss or gradient was not finite, which changed nothing, as
        those after it; None where there is none.
    """

    config: Config
    losses: list[float]
    norms: list[float]
    held_out: dict[int, float]
    adapters: Mapping[str, peft.Adapter]
    diverged: int | None


class Adapters(NamedTuple):
    """The members' adapters over one model, as trees.

    Attributes:
      graph: the model's structure, with an adapter on every linear that a member targets.
      trained: A and B, [K, ...] each.
      scales: the scale of each stack of adapters, float32[K, L].
      frozen: the base, of which the scales are placeholders.
      specs: module path to adapter, for each member.
    """

    graph: nnx.GraphDef
    trained: Any
    scales: list[jax.Array]
    frozen: Any
    specs: list[dict[str, AdapterSpec]]


class Program(NamedTuple):
    """The compiled functions of a population.

    Attributes:
      init: trained [K, ...] to moments.
      step: (trained, moments, scales, frozen, batch) to (trained, moments, Figures of [K]); donates
        the first two. The batch is [k, B, T], or [K, k, B, T] where each member has its own.
      evaluate: (trained, scales, frozen, batch [B, T]) to loss sums [K] and token counts [K].
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
    data_seed: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int], None] = lambda step: None,
) -> list[MemberResult]:
    """Trains every member as a run of its own would be trained, in one program.

    Nothing is written. Dropout, float16 and moments on the host are a single run's.

    Args:
      config: of the run; method qlora or lora.
      members: what each changes, among `VARIED`.
      data_seed: order of the data for all; None: each member's own train.seed, as in a run.
      say: called with warnings.
      progress: called with each finished step.

    Raises:
      UserError: members that differ in more, or settings that a population does not have.
    """
    configs = member_configs(config, members, data_seed)
    checkpoint, text = open_model(config)
    data = read_data(config, text, checkpoint.config.max_positions)
    model, _ = load_model(config, checkpoint, say)
    adapters = assemble(model, configs)
    del model
    batches = _batches(configs, data, text.pad_id, data_seed)
    train = config.train
    held_out = (
        held_out_batches(data.held_out, config.data, train.batch_size, train.eval_rows, text.pad_id)
        if data.held_out
        else []
    )
    return run(configs, adapters, batches, held_out, progress)


def run(
    configs: Sequence[Config],
    adapters: Adapters,
    batches: Iterator[Mapping[str, np.ndarray]],
    held_out: Sequence[Mapping[str, np.ndarray]],
    progress: Callable[[int], None] = lambda step: None,
) -> list[MemberResult]:
    """The loop of `train_population`; consumes `adapters.trained`."""
    program = build(configs, adapters)
    train = configs[0].train
    trained, moments = adapters.trained, program.init(adapters.trained)
    rest = adapters.scales, adapters.frozen
    evaluations: dict[int, np.ndarray] = {}

    def evaluate(step: int) -> None:
        if held_out:
            sums = [program.evaluate(trained, *rest, batch) for batch in held_out]
            loss, count = (sum(np.asarray(x, np.float64) for x in xs) for xs in zip(*sums))
            evaluations[step] = loss / np.maximum(count, 1)

    evaluate(0)
    figures = []
    for step in range(1, train.steps + 1):
        trained, moments, found = program.step(trained, moments, *rest, next(batches))
        figures.append(jax.device_get(found))
        if step == train.steps or (train.eval_every and step % train.eval_every == 0):
            evaluate(step)
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


def assemble(model: Decoder, configs: Sequence[Config]) -> Adapters:
    """Draws every member's adapters as its own run would, and stacks them.

    Args:
      model: loaded; its adapters are replaced by placeholders.
      configs: of the members.

    Raises:
      UserError: targets that match nothing.
    """
    linears = model.linears()
    specs = [plan(config.lora, linears) for config in configs]
    own = []
    for config, planned in zip(configs, specs):
        _attach(model, planned, config)
        _, trained, frozen = trees.split(model, config.method)
        scales = {p: x for p, x in trees.flatten(frozen).items() if p.endswith(SCALE)}
        own.append(trees.flatten(trained) | scales)
    union = {
        path: AdapterSpec(max(s[path].rank for s in specs if path in s), 1.0, 1.0)
        for path in linears
        if any(path in s for s in specs)
    }
    _attach(model, union, configs[0])
    graph, trained, frozen = trees.split(model, configs[0].method)

    def stacked(path: str, like: jax.Array) -> jax.Array:
        none = jnp.zeros((0,) * like.ndim, like.dtype)
        return jnp.stack([_padded(leaves.get(path, none), like.shape) for leaves in own])

    stacks = [stacked(path, x) for path, x in trees.flatten(trained).items()]
    scales = [stacked(p, x) for p, x in trees.flatten(frozen).items() if p.endswith(SCALE)]
    trained = jax.tree.unflatten(jax.tree.structure(trained), stacks)
    return Adapters(graph, trained, scales, frozen, specs)


def build(configs: Sequence[Config], adapters: Adapters) -> Program:
    """Compiles lazily; see `Program`."""
    config = configs[0]
    # A rate is a factor on AdamW's update, decay included: all members share one of rate 1.
    shared = dataclasses.replace(config.optimizer, learning_rate=1.0, lora_plus_ratio=1.0)
    optimizer = adamw(shared, config.train.steps)
    single = steps.build(
        adapters.graph,
        optimizer,
        compute_dtype=jnp.dtype(config.model.compute_dtype),
        remat=config.model.remat,
        clip_norm=config.optimizer.clip_norm,
        train_head=False,
    )
    rate = jnp.array([c.optimizer.learning_rate for c in configs], jnp.float32)
    rate_of_b = rate * jnp.array([c.optimizer.lora_plus_ratio for c in configs], jnp.float32)
    places = [i for i, p in enumerate(trees.flatten(adapters.frozen)) if p.endswith(SCALE)]

    def scaled(frozen: Any, scales: Sequence[jax.Array]) -> Any:
        leaves = jax.tree.leaves(frozen)
        for place, scale in zip(places, scales):
            leaves[place] = scale
        return jax.tree.unflatten(jax.tree.structure(frozen), leaves)

    def moments(trained: Any) -> list[Any]:
        return [jax.vmap(optimizer.init)(stack) for _, stack in _stacks(trained)]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: Any, moments: Any, scales: Any, frozen: Any, batch: Any) -> Any:
        def member(trained, moments, scales, rate, rate_of_b, batch):
            state = steps.State(trained, (), jnp.int32(0), jnp.float32(1), jnp.int32(0))
            grads, figures = single.gradient(state, scaled(frozen, scales), batch, None)
            leaves, slopes = jax.tree.leaves(trained), jax.tree.leaves(grads)
            after = []
            for (group, params), own in zip(_stacks(trained), moments):
                along = {path: slopes[place] for place, path in zip(group.places, group.paths)}
                # a layer at a time, as `units` does: what is stored in blocks is a layer's own
                updates, new = jax.vmap(optimizer.update)(along, own, params)
                for place, path in zip(group.places, group.paths):
                    by = rate_of_b if label(path) == "b" else rate
                    moved = (params[path] + updates[path] * by).astype(params[path].dtype)
                    leaves[place] = jnp.where(figures.finite, moved, params[path])
                after.append(jax.tree.map(lambda a, b: jnp.where(figures.finite, a, b), new, own))
            return jax.tree.unflatten(jax.tree.structure(trained), leaves), after, figures

        own_batch = 0 if batch["mask"].ndim == 4 else None
        mapped = jax.vmap(member, in_axes=(0, 0, 0, 0, 0, own_batch))
        return mapped(trained, moments, scales, rate, rate_of_b, batch)

    @jax.jit
    def evaluate(trained: Any, scales: Any, frozen: Any, batch: Any) -> Any:
        def member(trained, scales):
            return single.evaluate(trained, scaled(frozen, scales), batch)

        return jax.vmap(member)(trained, scales)

    return Program(jax.jit(jax.vmap(moments)), step, evaluate)


def extract(adapters: Adapters, trained: Any, k: int) -> Mapping[str, peft.Adapter]:
    """One member's adapters, padding cut off, by module path."""
    tree = jax.tree.map(lambda x: x[k], trained)
    model: Decoder = nnx.merge(adapters.graph, tree, adapters.frozen)
    return {
        path: peft.Adapter(found.a[:, : spec.rank], found.b[: spec.rank], spec.alpha, spec.rank)
        for path, found in export.adapters(model).items()
        if (spec := adapters.specs[k].get(path))
    }


def _attach(model: Decoder, specs: Mapping[str, AdapterSpec], config: Config) -> None:
    for layers in model.runs:
        for linear in layers.linears().values():
            linear.adapter = None
    key, dtype = jax.random.key(config.train.seed), jnp.dtype(config.lora.dtype)
    attach(model, specs, key, init=config.lora.init, dtype=dtype)


def _padded(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.pad(x, [(0, whole - size) for size, whole in zip(x.shape, shape)])


def _stacks(trained: Any) -> list[tuple[units.Group, dict[str, jax.Array]]]:
    leaves = jax.tree.leaves(trained)
    return [
        (group, {path: leaves[place] for place, path in zip(group.places, group.paths)})
        for group in units.groups(trained)
    ]


def _batches(
    configs: Sequence[Config], data: Data, pad_id: int, data_seed: int | None
) -> Iterator[Mapping[str, np.ndarray]]:
    seeds = [c.train.seed if data_seed is None else data_seed for c in configs]
    common = configs[0]
    loaders = {
        seed: Loader(
            data.train,
            common.data,
            batch_size=common.train.batch_size,
            gradient_accumulation=common.train.gradient_accumulation,
            seed=seed,
            pad_id=pad_id,
        )
        for seed in dict.fromkeys(seeds)
    }
    while True:
        batches = {seed: next(loader) for seed, loader in loaders.items()}
        if len(batches) == 1:
            yield batches[seeds[0]]
        else:
            yield {
                name: np.stack([batches[seed][name] for seed in seeds])
                for name in batches[seeds[0]]
            }


def _varied(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in VARIED)

"""Trains a population: many adapters over one frozen base, in one program.

Members may differ in their adapters and their learning rates (`VARIED`). The gradient of a single
run is mapped over the members (`train/mapped.py`), so each member has a separate loss, gradient
norm and clipping.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from qlora_jax.config import Config, changed
from qlora_jax.lora import LoraSet
from qlora_jax.models.config import DecoderConfig
from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.mesh import device_mesh
from qlora_jax.train.examples import Data, held_out, loader, read_data
from qlora_jax.train.mapped import Adapters, PopulationProgram, build, draw, extract, placed, union
from qlora_jax.train.setup import load_run_model, open_model
from qlora_jax.train.step_count import describe_warmup
from qlora_jax.train.targets import outer_targets

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
"""Map from a dotted setting to its value as text, as on the command line."""


@dataclasses.dataclass(frozen=True)
class MemberResult:
    """The result of training one member.

    Attributes:
      config: complete config of the member.
      losses: for each step, the mean loss over the target tokens.
      norms: for each step, the gradient norm before clipping.
      held_out: map from step to held-out loss; step 0 is before training.
      adapters: adapters by module path, the format of `formats.peft.write_adapter`.
      diverged: first step whose loss or gradient was not finite; None if there is none. Neither
        this step nor later ones change the member.
    """

    config: Config
    losses: list[float]
    norms: list[float]
    held_out: dict[int, float]
    adapters: LoraSet
    diverged: int | None


def fixed(overrides: Overrides) -> str:
    """Returns the overrides that members must share, as text; equal texts can train together."""
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
    """Trains each member like a single run, all members in one program; writes no files.

    A population does not support dropout, float16 or moments on the host. The members are split
    over the devices of `mesh.data`, and each device holds the whole base.

    Args:
      config: config that all members share; method qlora or lora.
      members: overrides of each member, with settings of `VARIED` only.
      largest: largest number of members to train at a time; more members are trained in groups
        with the same program. None trains all at a time.
      data_seed: seed of the data order of all members; None takes each member's train.seed.
      say: function called with each warning.
      progress: function called with the number of each finished step.

    Raises:
      UserError: members differ in other settings, or a setting is not supported.
    """
    configs = member_configs(config, members, data_seed)
    mesh = device_mesh(config.mesh.data, config.mesh.fsdp)
    if warning := describe_warmup(config):
        say(warning)
    checkpoint, text = open_model(config, say)
    _check_targets(configs, checkpoint.config)
    data = read_data(config, text, checkpoint.config.longest_cached)
    model, _ = load_run_model(config, checkpoint, say, mesh)
    evaluated = next(iter(held_out(config, data, text.pad_id).values()), [])
    common, most = union(model, configs), largest or len(configs)
    each = config.mesh.data
    size = -(-min(most, len(configs)) // each) * each
    own_batches = data_seed is None and len({c.train.seed for c in configs}) > 1
    found: list[MemberResult] = []
    program = None
    for start in range(0, len(configs), size):
        part = configs[start : start + size]
        # repeats the last member, because the compiled program needs `size` members
        filled = part + [part[-1]] * (size - len(part))
        adapters = draw(model, filled, common)._replace(own_batches=own_batches)
        program = program or build(config, adapters, mesh)
        adapters = placed(mesh, adapters)
        batches = _batches(filled, data, text.pad_id, data_seed, own_batches)
        found += run(filled, adapters, batches, evaluated, program, progress)[: len(part)]
    return found


def run(
    configs: Sequence[Config],
    adapters: Adapters,
    batches: Iterator[Mapping[str, np.ndarray]],
    held_out: Sequence[Mapping[str, np.ndarray]],
    program: PopulationProgram,
    progress: Callable[[int], None] = lambda step: None,
) -> list[MemberResult]:
    """Trains one group of members of `train_population`; donates `adapters.trained`."""
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
    for step in range(1, train.step_count + 1):
        trained, moments, found = program.step(trained, moments, *rest, next(batches))
        figures.append(jax.device_get(found))
        if step == train.step_count or (train.eval_every and step % train.eval_every == 0):
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
    """Returns the config of each member.

    Raises:
      UserError: an error of `train_population`.
    """
    if not members:
        raise UserError("a population has no members; give at least one")
    for overrides in members:
        for key in overrides:
            if not _varied(key):
                raise UserError(
                    f"{key}: must be equal for all members of a population; they may differ in "
                    f"{', '.join(VARIED)}"
                )
    refused = {
        "method full": config.method == "full",
        "lora.dropout": config.lora.dropout > 0,
        "model.compute_dtype float16": config.model.compute_dtype == "float16",
        "optimizer.offload host": config.optimizer.offload == "host",
        "data.eval_source of named sets": isinstance(config.data.eval_source, dict),
        "train.epochs": config.train.epochs is not None,
        "train.keep_best": config.train.keep_best,
        "train.patience": config.train.patience > 0,
        "mesh.fsdp above 1": config.mesh.fsdp > 1,
    }
    if setting := next((name for name, used in refused.items() if used), None):
        raise UserError(
            f"{setting}: a population does not support it; change it, or train single runs instead"
        )
    configs = [changed(config, overrides) for overrides in members]
    if not config.data.packing and data_seed is None and len({c.train.seed for c in configs}) > 1:
        raise UserError(
            "data.packing false gives members with different train.seed rows of different lengths; "
            "set it to true, or give data_seed, so that all members have the same order"
        )
    return configs


def _check_targets(configs: Sequence[Config], decoder: DecoderConfig) -> None:
    for config in configs:
        if outer := outer_targets(config.lora, decoder):
            raise UserError(
                f"lora.target_modules: a population does not support {outer[0]}; leave it out, or "
                "train single runs instead"
            )


def _batches(
    configs: Sequence[Config], data: Data, pad_id: int, data_seed: int | None, own: bool
) -> Iterator[Mapping[str, np.ndarray]]:
    seeds = [c.train.seed if data_seed is None else data_seed for c in configs]
    loaders = {seed: loader(configs[0], data, pad_id, seed) for seed in dict.fromkeys(seeds)}
    while True:
        batches = {seed: next(each) for seed, each in loaders.items()}
        if not own:
            yield batches[seeds[0]]
        else:
            yield {
                name: np.stack([batches[seed][name] for seed in seeds])
                for name in batches[seeds[0]]
            }


def _varied(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in VARIED)

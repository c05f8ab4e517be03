"""A population against single runs of its members, and the arrays in its program."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import Config, from_tree
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.lora import choose_adapters
from qlora_jax.models import trees
from qlora_jax.models.decoder import Decoder, attach
from qlora_jax.runtime.errors import UserError
from qlora_jax.train import export, mapped, population
from qlora_jax.train import step as steps
from qlora_jax.train.metrics import read_metrics
from qlora_jax.train.optimizer import adamw
from qlora_jax.train.state import init_state

pytestmark = pytest.mark.slow

LLAMA = Path(__file__).parents[1] / "golden" / "models" / "llama"
STEPS = 4
CLIP = 0.3
MEMBERS = (
    {"lora.rank_pattern.layers.1.self_attn.q_proj": "1"},
    {
        "lora.rank": "2",
        "lora.alpha": "3",
        "lora.scaling": "alpha/sqrt(r)",
        "lora.init": "gaussian",
        "optimizer.learning_rate": "0.003",
        "train.seed": "7",
    },
    {"lora.target_modules": "[k_proj, up_proj]", "optimizer.lora_plus_ratio": "4"},
)
DIVERGING = {"optimizer.learning_rate": "1e30"}


def common(**changes: Any) -> Config:
    tree: dict[str, Any] = {
        "model": {"path": str(LLAMA), "compute_dtype": "float32", "remat": "none"},
        "data": {"source": "examples", "sequence_length": 16},
        "output": "run",
        "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        "optimizer": {
            "learning_rate": 0.01,
            "clip_norm": CLIP,
            "weight_decay": 0.1,
            "warmup_steps": 2,
            "schedule": "cosine",
        },
        "train": {"steps": STEPS, "batch_size": 6, "eval_every": 2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section] = tree.get(section, {}) | {name: value} if name else value
    return from_tree(tree, "test")


def model_of(config: Config) -> Decoder:
    return load_model(open_folder(LLAMA), quant=config.quant, dtype=jnp.float32)


def alone(
    config: Config, batches: list[Any], held_out: dict[str, np.ndarray]
) -> tuple[list[steps.Figures], Any, float]:
    """Trains one member by a single run's program; returns figures, adapters and loss."""
    model = model_of(config)
    attach(
        model,
        choose_adapters(config.lora, model.linears()),
        jax.random.key(config.train.seed),
        init=config.lora.init,
    )
    graph, trained, frozen = trees.split(model, config.method)
    optimizer = adamw(config.optimizer, config.train.steps)
    program = steps.build(
        graph,
        optimizer,
        compute_dtype=jnp.float32,
        remat=config.model.remat,
        clip_norm=config.optimizer.clip_norm,
        method="qlora",
    )
    state, figures = init_state(trained, optimizer, False), []
    for batch in batches:
        grads, found = program.gradient(state, frozen, batch, None)
        state = program.update(state, grads, found.finite)
        figures.append(found)
    total, count = program.evaluate(state.trained, frozen, held_out)
    adapters = export.adapters(nnx.merge(graph, state.trained, frozen))
    return figures, adapters, float(total / count)


class Made(NamedTuple):
    """The population of MEMBERS, a diverging and a default member, and its program."""

    configs: list[Config]
    adapters: mapped.Adapters
    program: mapped.PopulationProgram

    def fresh(self) -> mapped.Adapters:
        """Returns the adapters with copied buffers, because a step donates them."""
        return self.adapters._replace(trained=jax.tree.map(jnp.copy, self.adapters.trained))


@pytest.fixture(scope="module")
def made() -> Made:
    configs = population.member_configs(common(), [*MEMBERS, DIVERGING, {}])
    model = model_of(common())
    adapters = mapped.draw(model, configs, mapped.union(model, configs))
    return Made(configs, adapters, mapped.build(common(), adapters))


def first(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x[0] for name, x in batch.items()}


def stacked(batches: list[list[Any]]) -> Iterator[dict[str, np.ndarray]]:
    for step in zip(*batches):
        yield {name: np.stack([b[name] for b in step]) for name in step[0]}


def test_members_train_as_they_would_alone(made: Made, make_batch: Callable[..., Any]) -> None:
    count = len(made.configs)
    batches = [[make_batch(seed=i + STEPS * k) for i in range(STEPS)] for k in range(count)]
    held_out = first(batches[0][0])
    results = population.run(made.configs, made.fresh(), stacked(batches), [held_out], made.program)
    found, bad = results[: len(MEMBERS)], results[len(MEMBERS)]
    clipped = 0
    for own, data, result in zip(made.configs, batches, found):
        figures, after, loss = alone(own, data, held_out)
        assert result.config == own
        np.testing.assert_allclose(result.losses, [f.loss for f in figures], rtol=2e-6)
        np.testing.assert_allclose(result.norms, [f.norm for f in figures], rtol=2e-4)
        clipped += sum(float(f.norm) > CLIP for f in figures)
        assert result.diverged is None
        assert list(result.held_out) == [0, 2, STEPS]
        assert result.held_out[0] == found[0].held_out[0]  # the base's loss: every B is zero
        assert result.held_out[STEPS] == pytest.approx(loss, rel=2e-6)
        assert list(result.adapters) == list(after)
        for path, adapter in result.adapters.items():
            rank = after[path].rank
            assert (adapter.rank, adapter.alpha) == (rank, after[path].alpha)
            np.testing.assert_allclose(adapter.a, after[path].a[:, :rank], rtol=0, atol=2e-5)
            np.testing.assert_allclose(adapter.b, after[path].b[:rank], rtol=0, atol=2e-5)
            assert adapter.b.any()
    assert 0 < clipped < STEPS * len(found)
    assert bad.diverged is not None
    assert not np.isfinite(bad.losses[bad.diverged - 1])
    assert all(np.isfinite(a.a).all() and np.isfinite(a.b).all() for a in bad.adapters.values())


def test_padding_stays_zero_and_the_base_is_one(made: Made, make_batch: Callable[..., Any]) -> None:
    adapters, program, count = made.fresh(), made.program, len(made.configs)
    trained, moments = adapters.trained, program.init(adapters.trained)
    rest = adapters.own, adapters.frozen
    batches = [[make_batch(seed=i) for i in range(3)]] * count
    lowered = program.step.lower(trained, moments, *rest, next(stacked(batches)))  # type: ignore[attr-defined]
    for batch in stacked(batches):
        trained, moments, _ = program.step(trained, moments, *rest, batch)
    assert program.step._cache_size() == 1  # type: ignore[attr-defined]
    flat = {path: np.asarray(x) for path, x in trees.flatten(trained).items()}
    for path, _, layer in model_of(common()).walk():
        stem = f"runs.0.{path.rpartition('.')[2]}.adapter"
        if f"{stem}.a" not in flat:
            continue
        for k, specs in enumerate(adapters.specs):
            rank = specs[path].rank if path in specs else 0
            assert not flat[f"{stem}.a"][k, layer, :, rank:].any()
            assert not flat[f"{stem}.b"][k, layer, rank:].any()
            assert flat[f"{stem}.a"][k, layer, :, :rank].all()
            assert flat[f"{stem}.b"][k, layer, :rank].all()
    assert {x.shape[0] for x in jax.tree.leaves(moments)} == {count}
    # a weight is decoded once as [in, out], not once for each member
    shapes = {linear.weight.get_value().shape[-2:] for _, linear, _ in model_of(common()).walk()}
    text = lowered.as_text()
    for k, n in shapes:
        assert re.search(rf"tensor<{k}x{n}xf32>", text)
        assert not re.search(rf"tensor<{count}x{k}x{n}x", text)


@pytest.mark.parametrize(
    ("changes", "members", "message"),
    [
        ({}, [{"lora.dropout": "0.1"}], "lora.dropout: must be equal for all members"),
        ({}, [], "a population has no members"),
        ({"lora__dropout": 0.1}, [{}], "lora.dropout: a population does not"),
        ({"method": "full"}, [{}], "method full: a population does not"),
        (
            {"model__compute_dtype": "float16"},
            [{}],
            "model.compute_dtype float16: a population does not",
        ),
        (
            {"data__eval_source": {"a": "b"}},
            [{}],
            "data.eval_source of named sets: a population does not",
        ),
        ({"train__steps": None, "train__epochs": 2}, [{}], "train.epochs: a population does not"),
        ({"train__keep_best": True}, [{}], "train.keep_best: a population does not"),
        ({"train__patience": 1}, [{}], "train.patience: a population does not"),
        ({"mesh": {"fsdp": 2}}, [{}], "mesh.fsdp above 1: a population does not"),
        ({"data__packing": False}, [{}, {"train.seed": "1"}], "data.packing false gives members"),
    ],
)
def test_what_cannot_be_a_population(
    changes: dict[str, Any], members: list[dict[str, str]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        population.member_configs(common(**changes), members)


def test_members_that_can_train_together_have_one_key() -> None:
    keys = [population.fixed(m) for m in MEMBERS]
    assert len(set(keys)) == 1
    assert population.fixed({"quant.codebook": "fp4_bnb", "lora.rank": "2"}) != keys[0]
    assert json.loads(population.fixed({"quant.codebook": "fp4_bnb", "lora.rank": "2"})) == {
        "quant.codebook": "fp4_bnb"
    }


@pytest.mark.parametrize("devices", [1, 2])
def test_a_population_from_a_config_is_the_run_of_each(
    tmp_path: Path, write_config: Callable[..., Path], run_cli: Callable[..., Any], devices: int
) -> None:
    from qlora_jax import config as configs

    path = write_config(tmp_path, train__steps=2, train__save_every=0)
    members = [
        {"lora.rank": "5"},
        {"train.seed": "5"},
        {"train.seed": "3", "optimizer.learning_rate": "0.02"},
    ]
    # groups of two members: the third member trains alone in the program for two
    common = configs.load_config(path, {"mesh.data": str(devices)})
    found = population.train_population(common, members, largest=2)
    settings = [f"--{key}={value}" for key, value in members[2].items()]
    ended = run_cli("train", path, *settings)
    assert ended.code == 0, ended.err
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    held_out = [row["eval/loss"] for row in rows if "eval/loss" in row]
    np.testing.assert_allclose(found[2].losses, losses, rtol=1e-5)
    np.testing.assert_allclose([found[2].held_out[s] for s in (0, 2)], held_out, rtol=1e-5)
    assert [len(result.losses) for result in found] == [2, 2, 2]
    assert len({result.losses[1] for result in found}) == 3

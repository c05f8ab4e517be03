"""A tiny model's training programs, each compiled once for all tests of this folder."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.config import Config, from_tree
from qlora_jax.data.encode import Example
from qlora_jax.data.loader import Loader
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.lora import choose_adapters
from qlora_jax.models import trees
from qlora_jax.models.decoder import attach
from qlora_jax.train import step as steps
from qlora_jax.train.optimizer import adamw
from qlora_jax.train.state import TrainState, init_state

LLAMA = Path(__file__).parents[1] / "golden" / "models" / "llama"
VOCAB, LENGTH, ROWS = 256, 16, 6


class Trainer(NamedTuple):
    """The objects that a run builds before its loop."""

    config: Config
    graph: nnx.GraphDef
    trained: Any
    frozen: Any
    optimizer: optax.GradientTransformation
    program: steps.StepProgram

    def start(self, trained: Any = None) -> TrainState:
        """Returns an initial state; its buffers are copies, because `update` donates them."""
        trained = jax.tree.map(jnp.copy, self.trained if trained is None else trained)
        return init_state(trained, self.optimizer, self.config.model.compute_dtype == "float16")

    def moved(self) -> Any:
        """Returns the trained tree plus small random values, so that no B is zero."""
        leaves, structure = jax.tree.flatten(self.trained)
        random = np.random.default_rng(7)
        moved = [x + jnp.asarray(random.normal(size=x.shape) * 0.02, x.dtype) for x in leaves]
        return jax.tree.unflatten(structure, moved)


@functools.cache
def build(
    method: str, compute: str, remat: str, clip: float, dropout: float, accumulation: int
) -> Trainer:
    tree = {
        "model": {"path": str(LLAMA), "compute_dtype": compute, "remat": remat},
        "data": {"source": "examples", "sequence_length": LENGTH},
        "output": "run",
        "method": method,
        "lora": {
            "rank": 4,
            "alpha": 8,
            "dropout": dropout,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        },
        "optimizer": {"learning_rate": 0.01, "clip_norm": clip, "weight_decay": 0.1},
        "train": {
            "steps": 10,
            "batch_size": ROWS // accumulation,
            "gradient_accumulation": accumulation,
        },
    }
    config = from_tree(tree, "test")
    quant = config.quant if method == "qlora" else None
    model = load_model(open_folder(LLAMA), quant=quant, dtype=jnp.float32)
    if method != "full":
        specs = choose_adapters(config.lora, model.linears())
        attach(model, specs, jax.random.key(0), dropout=dropout)
    graph, trained, frozen = trees.split(model, method)
    optimizer = adamw(config.optimizer, config.train.steps)
    program = steps.build(
        graph,
        optimizer,
        compute_dtype=jnp.dtype(compute),
        remat=remat,
        clip_norm=clip,
        method=method,
    )
    return Trainer(config, graph, trained, frozen, optimizer, program)


@pytest.fixture(scope="session")
def trainer() -> Callable[..., Trainer]:
    """Makes a trainer of the reference llama; equal arguments return the same compiled one."""

    def make(
        method: str = "lora",
        compute: str = "float32",
        remat: str = "none",
        clip: float = 0.0,
        dropout: float = 0.0,
        accumulation: int = 1,
    ) -> Trainer:
        return build(method, compute, remat, clip, dropout, accumulation)

    return make


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., dict[str, np.ndarray]]:
    """Makes a batch [k, 6 / k, 16] of packed rows with ragged masks; the last row has no loss."""

    def make(k: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        tokens = random.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
        segments = np.repeat([[1, 2, 0]], ROWS, 0).repeat([5, 8, 3], axis=1).astype(np.int32)
        positions = np.concatenate([np.arange(5), np.arange(8), np.zeros(3)]).astype(np.int32)
        mask = random.random((ROWS, LENGTH)) < np.linspace(0.9, 0.1, ROWS)[:, None]
        mask &= segments > 0
        mask[-1] = False
        flat = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "mask": mask,
            "segments": segments,
            "positions": np.broadcast_to(positions, (ROWS, LENGTH)),
        }
        return {name: x.reshape(k, ROWS // k, LENGTH) for name, x in flat.items()}

    return make


@pytest.fixture(scope="session")
def make_loader() -> Callable[[Config], Loader]:
    """Makes a loader of short random examples; one step holds about half of them."""
    random = np.random.default_rng(5)
    examples = []
    for length in random.integers(4, LENGTH + 2, 16):
        ids = random.integers(0, VOCAB, length).astype(np.int32)
        examples.append(Example(ids, np.arange(length) >= length // 3))

    def make(config: Config) -> Loader:
        return Loader(
            examples,
            config.data,
            batch_size=config.train.batch_size,
            gradient_accumulation=config.train.gradient_accumulation,
            seed=config.train.seed,
        )

    return make

"""A step over a mesh of eight CPU devices against the same step on one."""

import re
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selection import mostly_slow

from qlora_jax.models import sharding
from qlora_jax.models.sharding import layout_of
from qlora_jax.models.trees import flatten
from qlora_jax.quant import QTensor
from qlora_jax.runtime.mesh import FSDP, device_mesh
from qlora_jax.train import step as steps
from qlora_jax.train.state import init_state

ROWS, STEPS = 8, 3
FLOAT = re.compile(r"(?:f32|bf16|f16)\[([\d,]*)\]")
CODES = re.compile(r"= u8\[([\d,]*)\]\S* all-gather\(")
COLLECTIVE = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(")


class Ran(NamedTuple):
    losses: list[float]
    evaluated: tuple[float, float]
    trained: list[np.ndarray]


@pytest.fixture(autouse=True)
def small_arrays_split(monkeypatch) -> None:
    monkeypatch.setattr(sharding, "WHOLE_BELOW", 64)


@pytest.fixture
def rows(make_batch):
    """Makes a batch [k, 8, 16]; some rows have no loss."""

    def make(k: int, seed: int) -> dict[str, np.ndarray]:
        parts = [make_batch(1, seed=100 * seed + i) for i in range(2 * k)]
        joined = {name: np.concatenate([part[name][0] for part in parts]) for name in parts[0]}
        return {name: x[: k * ROWS].reshape(k, ROWS, -1) for name, x in joined.items()}

    return make


def quantized(tree) -> list[QTensor]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QTensor))
    return [x for x in leaves if isinstance(x, QTensor)]


def shape(dims: str) -> tuple[int, ...]:
    """Returns the shape from HLO's dimensions, without axes of one element."""
    return tuple(int(n) for n in dims.split(",") if n not in ("", "1"))


def over(t, sizes: tuple[int, int], remat: str):
    """Returns program, state and frozen tree over a mesh; sizes (1, 1) mean one device."""
    mesh, layout = device_mesh(*sizes), None
    trained, frozen = t.moved(), t.frozen
    if mesh is not None:
        layout = layout_of(mesh, trained, frozen)
        trained, frozen = layout.put_on_devices(trained, frozen)
    program = steps.build(
        t.graph,
        t.optimizer,
        compute_dtype=jnp.float32,
        remat=remat,
        clip_norm=1.0,
        method=t.config.method,
        layout=layout,
    )
    return program, init_state(trained, t.optimizer, False, layout=layout), frozen


def run(t, sizes: tuple[int, int], rows, remat: str, accumulation: int, key) -> Ran:
    program, state, frozen = over(t, sizes, remat)
    first = {name: x[0] for name, x in rows(1, 9).items()}
    evaluated = program.evaluate(state.trained, frozen, first)
    losses = []
    for seed in range(STEPS):
        own = None if key is None else jax.random.fold_in(key, seed)
        grads, figures = program.gradient(state, frozen, rows(accumulation, seed), own)
        state = program.update(state, grads, figures.finite)
        losses.append(float(figures.loss))
    trained = [np.asarray(x) for x in jax.tree.leaves(state.trained)]
    return Ran(losses, tuple(map(float, evaluated)), trained)


CASES = [
    ("qlora", (2, 4), "none", 1, 0.1),
    ("qlora", (1, 8), "full", 2, 0.0),
    ("qlora", (8, 1), "dots", 1, 0.0),
    ("qlora", (1, 2), "dots", 4, 0.1),
    ("lora", (2, 4), "dots", 1, 0.0),
    ("full", (2, 4), "dots", 1, 0.0),
    ("full", (1, 8), "full", 1, 0.0),
]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("method", "sizes", "remat", "accumulation", "dropout"), mostly_slow(CASES, CASES[0])
)
def test_a_mesh_trains_as_one_device_does(
    trainer, rows, method, sizes, remat, accumulation, dropout
) -> None:
    """Equal within float32 rounding, also with dropout: its mask depends on the row alone."""
    t = trainer(method, dropout=dropout)
    key = jax.random.key(3) if dropout else None
    alone, spread = (run(t, n, rows, remat, accumulation, key) for n in ((1, 1), sizes))
    np.testing.assert_allclose(spread.losses, alone.losses, rtol=1e-6)
    np.testing.assert_allclose(spread.evaluated, alone.evaluated, rtol=1e-6)
    for here, there in zip(spread.trained, alone.trained):
        # Adam divides by sqrt(nu); if nu is only rounding error, so is the update: hence atol
        np.testing.assert_allclose(here, there, atol=5e-4)
        assert np.abs(here - there).mean() < 1e-6


def test_codes_are_what_moves_between_devices(trainer, rows) -> None:
    """No collective moves a dequantized weight: forward, backward or in the recomputation."""
    t = trainer("qlora")
    program, state, frozen = over(t, (1, 8), "full")
    text = program.gradient.lower(state, frozen, rows(1, 0), None).compile().as_text()
    lines = [line for line in text.splitlines() if COLLECTIVE.search(line)]
    weights = {tuple(q.shape[1:]) for q in quantized(frozen)}
    assert len(weights) == 4
    in_floats = {shape(dims) for line in lines for dims in FLOAT.findall(line)}
    assert not weights & in_floats
    gathered = Counter(shape(dims) for line in lines for dims in CODES.findall(line))
    # seven linears, gathered once forward and once backward; recomputation gathers no third time
    assert sum(gathered[k // 2, n] for k, n in weights) == 14


def test_each_device_holds_its_share(trainer) -> None:
    t = trainer("qlora")
    _, state, frozen = over(t, (2, 4), "none")
    for path, x in flatten((state.trained, frozen, state.optimizer)).items():
        shares = {shard.data.size for shard in x.addressable_shards}
        split = x.size // 4 if FSDP in jax.tree.leaves(tuple(x.sharding.spec)) else x.size
        assert shares == {split}, path
    for q in quantized(frozen):
        assert q.codes.addressable_shards[0].data.size == q.codes.size // 4
        assert q.scales.addressable_shards[0].data.size == q.scales.size // 4
    large = [x for x in jax.tree.leaves(state.optimizer) if x.size >= 64 and x.ndim == 2]
    assert large
    assert all(x.addressable_shards[0].data.size == x.size // 4 for x in large)

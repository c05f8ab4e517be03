"""Layer groups of the trained tree, and moments in host memory."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from selection import mostly_slow

from qlora_jax.models.trees import flatten
from qlora_jax.train import layer_groups
from qlora_jax.train import step as steps
from qlora_jax.train.checkpoint import Checkpoints
from qlora_jax.train.offload import ON_DEVICE, ON_HOST, Placement
from qlora_jax.train.state import TrainState, init_state

METHODS = ("qlora", "full")


class Ran(NamedTuple):
    state: TrainState
    norms: list[float]


def build(t, moments: Placement) -> steps.StepProgram:
    return steps.build(
        t.graph,
        t.optimizer,
        compute_dtype=jnp.dtype(t.config.model.compute_dtype),
        remat="none",
        clip_norm=1.0,
        method=t.config.method,
        moments=moments,
    )


@pytest.fixture(scope="module")
def program(trainer) -> Callable[..., steps.StepProgram]:
    """Builds a method's program with moments at a placement; compiled once for all tests."""
    return functools.cache(lambda method, moments: build(trainer(method), moments))


def run(t, program: steps.StepProgram, make_batch, moments: Placement, count: int) -> Ran:
    trained = jax.tree.map(jnp.copy, t.trained)
    state = init_state(trained, t.optimizer, False, moments)
    norms = []
    for seed in range(count):
        grads, figures = program.gradient(state, t.frozen, make_batch(seed=seed), None)
        state = program.update(state, grads, figures.finite)
        norms.append(float(figures.norm))
    return Ran(state, norms)


def test_groups_are_the_layers_and_the_rest(trainer) -> None:
    groups = layer_groups.find_groups(trainer("full").trained)
    assert [group.size for group in groups] == [1, 3]
    outside, layers = (set(group.paths) for group in groups)
    assert outside == {"embed", "head", "norm.weight"}
    assert {path.partition(".adapter")[0] for path in layers} == layers
    assert all(path.startswith("runs.0.") for path in layers)
    places = sorted(place for group in groups for place in group.places)
    assert places == list(range(len(jax.tree.leaves(trainer("full").trained))))


def test_stacks_without_a_name_are_no_single_group(trainer) -> None:
    tree = dict(trainer("full").trained)
    tree["stacks"] = tree.pop("runs")
    with pytest.raises(KeyError, match="runs"):
        layer_groups.find_groups(tree)


@pytest.mark.parametrize("method", mostly_slow(METHODS, "qlora"))
@pytest.mark.quick
def test_layer_by_layer_is_all_at_once(trainer, program, make_batch, method) -> None:
    t, made = trainer(method), program(method, ON_DEVICE)
    state = t.start()
    grads, figures = made.gradient(state, t.frozen, make_batch(), None)
    whole = t.optimizer.init(t.trained)
    updates, _ = t.optimizer.update(grads, whole, t.trained)
    expected = flatten(optax.apply_updates(t.trained, updates))
    found = flatten(made.update(state, grads, figures.finite).trained)
    for path, x in expected.items():
        np.testing.assert_allclose(found[path], x, rtol=1e-6, atol=1e-8, err_msg=path)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("qlora", marks=pytest.mark.slow),
        pytest.param("full", marks=pytest.mark.quick),
    ],
)
def test_moments_on_the_host_change_no_bit(trainer, program, make_batch, method) -> None:
    t = trainer(method)
    device, host = (
        run(t, program(method, where), make_batch, where, 5) for where in (ON_DEVICE, ON_HOST)
    )
    assert device.norms == host.norms
    ours, theirs = flatten(host.state), flatten(device.state)
    assert ours.keys() == theirs.keys()
    for path, x in ours.items():
        assert np.asarray(x).tobytes() == np.asarray(theirs[path]).tobytes(), path
        wanted = "pinned_host" if path.startswith("optimizer") else "device"
        assert x.sharding.memory_kind == wanted, path


@pytest.mark.parametrize("where", [ON_DEVICE, ON_HOST], ids=["device", "host"])
@pytest.mark.quick
def test_every_step_runs_what_the_first_compiled(trainer, make_batch, where) -> None:
    t = trainer("qlora")
    made = build(t, where)
    run(t, made, make_batch, where, 3)
    assert made.gradient._cache_size() == 1
    assert made.update_layer._cache_size() == len(layer_groups.find_groups(t.trained))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.quick
def test_moments_on_the_host_go_on_from_a_checkpoint(
    trainer, program, make_batch, method, tmp_path
) -> None:
    t, made = trainer(method), program(method, ON_HOST)
    fresh, checkpoints = jax.tree.map(jnp.copy, t.trained), Checkpoints(tmp_path, 1)
    checkpoints.save(run(t, made, make_batch, ON_HOST, 3).state, {})
    state, _ = checkpoints.restore(init_state(fresh, t.optimizer, False, ON_HOST))
    checkpoints.close()
    for path, x in flatten(state.optimizer).items():
        assert x.sharding.memory_kind == "pinned_host", path
    for seed in (3, 4):
        grads, figures = made.gradient(state, t.frozen, make_batch(seed=seed), None)
        state = made.update(state, grads, figures.finite)
    unbroken = flatten(run(t, made, make_batch, ON_HOST, 5).state)
    for path, x in flatten(state).items():
        assert np.asarray(x).tobytes() == np.asarray(unbroken[path]).tobytes(), path
        assert x.sharding.memory_kind == unbroken[path].sharding.memory_kind, path


@pytest.mark.slow
@pytest.mark.quick
def test_moments_of_three_layers_are_on_the_device_at_most(trainer, make_batch) -> None:
    away, most = [], [0]

    def fetch(tree):
        away.append(tree)
        most[0] = max(most[0], len(away))
        return ON_HOST.fetch(tree)

    def wait(tree):
        del away[0]
        return ON_HOST.wait(tree)

    t, counted = trainer("full"), ON_HOST._replace(fetch=fetch, wait=wait)
    run(t, build(t, counted), make_batch, counted, 1)
    assert most == [3]


@pytest.mark.parametrize("method", mostly_slow(METHODS, "qlora"))
def test_the_update_of_a_layer_copies_no_stack(trainer, method) -> None:
    t = trainer(method)
    made, state = build(t, ON_DEVICE), t.start()
    group = layer_groups.find_groups(t.trained)[-1]
    leaves = jax.tree.leaves(t.trained)
    tall = [jnp.tile(leaves[p], (10, *[1] * (leaves[p].ndim - 1))) for p in group.places]
    group = group._replace(layers=10 * group.layers)
    lowered = made.update_layer.lower(group, tall, tall, 0, state.optimizer[-1], jnp.asarray(True))
    analysis = lowered.compile().memory_analysis()
    layer = sum(x.nbytes for x in tall) / group.layers
    # temporaries are about the layer's new values and its two moments, not a stack
    assert analysis.temp_size_in_bytes <= 4 * layer
    assert analysis.alias_size_in_bytes >= group.layers * layer


def test_stacked_and_back(trainer) -> None:
    t = trainer("full")
    state = t.start()
    stacks = layer_groups.stack_states(t.trained, state.optimizer)
    like = layer_groups.stack_states_like(t.trained, state.optimizer)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), stacks) == jax.tree.map(
        lambda x: (x.shape, x.dtype), like
    )
    back = layer_groups.unstack_states(t.trained, stacks, state.optimizer)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(state.optimizer), strict=True):
        np.testing.assert_array_equal(ours, theirs)

"""The step that runs layer by layer equals the step in one program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import config as configs
from qlora_jax.models.trees import flatten
from qlora_jax.train import layered
from qlora_jax.train.assemble import updates_at_once
from qlora_jax.train.offload import PLACEMENTS

pytestmark = pytest.mark.quick


def both(t, at_once: bool = True, home: str = "device"):
    """Returns a trainer's program, and the program that runs the same step layer by layer."""
    place = PLACEMENTS[home]
    return t.program, layered.by_layer(t.program, place, place, at_once)


def assert_close(found, expected, tolerance=2e-6):
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, exact in expected.items():
        exact = np.asarray(exact)
        assert found[path].dtype == exact.dtype
        atol = tolerance * np.abs(exact).max()
        np.testing.assert_allclose(found[path], exact, rtol=0, atol=atol, err_msg=path)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "lora", "clip": 0.01, "accumulation": 2},
        pytest.param({"method": "qlora", "dropout": 0.1}, marks=pytest.mark.slow),
        pytest.param({"method": "full"}, marks=pytest.mark.slow),
    ],
    ids=lambda s: s["method"],
)
def test_gradients_are_those_of_one_program(trainer, make_batch, settings):
    t = trainer(remat="full", **settings)
    k = settings.get("accumulation", 1)
    whole, by_layer = both(t)
    batch = {name: x.reshape(k, -1, x.shape[-1]) for name, x in make_batch().items()}
    key = jax.random.key(3) if "dropout" in settings else None
    arguments = t.start(t.moved()), t.frozen, batch, key
    grads, figures = by_layer.gradient(*arguments)
    expected, expected_figures = whole.gradient(*arguments)
    assert_close(grads, expected)
    np.testing.assert_allclose(figures[:4], expected_figures[:4], rtol=1e-6)
    assert figures.finite_leaves.all()


@pytest.mark.parametrize(
    ("method", "home", "clip"),
    [
        pytest.param("lora", "host", 0.01, marks=pytest.mark.slow),
        ("lora", "device", 0.0),
        pytest.param("full", "host", 0.0, marks=pytest.mark.slow),
    ],
)
def test_layers_that_are_updated_at_once_are_those_of_two_programs(
    trainer, make_batch, method, home, clip
):
    t = trainer(method, remat="full", clip=clip)
    whole, by_layer = both(t, home=home)
    assert by_layer.direct is not None
    state, other = t.start(t.moved()), t.start(t.moved())
    state = PLACEMENTS[home].begin(
        state._replace(optimizer=PLACEMENTS[home].store(state.optimizer))
    )
    for seed in range(3):
        batch = make_batch(seed=seed)
        state, figures = by_layer.direct(state, t.frozen, batch, None)
        grads, expected = whole.gradient(other, t.frozen, batch, None)
        other = whole.update(other, grads, expected.finite)
        np.testing.assert_allclose(figures[:4], expected[:4], rtol=1e-5)
    assert_close(state.trained, other.trained, 1e-5)
    for moments, exact in zip(state.optimizer, other.optimizer, strict=True):
        assert_close(moments, exact, 1e-4)
    assert int(state.step) == 3


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("optimizer.clip_norm", "1.0"),
        ("train.gradient_accumulation", "2"),
        ("model.compute_dtype", "float16"),
    ],
)
def test_what_waits_for_all_gradients_is_not_updated_at_once(trainer, setting, value):
    config = configs.changed(trainer().config, {"optimizer.clip_norm": "0"})
    assert updates_at_once(config)
    waits = configs.changed(config, {setting: value})
    assert not updates_at_once(waits)
    first = configs.changed(waits, {"optimizer.norm_first": "true"})
    assert updates_at_once(first) == (setting == "optimizer.clip_norm")


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_told(trainer, make_batch):
    t = trainer(remat="full")
    moved = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), t.moved())
    _, figures = both(t)[1].direct(t.start(moved), t.frozen, make_batch(), None)
    assert not figures.finite


def test_a_norm_that_is_not_finite_changes_no_layer(trainer, make_batch):
    """Only the first layer's gradient overflows; the backward pass computes it last."""

    def overflowing(path, x):
        name = jax.tree_util.keystr(path)
        last = {"'a'": 1e25, "'b'": 0.0}
        return next((x.at[0].set(to) for part, to in last.items() if part in name), x)

    t = trainer("lora", remat="full", clip=0.01)
    trained = jax.tree_util.tree_map_with_path(overflowing, t.moved())
    before = [np.asarray(x) for x in jax.tree.leaves(trained)]
    state = t.start(trained)
    moments = [np.asarray(x) for x in jax.tree.leaves(state.optimizer)]
    state, figures = both(t)[1].direct(state, t.frozen, make_batch(), None)
    assert np.isfinite(figures.loss)
    assert not figures.finite
    for found, expected in zip(jax.tree.leaves(state.trained), before, strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(jax.tree.leaves(state.optimizer), moments, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_inputs_in_8_bits_leave_the_loss_alone_and_the_gradients_close(trainer, make_batch):
    t = trainer(remat="full")
    place = PLACEMENTS["host"]
    recipe = dataclasses.replace(t.program.recipe, layer_inputs="int8")
    packed = layered.by_layer(dataclasses.replace(t.program, recipe=recipe), place, place, True)
    arguments = t.start(t.moved()), t.frozen, make_batch(), None
    grads, figures = packed.gradient(*arguments)
    exact, expected = both(t)[1].gradient(*arguments)
    assert float(figures.loss) == float(expected.loss)
    leaves, others = jax.tree.leaves(grads), jax.tree.leaves(exact)
    apart = np.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in zip(leaves, others)))
    assert 0 < apart < 0.02 * float(expected.norm)

"""Moments in fewer bits: against numpy, the bytes stored, and training against float32."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.config import OptimizerConfig
from qlora_jax.lora.variables import Vector, Weight
from qlora_jax.models.trees import flatten, sha256
from qlora_jax.quant import nbytes
from qlora_jax.quant.dynamic8 import BLOCK, Dynamic8
from qlora_jax.train import step as steps
from qlora_jax.train.moments import ENCODERS, MIN_8BIT_SIZE, dithered, stored
from qlora_jax.train.optimizer import adamw
from qlora_jax.train.state import init_state

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "dynamic8.npz")
settings = pytest.mark.parametrize("moments", ENCODERS)


def gradients(shape: tuple[int, ...], step: int) -> np.ndarray:
    """Returns random numbers whose size differs by element, but hardly by step."""
    size = 10.0 ** np.random.default_rng(0).uniform(-4, 0, shape)
    return (np.random.default_rng(step + 1).normal(size=shape) * size).astype(np.float32)


def tree(seed: int) -> dict:
    random = np.random.default_rng(seed)
    matrices = {"embed": Weight((70, 64)), "proj": {"weight": Weight((3, 45, 40))}}
    shapes = matrices | {"norm": {"weight": Vector((64,))}}
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


class Numpy8:
    """A moment in 8 bits by definition: each code is the nearest value of bitsandbytes' map."""

    def __init__(self, kind: str, x: np.ndarray):
        self.map = GOLDEN[f"{kind}/map"]
        rows = np.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
        self.absmax = np.abs(rows).max(axis=1)
        scaled = (rows.astype(np.float64) / self.absmax[:, None]).reshape(-1)[: x.size]
        distance = np.abs(scaled[:, None] - self.map)
        self.codes = distance.argmin(axis=1).reshape(x.shape)
        two = np.partition(distance, 1, axis=1)[:, :2]
        close = two[:, 1] - two[:, 0] < 2e-6 * np.abs(scaled)
        self.is_close_call = close.reshape(x.shape)


@pytest.mark.quick
@pytest.mark.quick
def test_8_bit_adamw_against_numpy() -> None:
    """Each reference step starts from our state, so that one differing code does not spread."""
    config = OptimizerConfig(
        learning_rate=0.02, beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.3, moments="int8"
    )
    shape = (3, 45, 40)  # the last of its 22 blocks is short
    optimizer = adamw(config, 10)
    params = {"weight": Weight(jnp.asarray(gradients(shape, 99)))}
    state, update = optimizer.init(params), jax.jit(optimizer.update)

    def moments() -> tuple[Dynamic8, Dynamic8]:
        adam = state.inner_states["matrix"].inner_state[0]
        return adam.mu["weight"].get_value(), adam.nu["weight"].get_value()

    def values(kind: str, q: Dynamic8) -> np.ndarray:
        scales = np.repeat(np.asarray(q.absmax), BLOCK)[: q.codes.size].reshape(shape)
        return GOLDEN[f"{kind}/map"][np.asarray(q.codes)] * scales

    close = 0
    for step in range(4):
        g, p = gradients(shape, step), np.asarray(params["weight"])
        first, second = moments()
        mu = np.float32(0.8) * values("signed", first) + np.float32(0.2) * g
        nu = np.float32(0.95) * values("unsigned", second) + np.float32(0.05) * g * g
        hat = mu / (1 - 0.8 ** (step + 1)), nu / (1 - 0.95 ** (step + 1))
        expected = -0.02 * (hat[0] / (np.sqrt(hat[1]) + 1e-6) + 0.3 * p)

        updates, state = update({"weight": Weight(jnp.asarray(g))}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(updates["weight"], expected, rtol=2e-5, atol=1e-7)
        for found, theirs in zip(moments(), (Numpy8("signed", mu), Numpy8("unsigned", nu))):
            np.testing.assert_allclose(found.absmax, theirs.absmax, rtol=3e-7)
            differ = np.asarray(found.codes) != theirs.codes
            assert not (differ & ~theirs.is_close_call).any()
            close += theirs.is_close_call.sum()
    assert close < 1e-3 * 8 * np.prod(shape)  # share of all codes: two moments, four steps


@settings
@pytest.mark.quick
def test_the_first_update_is_that_of_float32(moments: str) -> None:
    params, grads = tree(0), tree(1)
    expected = jax.jit(optax.adamw(0.01, weight_decay=0.0).update)
    expected, _ = expected(grads, optax.adamw(0.01).init(params), params)
    optimizer = adamw(OptimizerConfig(learning_rate=0.01, moments=moments), 10)
    found, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)


@pytest.mark.parametrize(
    ("moments", "bytes_each"), [("float32", 8), ("bfloat16", 4), ("int8", 2 + 2 * 4 / BLOCK)]
)
def test_bytes_of_the_state(moments: str, bytes_each: float) -> None:
    shape = jax.ShapeDtypeStruct((4, 256, 64), jnp.float32)
    adam = stored(optax.scale_by_adam(), moments)
    # plus the step count, an int32
    assert nbytes(jax.eval_shape(adam.init, shape)) == bytes_each * 4 * 256 * 64 + 4


@pytest.mark.parametrize(("size", "is_small"), [(MIN_8BIT_SIZE - 1, True), (MIN_8BIT_SIZE, False)])
def test_small_arrays_stay_in_float32(size: int, is_small: bool) -> None:
    adam = stored(optax.scale_by_adam(), "int8")
    state = jax.eval_shape(adam.init, jax.ShapeDtypeStruct((size,), jnp.float32))
    for moment in (state.mu, state.nu):
        assert isinstance(moment, Dynamic8) != is_small
        assert not is_small or moment.dtype == jnp.float32
    if not is_small:
        assert (state.mu.signed, state.nu.signed) == (True, False)


@settings
@pytest.mark.quick
def test_a_part_of_the_tree_is_updated_as_in_the_whole(moments: str) -> None:
    """Bit-identical without jit; with jit, XLA may fuse across leaves and round differently."""
    optimizer = adamw(OptimizerConfig(learning_rate=0.01, weight_decay=0.1, moments=moments), 10)
    names, state = tuple(tree(0)), optimizer.init(tree(0))
    states = {name: optimizer.init({name: tree(0)[name]}) for name in names}
    for step in range(2):
        grads, params = tree(step + 1), tree(0)
        with jax.disable_jit():
            updates, state = optimizer.update(grads, state, params)
            for name in names:
                part, states[name] = optimizer.update(
                    {name: grads[name]}, states[name], {name: params[name]}
                )
                assert sha256(part) == sha256({name: updates[name]})
    whole = flatten(state)
    for part in states.values():
        for path, x in flatten(part).items():
            np.testing.assert_array_equal(x, whole[path], err_msg=path)


@settings
def test_shapes_and_dtypes_of_the_state_stay(moments: str) -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(0))
    optimizer = adamw(OptimizerConfig(moments=moments), 10)
    before = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, before, params)
    assert before == after
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}


def test_bfloat16_is_one_of_both_neighbours_and_right_on_average() -> None:
    random = np.random.default_rng(0)
    x = (random.normal(size=2000) * 10.0 ** random.uniform(-30, 30, 2000)).astype(np.float32)
    bits = x.view(np.uint32)
    low = (bits & 0xFFFF0000).view(np.float32)
    high = ((bits & 0xFFFF0000) + 0x10000).view(np.float32)
    share_high = (bits & 0xFFFF) / 2**16
    steps = 1024
    many = jax.jit(lambda: jax.vmap(lambda step: dithered(jnp.asarray(x), step))(jnp.arange(steps)))
    rounded = np.asarray(many()).astype(np.float32)
    is_high = rounded == high
    assert (is_high | (rounded == low)).all()
    # A mean of n yes/no draws has a standard deviation of at most 0.5 / sqrt(n); allow 5 of it.
    assert is_high.mean() == pytest.approx(share_high.mean(), abs=5 * 0.5 / is_high.size**0.5)
    for axis, expected in ((0, share_high), (1, share_high.mean())):
        error = np.abs(is_high.mean(axis=axis) - expected)
        assert error.max() < 5 * 0.5 / is_high.shape[axis] ** 0.5


def test_bfloat16_values_are_kept_and_equal_steps_round_alike() -> None:
    x = jnp.asarray([0.0, -0.0, 1.0, -2.5, 1e-38, 3e38], jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(dithered(x, jnp.int32(5)).astype(jnp.float32), x)
    y = jnp.linspace(-1, 1, 999)
    again = [np.asarray(dithered(y, jnp.int32(step))).view(np.uint16) for step in (3, 3, 4)]
    np.testing.assert_array_equal(again[0], again[1])
    assert (again[0] != again[2]).any()


@settings
@pytest.mark.quick
def test_a_second_moment_decays_slowly_in_any_storage(moments: str) -> None:
    """500 updates by 0.999 without gradient: rounding to nearest bfloat16 would change nothing."""
    adam = stored(optax.scale_by_adam(b2=0.999), moments)
    grads = jnp.linspace(0.5, 1.0, 2 * MIN_8BIT_SIZE)

    @jax.jit
    def run():
        _, state = adam.update(grads, adam.init(grads))
        zeros = jnp.zeros_like(grads)
        return jax.lax.fori_loop(0, 500, lambda _, state: adam.update(zeros, state)[1], state).nu

    nu = run()
    if isinstance(nu, Dynamic8):
        nu = GOLDEN["unsigned/map"][np.asarray(nu.codes)] * np.repeat(nu.absmax, BLOCK)
    ratio = np.asarray(nu, np.float64) / (0.001 * np.asarray(grads) ** 2 * 0.999**500)
    assert ratio.mean() == pytest.approx(1, abs=2e-3)
    # int8 is off by at most half a step, near the upper end of the map. bfloat16 is a random walk
    # with steps of up to half of 1/128.
    assert ratio.std() < {"float32": 1e-5, "bfloat16": 500**0.5 / 256, "int8": 4e-3}[moments]


@pytest.mark.slow
@pytest.mark.quick
def test_losses_are_those_of_float32_within_one_step(trainer, make_loader) -> None:
    """Trains every weight for 60 steps on 16 sequences, until the model has memorized them.

    Rounded moments may raise the loss by less than one step lowers it near the end.
    """
    t, losses = trainer("full"), {}
    for moments in ENCODERS:
        optimizer = adamw(OptimizerConfig(learning_rate=2e-3, moments=moments), 60)
        program = steps.build(
            t.graph,
            optimizer,
            compute_dtype=jnp.float32,
            remat="none",
            clip_norm=0.0,
            method="full",
        )
        plain, batches, found = t.start(), make_loader(t.config), []
        state = init_state(plain.trained, optimizer, False)
        for _ in range(60):
            # one compilation for all: t's gradient program does not read the moments
            plain = plain._replace(trained=state.trained)
            grads, figures = t.program.gradient(plain, t.frozen, next(batches), None)
            state = program.update(state, grads, figures.finite)
            found.append(float(figures.loss))
        losses[moments] = np.array(found)
    exact = losses.pop("float32")
    assert exact[-10:].mean() < exact[0] / 10
    one_step = (exact[-20:-10].mean() - exact[-10:].mean()) / 10
    for moments, found in losses.items():
        assert abs(found[-10:].mean() - exact[-10:].mean()) < one_step, moments

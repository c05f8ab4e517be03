"""The step's two programs against a numpy model in float64, and against each other."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models.trees import flatten, sha256
from qlora_jax.quant import QTensor, dequantize
from qlora_jax.train.state import GROWTH_INTERVAL, INITIAL_SCALE

pytestmark = pytest.mark.quick
METHODS = ("qlora", "lora", "full")
HALF = {"compute": "float16", "dropout": 0.1, "accumulation": 2}
HEADS, KV_HEADS, HEAD_DIM, EPS = 4, 2, 16, 1e-6


def wide(tree):
    return {path: np.asarray(leaf).astype(np.float64) for path, leaf in flatten(tree).items()}


def weights(trainer, trained):
    """Returns every weight by its path in float64; 4-bit weights are decoded."""
    return wide(decode(trainer.frozen)) | wide(trained)


@jax.jit
def decode(tree):
    def value(x):
        return dequantize(x, jnp.float32) if isinstance(x, QTensor) else x

    return jax.tree.map(value, tree, is_leaf=lambda x: isinstance(x, QTensor))


def mean_loss(w, batch):
    """Returns a llama's mean cross-entropy over the targets, row by row: the reference."""
    total = 0.0
    batch = {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items()}
    for r in range(len(batch["mask"])):
        tokens, targets, mask, segments, positions = (
            batch[name][r] for name in ("tokens", "targets", "mask", "segments", "positions")
        )
        angle = positions[:, None] / 10000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

        def rotate(x, cos=cos, sin=sin):
            a, b = np.split(x, 2, axis=-1)
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        order = np.arange(len(tokens))
        see = (order[:, None] >= order) & (segments[:, None] == segments)
        x = w["embed"][tokens]
        for i in range(3):
            h = norm(x, w["runs.0.input_layernorm.weight"][i])
            q, k, v = (
                linear(w, f"{name}_proj", i, h).reshape(len(tokens), -1, HEAD_DIM) for name in "qkv"
            )
            k, v = (np.repeat(y, HEADS // KV_HEADS, axis=1) for y in (rotate(k), v))
            scores = np.einsum("qhd,khd->hqk", rotate(q), k) / np.sqrt(HEAD_DIM)
            p = np.exp(np.where(see, scores, -np.inf))
            p /= p.sum(axis=-1, keepdims=True)
            x = x + linear(w, "o_proj", i, np.einsum("hqk,khd->qhd", p, v).reshape(len(x), -1))
            h = norm(x, w["runs.0.post_attention_layernorm.weight"][i])
            gate = linear(w, "gate_proj", i, h)
            up = linear(w, "up_proj", i, h)
            x = x + linear(w, "down_proj", i, gate / (1 + np.exp(-gate)) * up)
        logits = norm(x, w["norm.weight"]) @ w["head"]
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        total -= log_p[order, targets][mask].sum()
    return total / batch["mask"].sum()


def norm(x, weight):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS) * weight


def linear(w, name, i, x):
    path = f"runs.0.{name}"
    y = x @ w[f"{path}.weight"][i]
    if f"{path}.adapter.a" in w:
        a, b = w[f"{path}.adapter.a"][i], w[f"{path}.adapter.b"][i]
        y = y + w[f"{path}.adapter.scale"][i] * (x @ a @ b)
    return y


def gradient(trainer, batch, trained=None, key=None, scale=None):
    state = trainer.start(trained)
    if scale is not None:
        state = state._replace(scale=jnp.float32(scale))
    grads, figures = trainer.program.gradient(state, trainer.frozen, batch, key)
    return wide(grads), figures


def assert_close(found, expected, tolerance):
    """Asserts that each leaf is within `tolerance` of the largest entry of the expected leaf."""
    assert found.keys() == expected.keys()
    for path, exact in expected.items():
        atol = tolerance * np.abs(exact).max()
        np.testing.assert_allclose(found[path], exact, rtol=0, atol=atol, err_msg=path)


def global_norm(grads):
    return math.sqrt(sum((g**2).sum() for g in grads.values()))


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_those_of_the_model_in_float64(trainer, make_batch, method):
    t, batch = trainer(method), make_batch()
    trained = t.moved()
    grads, figures = gradient(t, batch, trained)
    w = weights(t, trained)
    assert float(figures.loss) == pytest.approx(mean_loss(w, batch), rel=2e-6)
    assert float(figures.tokens) == batch["mask"].sum()
    assert float(figures.norm) == pytest.approx(global_norm(grads), rel=1e-5)
    assert bool(figures.finite)
    step = 1e-5
    for path, g in grads.items():
        place = np.unravel_index(np.abs(g).argmax(), g.shape)
        value = w[path][place]
        losses = []
        for shift in (step, -step):
            w[path][place] = value + shift
            losses.append(mean_loss(w, batch))
        w[path][place] = value
        assert g[place] == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=2e-4), path


@pytest.mark.parametrize(
    ("method", "remat"), [("qlora", "full"), ("lora", "dots"), ("full", "none")]
)
def test_micro_batches_add_up_to_one_batch_whatever_is_recomputed(
    trainer, make_batch, method, remat
):
    one, three = trainer(method), trainer(method, remat=remat, accumulation=3)
    trained = one.moved()
    expected, whole = gradient(one, make_batch(), trained)
    found, parts = gradient(three, make_batch(3), trained)
    counts = make_batch(3)["mask"].sum(axis=(1, 2))
    assert len(set(counts)) == 3
    assert parts.loss == pytest.approx(float(whole.loss), rel=1e-6)
    assert parts.tokens == whole.tokens
    assert_close(found, expected, 4e-6)


def test_what_is_recomputed(trainer, make_batch):
    def count(remat, operation):
        t = trainer(remat=remat)
        lowered = t.program.gradient.lower(t.start(), t.frozen, make_batch(), None)
        return lowered.as_text().count(f"stablehlo.{operation} ")

    products = {remat: count(remat, "dot_general") for remat in ("none", "dots", "full")}
    roots = {remat: count(remat, "rsqrt") for remat in ("none", "dots", "full")}
    assert products["none"] <= products["dots"] <= products["full"] > products["none"]
    assert roots["none"] < roots["dots"] == roots["full"]


@pytest.mark.parametrize("method", METHODS)
def test_steps_with_decay_leave_the_frozen_tree_as_it_is(trainer, make_batch, method):
    t = trainer(method)
    before, first = sha256(t.frozen), wide(t.trained)
    state = t.start()
    for step in range(5):
        grads, figures = t.program.gradient(state, t.frozen, make_batch(seed=step), None)
        state = t.program.update(state, grads, figures.finite)
    assert int(state.step) == 5
    assert sha256(t.frozen) == before
    after = wide(state.trained)
    assert all((after[path] != first[path]).any() for path in first)
    if method != "full":
        assert {path.rpartition(".")[2] for path in after} == {"a", "b"}
        # layer 1's q_proj has rank 2; its padding stays zero
        assert not after["runs.0.q_proj.adapter.a"][1, :, 2:].any()
        assert not after["runs.0.q_proj.adapter.b"][1, 2:].any()
        assert after["runs.0.q_proj.adapter.b"][1, :2].all()


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_at_first_a_has_no_gradient_and_b_has(trainer, make_batch, method):
    grads, _ = gradient(trainer(method), make_batch())
    for path, g in grads.items():
        assert g.any() == path.endswith(".b"), path


def test_clipping_keeps_the_direction_and_reports_the_norm_before(trainer, make_batch):
    t, clipped = trainer(), trainer(clip=0.05)
    trained, batch = t.moved(), make_batch()
    whole, before = gradient(t, batch, trained)
    assert before.norm > 0.1
    grads, figures = gradient(clipped, batch, trained)
    assert figures.norm == pytest.approx(float(before.norm), rel=1e-6)
    assert global_norm(grads) == pytest.approx(0.05, rel=1e-6)
    assert_close(grads, {p: g * 0.05 / float(before.norm) for p, g in whole.items()}, 4e-6)


def test_a_small_gradient_is_not_clipped(trainer, make_batch):
    t, clipped = trainer(), trainer(clip=0.05)
    batch = make_batch()
    small = jax.tree.map(lambda x: x * 0.01, t.moved())
    whole, before = gradient(t, batch, small)
    assert before.norm < 0.05
    assert_close(gradient(clipped, batch, small)[0], whole, 4e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_is_not_finite_changes_nothing(trainer, make_batch, method):
    t = trainer(method)
    state = t.start(t.moved())
    grads, figures = t.program.gradient(state, t.frozen, make_batch(), None)
    state = t.program.update(state, grads, figures.finite)
    before = sha256((state.trained, state.optimizer))
    leaves, structure = jax.tree.flatten(state.trained)
    poisoned = jax.tree.unflatten(structure, [leaves[0].at[0].set(jnp.nan), *leaves[1:]])
    grads, figures = t.program.gradient(
        state._replace(trained=poisoned), t.frozen, make_batch(), None
    )
    assert not figures.finite
    assert not math.isfinite(figures.norm)
    state = t.program.update(state, grads, figures.finite)
    assert sha256((state.trained, state.optimizer)) == before
    assert int(state.step) == 2
    assert float(state.scale) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_bfloat16_learns_a_batch_by_heart_as_float32_does(trainer, make_batch, method):
    batch, last = make_batch(), {}
    for compute in ("float32", "bfloat16"):
        t = trainer(method, compute)
        state = t.start()
        for _ in range(40):
            grads, figures = t.program.gradient(state, t.frozen, batch, None)
            state = t.program.update(state, grads, figures.finite)
            last[compute] = float(figures.loss)
        assert {x.dtype for x in jax.tree.leaves(state.trained)} == {jnp.dtype(jnp.float32)}
    # the untrained loss is log(256) = 5.5
    assert last["float32"] < 3.3
    assert last["bfloat16"] == pytest.approx(last["float32"], rel=0.05)


def test_loss_scaling_recovers_gradients_that_underflow(trainer, make_batch):
    t, exact, batch = trainer(compute="float16"), trainer(), make_batch()
    trained = t.moved()

    def faint(t):
        # Factors that are powers of two add no rounding error to the forward pass.
        factors = {"norm.weight": 2.0**-12, "head": 2.0**-6}
        flat = flatten(t.frozen)
        leaves = [leaf * factors.get(path, 1) for path, leaf in flat.items()]
        return t._replace(frozen=jax.tree.unflatten(jax.tree.structure(t.frozen), leaves))

    expected, _ = gradient(faint(exact), batch, trained)
    lost, figures = gradient(faint(t), batch, trained, scale=1)
    assert bool(figures.finite)
    assert all(not g.any() for g in lost.values())
    found, figures = gradient(faint(t), batch, trained, scale=2**15)
    assert bool(figures.finite)
    assert all(g.any() for g in expected.values())
    assert_close(found, expected, 0.02)


def scaled(t, scale, finite_steps=0):
    state = t.start()._replace(
        scale=jnp.float32(scale), finite_steps=jnp.asarray(finite_steps, jnp.int32)
    )
    return state, jax.tree.map(jnp.zeros_like, state.trained)


def test_an_overflow_halves_the_scale_and_skips_the_step(trainer, make_batch):
    t = trainer(**HALF)
    assert float(t.start().scale) == INITIAL_SCALE
    state, _ = scaled(t, 2.0**40, 17)
    grads, figures = t.program.gradient(state, t.frozen, make_batch(2), jax.random.key(0))
    assert not figures.finite
    assert math.isfinite(figures.loss)
    before = sha256((state.trained, state.optimizer))
    state = t.program.update(state, grads, figures.finite)
    assert (float(state.scale), int(state.finite_steps)) == (2.0**39, 0)
    assert sha256((state.trained, state.optimizer)) == before


@pytest.mark.parametrize(
    ("scale", "steps", "finite", "then"),
    [
        (8, GROWTH_INTERVAL - 1, True, (16, 0)),
        (8, GROWTH_INTERVAL - 2, True, (8, GROWTH_INTERVAL - 1)),
        (8, GROWTH_INTERVAL - 1, False, (4, 0)),
        (1, 5, False, (1, 0)),
    ],
)
def test_the_scale_grows_slowly_and_never_falls_below_one(trainer, scale, steps, finite, then):
    t = trainer(**HALF)
    state, grads = scaled(t, scale, steps)
    state = t.program.update(state, grads, jnp.asarray(finite))
    assert (float(state.scale), int(state.finite_steps)) == then


def test_the_scale_stays_one_in_float32(trainer):
    t = trainer()
    state, grads = scaled(t, 1, GROWTH_INTERVAL - 1)
    state = t.program.update(state, grads, jnp.asarray(True))
    assert float(state.scale) == 1


def test_dropout_is_drawn_from_the_key(trainer, make_batch):
    t = trainer(**HALF)
    trained, batch = t.moved(), make_batch(2)
    first, _ = gradient(t, batch, trained, jax.random.key(1))
    again, _ = gradient(t, batch, trained, jax.random.key(1))
    other, _ = gradient(t, batch, trained, jax.random.key(2))
    for path, g in first.items():
        np.testing.assert_array_equal(again[path], g)
        assert (other[path] != g).any()


def test_micro_batches_drop_out_differently(trainer, make_batch):
    t = trainer(**HALF)
    same = {name: np.stack([x[0], x[0]]) for name, x in make_batch(2).items()}
    found = []
    for i in range(2):
        mask = same["mask"] & (np.arange(2) == i)[:, None, None]
        found.append(gradient(t, same | {"mask": mask}, t.moved(), jax.random.key(1))[0])
    assert all((found[0][path] != found[1][path]).any() for path in found[0])


def test_evaluation_drops_nothing_out(trainer, make_batch):
    t = trainer(**HALF)
    batch = {name: x.reshape(-1, x.shape[-1]) for name, x in make_batch().items()}
    trained = t.moved()
    total, count = t.program.evaluate(trained, t.frozen, batch)
    assert float(total / count) == pytest.approx(mean_loss(weights(t, trained), batch), rel=2e-3)
    assert t.program.evaluate(trained, t.frozen, batch)[0] == total


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_may_be_held_in_16_bits(trainer, dtype):
    t = trainer()
    narrow = jax.tree.map(lambda x: x.astype(dtype), t.moved())
    state = t.start(narrow)
    grads = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32), narrow)
    before = wide(narrow)
    state = t.program.update(state, grads, jnp.asarray(True))
    assert {x.dtype for x in jax.tree.leaves(state.trained)} == {jnp.dtype(dtype)}
    for path, x in wide(state.trained).items():
        exact = before[path] - 0.01 * (1 + 0.1 * before[path])
        # rtol: one rounding. atol: float32's 1 - 0.999 is off by up to 3e-5; the root halves that
        rtol, atol = float(jnp.finfo(dtype).eps), 0.01 * 1.5e-5
        np.testing.assert_allclose(x, exact, rtol=rtol, atol=atol, err_msg=path)

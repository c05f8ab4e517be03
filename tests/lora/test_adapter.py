import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import kstest, norm, uniform

from qlora_jax.config import LoraConfig, QuantConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.formats.peft import read_adapter
from qlora_jax.lora import Adapter, AdapterSpec, LoraParam, choose_adapters, init_adapter
from qlora_jax.models.decoder import attach

SPEC = AdapterSpec(rank=8, alpha=16.0, scale=2.0)
SMALLER = AdapterSpec(rank=3, alpha=16.0, scale=5.0)


def fresh(specs, init="kaiming-uniform", k=300, n=40, dropout=0.0, dtype=jnp.float32, seed=0):
    return init_adapter(jax.random.key(seed), specs, k, n, init, dropout, dtype)


@functools.partial(jax.jit, static_argnums=0)
def logits(structure, weights, tokens):
    model = nnx.merge(structure, weights)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model.hidden(tokens, jnp.ones_like(tokens), positions, dtype=jnp.float32)
    return model.logits(hidden)


def compute(model, tokens):
    return np.asarray(logits(*nnx.split(model), tokens))


@pytest.mark.quick
def test_kaiming_uniform_is_uniform_within_one_over_root_in():
    bound = 1 / math.sqrt(300)
    a = np.asarray(fresh([SPEC, SPEC]).a.get_value())
    for layer in a:
        assert kstest(layer.reshape(-1), uniform(-bound, 2 * bound).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(a[0].reshape(-1), a[1].reshape(-1))[0, 1]) < 0.08


@pytest.mark.quick
def test_gaussian_has_standard_deviation_one_over_r():
    a = np.asarray(fresh([SPEC], "gaussian").a.get_value())
    assert kstest(a.reshape(-1), norm(0, 1 / 8).cdf).pvalue > 1e-3


@pytest.mark.parametrize("init", ["kaiming-uniform", "gaussian"])
@pytest.mark.quick
def test_a_smaller_rank_has_its_own_distribution_and_is_padded_with_zeros(init):
    a = np.asarray(fresh([SPEC, SMALLER, None], init).a.get_value())
    bound = 1 / math.sqrt(300)
    distribution = norm(0, 1 / 3) if init == "gaussian" else uniform(-bound, 2 * bound)
    assert a.shape == (3, 300, 8)
    assert kstest(a[1, :, :3].reshape(-1), distribution.cdf).pvalue > 1e-3
    assert not a[1, :, 3:].any()
    assert not a[2].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.quick
def test_b_starts_at_zero_and_the_seed_decides_a(dtype):
    one, same, other = (fresh([SPEC], dtype=dtype, seed=s) for s in (0, 0, 1))
    assert one.a.get_value().dtype == one.b.get_value().dtype == dtype
    assert not np.asarray(one.b.get_value()).any()
    assert np.array_equal(one.a.get_value(), same.a.get_value())
    assert not np.array_equal(one.a.get_value(), other.a.get_value())


def filled(specs, seed=0, **options):
    """Makes an adapter with random B within each layer's rank and zeros beyond."""
    adapter = fresh(specs, seed=seed, **options)
    b = np.random.default_rng(seed).normal(size=adapter.b.get_value().shape).astype(np.float32)
    for layer, spec in zip(b, specs):
        layer[spec.rank if spec else 0 :] = 0
    adapter.b.set_value(jnp.asarray(b))
    return adapter


def apply_stack(parameters, structure, rest, x, key=None):
    """Applies each layer of the stack to its part of x [L, T, K]."""
    adapter = nnx.merge(structure, parameters, rest)
    graph, leaves = nnx.split(adapter)
    return jax.vmap(lambda leaves, x: nnx.merge(graph, leaves)(x, key))(leaves, x)


@pytest.mark.quick
def test_effect_is_scale_times_x_a_b():
    adapter = filled([SPEC, SMALLER, None])
    x = np.random.default_rng(1).normal(size=(3, 5, 300)).astype(np.float32)
    structure, parameters, rest = nnx.split(adapter, LoraParam, ...)
    y = apply_stack(parameters, structure, rest, x)
    a, b = (np.asarray(m.get_value(), np.float64) for m in (adapter.a, adapter.b))
    expected = x @ a @ b * np.array([2.0, 5.0, 0.0])[:, None, None]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert not np.asarray(y)[2].any()


@pytest.mark.quick
def test_padding_has_no_gradient_and_stays_zero_through_steps():
    specs = [SPEC, SMALLER, None]
    adapter = fresh(specs)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, 300)), jnp.float32)
    structure, parameters, rest = nnx.split(adapter, LoraParam, ...)

    @jax.jit
    def step(parameters):
        def loss(p):
            return jnp.sum((apply_stack(p, structure, rest, x) - 1) ** 2)

        gradient = jax.grad(loss)(parameters)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, parameters, gradient), gradient

    for _ in range(3):
        parameters, gradient = step(parameters)
    for tree in (parameters, gradient):
        state = nnx.merge(structure, tree, rest)
        a, b = np.asarray(state.a.get_value()), np.asarray(state.b.get_value())
        for i, rank in enumerate((8, 3, 0)):
            assert not a[i, :, rank:].any()
            assert not b[i, rank:].any()
            assert a[i, :, :rank].all()
            assert b[i, :rank].all()


@pytest.mark.quick
def test_dropout_keeps_the_mean_and_is_off_without_a_key():
    rate = 0.25
    a, b = jnp.eye(400)[None], jnp.eye(400)[None]
    adapter = Adapter(a[0], b[0], jnp.float32(1), [SPEC], rate)
    x = jnp.ones((500, 400))
    np.testing.assert_array_equal(adapter(x, None), x)
    y = np.asarray(adapter(x, jax.random.key(0)))
    assert set(np.unique(y)) == {0.0, np.float32(1 / (1 - rate))}
    assert np.mean(y == 0) == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / y.size))
    assert y.mean() == pytest.approx(1, abs=0.005)
    again, other = (np.asarray(adapter(x, jax.random.key(s))) for s in (0, 1))
    assert np.array_equal(y, again)
    assert not np.array_equal(y, other)
    still = Adapter(a[0], b[0], jnp.float32(1), [SPEC], 0.0)
    np.testing.assert_array_equal(still(x, jax.random.key(0)), x)


@pytest.fixture(scope="module")
def tokens(models):
    return np.load(models / "llama" / "reference.npz")["tokens"]


@pytest.mark.quick
def test_the_adapted_model_starts_as_the_base(models, tokens):
    model = load_model(open_folder(models / "llama"), quant=QuantConfig(), dtype=jnp.float32)
    base = compute(model, tokens)
    config = LoraConfig(rank_pattern={"q_proj": 3}, target_modules=["q_proj", "down_proj"])
    attach(model, choose_adapters(config, model.linears()), jax.random.key(0), dropout=0.1)
    np.testing.assert_array_equal(compute(model, tokens), base)
    b = model.runs[0].q_proj.adapter.b
    b.set_value(b.get_value() + 1)
    assert not np.array_equal(compute(model, tokens), base)


def attach_from_peft(model, folder):
    adapters = read_adapter(folder)
    specs = {path: AdapterSpec(a.rank, a.alpha, a.scale) for path, a in adapters.adapters.items()}
    attach(model, specs, jax.random.key(0))
    for path, linear, i in model.walk():
        if path in specs:
            theirs = adapters.adapters[path]
            a, b = linear.adapter.a, linear.adapter.b
            a.set_value(a.get_value().at[i, :, : theirs.rank].set(theirs.a))
            b.set_value(b.get_value().at[i, : theirs.rank].set(theirs.b))


@pytest.mark.parametrize("name", ["peft_lora", "peft_rslora", "peft_patterns"])
@pytest.mark.quick
def test_logits_are_pefts(models, tokens, name):
    model = load_model(open_folder(models / "llama"), quant=None, dtype=jnp.float32)
    base = compute(model, tokens)
    attach_from_peft(model, models / "llama" / name)
    reference = np.load(models / "llama" / name / "reference.npz")["logits"]
    np.testing.assert_allclose(compute(model, tokens), reference, rtol=1e-4, atol=1e-4)
    assert np.abs(base - reference).max() > 0.1

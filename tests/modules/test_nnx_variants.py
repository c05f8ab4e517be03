"""Variants, initializers, dropout and several adapters on NNX models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_models import TOKENS, Block, D, Experts, Layers, Scanned, Tied, X
from selection import mostly_slow

import qlora_jax as qj
from qlora_jax.modules.adapt import _compiled
from qlora_jax.modules.nnx_model import all_adapters

pytestmark = pytest.mark.quick
MODELS = {"layers": Layers, "scan": Scanned}


def near(x, y, tolerance=2e-5):
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1.0, float(np.abs(y).max())))


def trained(model, name=None, value=0.02):
    for _, own, adapter in all_adapters(model):
        if name in (None, own):
            adapter.b.set_value(adapter.b.get_value() + value)
    return model


def call(model, x=X):
    return nnx.jit(lambda model: model(x))(model)


def lora(model, **settings):
    return qj.add_lora(model, r".*kernel", **{"rank": 2, "rngs": nnx.Rngs(1), **settings})


SETTINGS = {
    "dora": {"variant": "dora"},
    "rsLoRA": {"scaling": "alpha/sqrt(r)"},
    "LoRA-FA": {"freeze_a": True},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize(
    ("model", "name"),
    mostly_slow([*(("layers", name) for name in SETTINGS), ("scan", "dora")], ("scan", "dora")),
)
def test_variants_start_as_the_base_and_merge(model, name):
    base = qj.quantize_model(MODELS[model](nnx.Rngs(0)), ".*kernel")
    y = call(base)
    adapted = lora(base, **SETTINGS[name])
    near(call(adapted), y, 1e-6)
    trained(adapted)
    assert np.abs(call(adapted) - y).max() > 1e-2
    near(call(adapted), call(qj.merge(adapted)), 1e-2 if name == "bfloat16" else 2e-5)


@pytest.mark.slow
def test_dora_follows_finite_differences():
    """Checks the magnitude alone: the other gradients treat the norm as a constant."""
    adapted = trained(lora(Scanned(nnx.Rngs(0)), variant="dora"))
    graph, state, frozen = qj.split(adapted)

    @jax.jit
    def loss(state):
        return jnp.mean(jnp.sin(qj.join(graph, state, frozen)(X)))

    grads = jax.jit(jax.grad(loss))(state)
    path = next(p for p, _ in nnx.to_flat_state(state) if p[-1] == "magnitude")

    def moved(by):
        values = [
            (p, v.copy(v.get_raw_value() + by) if p == path else v)
            for p, v in nnx.to_flat_state(state)
        ]
        return float(loss(nnx.from_flat_state(values)))

    slope = (moved(0.02) - moved(-0.02)) / 0.04
    exact = float(jnp.sum(dict(nnx.to_flat_state(grads))[path].get_raw_value()))
    assert abs(slope - exact) < 0.02 * abs(exact) + 1e-4


def test_scales():
    for scaling, scale in (("alpha/r", 3.0), ("alpha/sqrt(r)", 6.0), ("constant", 12.0)):
        model = lora(Layers(nnx.Rngs(0)), rank=4, alpha=12, scaling=scaling)
        assert {float(a.scale.get_value()) for _, _, a in all_adapters(model)} == {scale}


def test_frozen_a_is_not_trained():
    model = lora(Layers(nnx.Rngs(0)), freeze_a=True)
    _, trained, _ = qj.split(model)
    assert {path[-1] for path, _ in nnx.to_flat_state(trained)} == {"b"}
    grads = nnx.grad(lambda m: m(X).sum(), argnums=nnx.DiffState(0, qj.LoraParam))(model)
    assert {path[-1] for path, _ in nnx.to_flat_state(grads)} == {"b"}


def test_patterns():
    settings = {"rank_pattern": {"layers.1.up": 3, "down.kernel": 5}, "alpha_pattern": {"up": 8}}
    model = lora(Layers(nnx.Rngs(0)), rank=2, alpha=4, **settings)
    found = {p: (a.a.get_value().shape[-1], a.spec().alpha) for p, _, a in all_adapters(model)}
    assert found == {
        "layers.0.up.kernel": (2, 8),
        "layers.0.down.kernel": (5, 4),
        "layers.1.up.kernel": (3, 8),
        "layers.1.down.kernel": (5, 4),
    }


def test_patterns_tell_bare_weights_of_one_module_apart():
    model = Experts(nnx.Rngs(0))
    qj.discover(model, X)
    qj.add_lora(model, r"w_.*", rank=2, rngs=nnx.Rngs(1), rank_pattern={"w_up": 4})
    ranks = {path: adapter.spec().rank for path, _, adapter in all_adapters(model)}
    assert ranks == {"w_up": 4, "w_down": 2}


@pytest.mark.slow
def test_pissa_then_quantizing():
    plain = Scanned(nnx.Rngs(0))
    y = call(plain)
    adapted = lora(Scanned(nnx.Rngs(0)), rank=8, alpha=8, init="pissa")
    near(call(adapted), y, 2e-5)
    qj.quantize_model(adapted, ".*kernel")
    quantized = qj.quantize_model(plain, ".*kernel")
    error, without = (float(jnp.abs(call(m) - y).mean()) for m in (adapted, quantized))
    assert error < without
    near(call(adapted), call(qj.merge(adapted)))


@pytest.mark.slow
def test_loftq_makes_up_for_what_quantizing_loses():
    plain = Scanned(nnx.Rngs(0))
    y = call(plain)
    adapted = Scanned(nnx.Rngs(0))
    lora(adapted, rank=8, alpha=8, init="loftq", quantization={"codebook": "nf4"})
    assert qj.summary(adapted).quantized.variables == 2
    quantized = qj.quantize_model(plain, ".*kernel")
    error, without = (float(jnp.abs(call(m) - y).mean()) for m in (adapted, quantized))
    assert error < 0.9 * without


@pytest.mark.parametrize("model", mostly_slow(MODELS))
def test_dropout(model):
    base = qj.quantize_model(MODELS[model](nnx.Rngs(0)), ".*kernel")
    adapted = trained(lora(base, dropout=0.5))
    run = nnx.jit(lambda model: model(X))
    first, second = run(adapted), run(adapted)
    assert np.abs(first - second).max() > 1e-3
    adapted.eval()
    still = call(adapted)
    np.testing.assert_array_equal(still, call(adapted))
    near(still, call(qj.merge(adapted)))
    adapted.train()
    graph, state, frozen = qj.split(adapted)
    joined = jax.jit(lambda key: qj.join(graph, state, frozen, key=key)(X))
    keys = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(joined(keys[0]), joined(keys[0]))
    assert np.abs(joined(keys[0]) - joined(keys[1])).max() > 1e-3
    # the mean over many keys is the output without dropout
    mean = np.mean([joined(k) - still for k in jax.random.split(keys[1], 200)], 0)
    spread = np.std([joined(k) for k in keys]) + 1
    assert np.abs(mean).mean() < 0.1 * spread
    without = jax.jit(lambda: qj.join(graph, state, frozen)(X))
    np.testing.assert_array_equal(without(), without())


def test_dropout_in_eval_is_off_with_a_key_too():
    adapted = trained(lora(Layers(nnx.Rngs(0)), dropout=0.5))
    adapted.eval()
    graph, state, frozen = qj.split(adapted)
    y = jax.jit(lambda key: qj.join(graph, state, frozen, key=key)(X))(jax.random.key(0))
    near(y, call(adapted))


@pytest.mark.parametrize(
    ("model", "variant"), mostly_slow([("layers", "lora"), ("scan", "dora")], ("scan", "dora"))
)
def test_adapters_are_switched_without_compiling_again(model, variant):
    base = qj.quantize_model(MODELS[model](nnx.Rngs(0)), ".*kernel")
    y = call(base)
    lora(base, name="first", variant=variant)
    qj.use_adapter(base)
    lora(base, name="second", rank=3, rngs=nnx.Rngs(2))
    trained(base, "first", 0.02)
    trained(base, "second", -0.03)
    compiled = []

    @nnx.jit
    def run(model):
        compiled.append(1)
        return model(X)

    outs = {}
    both = [] if variant == "dora" else [("first", "second")]
    for names in ((), ("first",), ("second",), *both, ("first",), ()):
        qj.use_adapter(base, *names)
        out = run(base)
        near(out, outs.setdefault(names, out), 0)
        if names:
            near(out, call(qj.merge(base)))
    assert len(compiled) == 1
    near(outs[()], y, 1e-6)
    assert np.abs(outs["first",] - outs["second",]).max() > 1e-2
    # `split` takes the name of the adapter to train
    _, chosen, _ = qj.split(base, "second")
    assert {path[-2] for path, _ in nnx.to_flat_state(chosen)} == {"second"}
    count = 4 if model == "layers" else 2
    assert qj.summary(base).adapters == {"first": count, "second": count}


def test_eager_calls_compile_once():
    model = lora(qj.quantize_model(Block(nnx.Rngs(0)), ".*kernel"))
    model(X)
    before = _compiled._cache_size()
    for _ in range(3):
        model(X)
    assert _compiled._cache_size() == before


def test_a_tied_table_has_one_adapter():
    model = qj.quantize_model(Tied(nnx.Rngs(0)), ".*", embeddings=True)
    qj.add_lora(model, ["embedding"], rank=2, rngs=nnx.Rngs(1))
    trained(model)
    near(call(model, TOKENS), call(qj.merge(model), TOKENS))
    assert qj.summary(model, TOKENS).decoded == {}
    assert qj.summary(model).trained.parameters == 2 * (10 + D)

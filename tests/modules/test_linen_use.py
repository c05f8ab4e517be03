"""Uses of the params of Linen modules: training, named adapters, files, errors."""

import contextlib
import io
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze
from jax.ad_checkpoint import print_saved_residuals
from selection import mostly_slow

import qlora_jax as qj
from qlora_jax.runtime.errors import UserError

linen = qj.linen


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens, deterministic=True):
        x = nn.Embed(16, 32, name="embed")(tokens)
        x = nn.Dropout(0.5, deterministic=deterministic)(x)
        x = nn.Conv(32, (2,), name="conv")(x)
        return nn.Dense(16, name="head")(jnp.tanh(nn.Dense(64, name="up")(x)))

    def unused(self, x):
        return x


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(96)(jnp.tanh(nn.Dense(160)(x))), None


STACK = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)()
TOKENS = jnp.array([[1, 5, 2, 7]])
DENSE = ["up", "head"]
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    module = Model()
    return module, module.init(jax.random.key(0), TOKENS)["params"]


@pytest.fixture(scope="module")
def qlora(model):
    """The params of `model` in 4 bits, with adapter "default", and "other" with dropout."""
    module, params = model
    params = linen.quantize(module, params, [*DENSE, "embed"], TOKENS)
    params = linen.add_lora(module, params, DENSE, key=jax.random.key(1), rank=2)
    more = {"name": "other", "rank": 3, "dropout": 0.5}
    return linen.add_lora(module, params, ["up"], key=jax.random.key(2), **more)


def stacked():
    shapes = jax.eval_shape(STACK.init, KEY, jnp.ones((2, 96)), None)["params"]
    random = np.random.default_rng(3)
    return jax.tree.map(lambda x: np.float32(0.1 * random.normal(size=x.shape)), shapes)


def filled(params):
    trained, frozen = linen.split(params)
    return linen.join(jax.tree.map(lambda x: jnp.full_like(x, 0.1), trained), frozen)


def test_what_is_left_alone(model):
    with pytest.warns(
        UserWarning, match=r"no product of the example call .* not changed: conv\.kernel$"
    ) as told:
        params = linen.quantize(*model, ".*", TOKENS)
    assert [warning.filename for warning in told] == [__file__]
    assert not isinstance(params["embed"]["embedding"], qj.linen.Kernel)
    assert params["conv"]["kernel"] is model[1]["conv"]["kernel"]
    assert params["up"]["bias"] is model[1]["up"]["bias"]
    found = linen.discover(Model(), jax.eval_shape(lambda: model[1]), TOKENS, deterministic=True)
    assert found["embed.embedding"].table
    assert found["conv.kernel"].axes is None
    # given `axes`, `quantize` needs no example input
    embeddings = linen.quantize(Model(), model[1], ["embed"], axes=found, embeddings=True)
    assert isinstance(embeddings["embed"]["embedding"], qj.linen.Kernel)


def test_choosing_adapters_compiles_nothing(qlora):
    run = jax.jit(lambda params: linen.apply(Model(), params, TOKENS))
    full = filled(qlora)
    names = [(), ("default",), ("other",), ("default", "other")]
    out = [run(linen.use_adapter(full, *own)) for own in names]
    assert run._cache_size() == 1
    for i, first in enumerate(out):
        for second in out[:i]:
            assert not np.array_equal(first, second)
    base = linen.merge(linen.use_adapter(full))
    np.testing.assert_allclose(out[0], run(base), atol=1e-6)
    np.testing.assert_allclose(out[3], run(linen.merge(full)), atol=1e-5)


def test_split_names_what_is_trained(qlora):
    trained, frozen = linen.split(qlora, "other")
    assert sorted(trained) == ["up.kernel.other.a", "up.kernel.other.b"]
    assert sorted(linen.split(qlora)[0]) == [
        *(f"head.kernel.default.{x}" for x in "ab"),
        *(f"up.kernel.{name}.{x}" for name in ("default", "other") for x in "ab"),
    ]
    whole = linen.join(trained, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(qlora)
    jax.tree.map(np.testing.assert_array_equal, whole, qlora)
    with pytest.raises(UserError, match=r"up\.kernel\.other\.a is missing"):
        linen.join({}, frozen)
    with pytest.raises(UserError, match="no place for x; give what split gave"):
        linen.join({**trained, "x": TOKENS}, frozen)


@pytest.mark.quick
def test_training_lowers_the_loss(qlora):
    optimizer = optax.adam(0.02)
    trained, frozen = linen.split(qlora)

    def loss(trained, key):
        params = linen.join(trained, frozen)
        more = {"dropout_key": key, "rngs": {"dropout": key}}
        logits = linen.apply(Model(), params, TOKENS, deterministic=False, **more)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS)
        return losses.mean()

    @jax.jit
    def step(trained, state, key):
        value, grads = jax.value_and_grad(loss)(trained, key)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(trained, updates), state, value

    state, losses = optimizer.init(trained), []
    for i in range(30):
        trained, state, value = step(trained, state, jax.random.key(i))
        losses.append(float(value))
    assert step._cache_size() == 1
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


@pytest.mark.quick
def test_the_dropout_of_adapters_has_a_key_of_its_own():
    module, x = nn.Dense(8), jnp.ones((4, 32))
    params = module.init(KEY, x)["params"]
    params = linen.add_lora(module, params, ["kernel"], x, key=KEY, rank=2, dropout=0.25)
    params = filled(params)
    run = jax.jit(lambda key: linen.apply(module, params, x, dropout_key=key))
    one, again, other = (run(jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    evaluated = linen.apply(module, params, x)
    mean = np.mean([run(jax.random.key(i)) for i in range(300)], (0, 1))
    np.testing.assert_allclose(mean, evaluated[0], atol=0.4)


@pytest.mark.slow
def test_no_float_copy_of_more_than_one_layer():
    """Stacked weights stay in 4 bits in the forward and the backward pass of a scan."""
    x = jnp.ones((2, 96))
    params = linen.quantize(STACK, stacked(), ".*kernel", x, None)
    params = linen.add_lora(STACK, params, ".*kernel", key=jax.random.key(1), rank=2)
    trained, frozen = linen.split(params)

    def loss(trained, frozen):
        return linen.apply(STACK, linen.join(trained, frozen), x, None)[0].sum()

    shapes = r"f(?:loat)?32\[(?:4,)?(?:96,160|160,96)\]"
    with contextlib.redirect_stdout(io.StringIO()) as told:
        print_saved_residuals(loss, trained, frozen)
    assert "f32[4,96,2]" in told.getvalue()
    assert not re.findall(shapes, told.getvalue())
    text = jax.jit(jax.grad(loss)).lower(trained, frozen).compile().as_text()
    assert "f32[4,96,2]" in text
    assert not re.findall(r"f32\[4,(?:96,160|160,96)\]", text)


@pytest.mark.slow
def test_two_records_of_a_module_under_nn_jit_are_the_same():
    module = nn.jit(nn.Dense)(8)
    x = jnp.ones((2, 32))
    params = module.init(jax.random.key(0), x)["params"]
    first, second = (linen.discover(module, params, x) for _ in range(2))
    assert first["kernel"].axes == second["kernel"].axes == ((), (0,), (1,))


@pytest.mark.slow
def test_frozen_dicts_stay_frozen(model):
    params = linen.quantize(Model(), freeze(model[1]), DENSE, TOKENS)
    assert isinstance(params, FrozenDict)
    assert isinstance(linen.merge(params), FrozenDict)
    np.testing.assert_array_equal(
        linen.apply(Model(), params, TOKENS), linen.apply(Model(), params.unfreeze(), TOKENS)
    )


@pytest.mark.slow
def test_mutable_params_keep_their_kernels(qlora):
    _, changed = linen.apply(Model(), qlora, TOKENS, mutable=["params"])
    assert jax.tree.structure(changed["params"]) == jax.tree.structure(qlora)

    class Writes(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.variable("params", "w", jnp.ones, (32, 8))
            y = x @ w.value
            w.value = w.value + 1
            return y

    x = jnp.ones((2, 32))
    params = {"w": jnp.ones((32, 8))}
    params = linen.quantize(Writes(), params, ".*", axes={"w": "...k,kn->...n"})
    message = "^Writes.__call__ writes to w, which is frozen; leave it out of `where`"
    with pytest.raises(UserError, match=message):
        linen.apply(Writes(), params, x, mutable=["params"])


@pytest.mark.slow
def test_files(qlora, tmp_path):
    expected = jax.tree.leaves(qlora)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", qlora)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "saved", jax.eval_shape(lambda: qlora))
    for params in (restored, pickle.loads(pickle.dumps(qlora))):
        assert jax.tree.structure(params) == jax.tree.structure(qlora)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(params), expected)
        out = linen.apply(Model(), params, TOKENS)
    np.testing.assert_array_equal(out, linen.apply(Model(), qlora, TOKENS))


def test_the_summary(model, qlora):
    found = linen.summary(Model(), qlora, TOKENS)
    assert found.quantized.parameters == 32 * 64 + 64 * 16
    assert found.trained.parameters == 2 * (32 + 64) + 2 * (64 + 16) + 3 * (32 + 64)
    assert found.adapters == {"default": 2, "other": 1}
    assert found.decoded == {}
    axes = {"conv.kernel": "...wk,wkn->...n"}
    convolved = linen.quantize(Model(), qlora, ["conv"], axes=axes)
    assert linen.summary(Model(), convolved, TOKENS).decoded == {
        "conv.kernel": ("conv_general_dilated",)
    }


@pytest.mark.quick
@pytest.mark.slow
def test_dora_on_a_stack():
    x = jax.random.normal(KEY, (2, 96))
    params = linen.quantize(STACK, stacked(), ".*kernel", x, None)
    fresh = linen.add_lora(STACK, params, ".*kernel", key=KEY, rank=2, variant="dora")
    run = jax.jit(lambda params: linen.apply(STACK, params, x, None)[0])
    np.testing.assert_allclose(run(fresh), run(params), rtol=1e-5, atol=1e-5)
    other = filled(fresh)
    assert linen.split(other)[0]["Dense_0.kernel.default.magnitude"].shape == (4, 96)
    np.testing.assert_allclose(run(other), run(linen.merge(other)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", mostly_slow(["pissa", "loftq"]))
def test_inits_that_start_from_weights(model, init):
    module, params = model
    more = {"quantization": {"block_size": 32}} if init == "loftq" else {}
    started = linen.add_lora(
        module, params, DENSE, TOKENS, key=jax.random.key(1), rank=4, init=init, **more
    )
    assert isinstance(started["up"]["kernel"].value, qj.QTensor) == (init == "loftq")
    plain = linen.quantize(module, params, DENSE, TOKENS, block_size=32)
    error, bound = (
        jnp.linalg.norm(linen.merge(own)["up"]["kernel"] - params["up"]["kernel"])
        for own in (started, plain)
    )
    assert error < (0.8 * bound if init == "loftq" else 1e-5 * bound)


CASES = {
    "nnx module": (
        lambda m, p, q: linen.quantize(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), p, ".*", TOKENS),
        "Linear is no flax.linen module; use quantize_model, add_lora and the others of qlora_jax "
        "with it",
    ),
    "nnx module as params": (
        lambda m, p, q: linen.merge(nnx.Linear(8, 8, rngs=nnx.Rngs(0))),
        "Linear is a flax.nnx module and holds its weights itself; use the functions of qlora_jax",
    ),
    "linen module": (
        lambda m, p, q: qj.quantize_model(m, ".*"),
        "Model is no flax.nnx module; use qlora_jax.linen with it and its params",
    ),
    "no module": (lambda m, p, q: linen.summary(p, q), "dict is no flax.linen module; give the"),
    "variables": (
        lambda m, p, q: linen.quantize(m, {"params": p}, ".*", TOKENS),
        "params: holds all collections of variables; give variables['params']",
    ),
    "no params": (lambda m, p, q: linen.split([1]), "params: list is no dict; give variables"),
    "no match": (
        lambda m, p, q: linen.quantize(m, p, ".*query", TOKENS),
        "where: '.*query' matches none of the weights; there are ",
    ),
    "no name": (
        lambda m, p, q: linen.quantize(m, p, ["up", "query"], TOKENS),
        "where: 'query' names none of the weights; there are ",
    ),
    "embeddings alone": (
        lambda m, p, q: linen.quantize(m, p, ["embed"], TOKENS),
        "where: ['embed'] matches only embeddings; give embeddings=True to quantize them",
    ),
    "twice": (
        lambda m, p, q: linen.quantize(m, q, ["up"]),
        "up.kernel: is in 4 bits already; leave it out of `where`, or merge first",
    ),
    "same name": (
        lambda m, p, q: linen.add_lora(m, q, ["up"], key=KEY),
        "up.kernel: has an adapter 'default' already; give another name",
    ),
    "nothing to merge": (
        lambda m, p, q: linen.merge(p),
        "the model has no adapters and no weight in 4 bits, so there is nothing to merge; use",
    ),
    "nothing to train": (
        lambda m, p, q: linen.split(p),
        "the model has no adapters to train; call add_lora first",
    ),
    "unknown adapter": (
        lambda m, p, q: linen.use_adapter(q, "third"),
        "adapter 'third': the model has default, other; give one of these",
    ),
    "not finite": (
        lambda m, p, q: linen.quantize(m, jax.tree.map(lambda x: x * jnp.nan, p), ["up"], TOKENS),
        "up.kernel: holds NaN or Inf and cannot be quantized; check the checkpoint",
    ),
    "abstract": (
        lambda m, p, q: linen.quantize(m, jax.eval_shape(lambda: p), ["up"], TOKENS),
        "up.kernel: is abstract and has no values; give params with values, such as those of",
    ),
    "no example": (
        lambda m, p, q: linen.quantize(m, p, ["up"]),
        "up.kernel: it is not known which axes of (32, 64) are summed over; give example arguments "
        "of a call after `where`, or give the axes by axes={path: '...k,kn->...n'}",
    ),
    "no product": (
        lambda m, p, q: linen.add_lora(m, p, ["up", "conv"], TOKENS, key=KEY),
        "conv.kernel: no matrix product of the call has it, only: conv_general_dilated; leave it "
        "out of `where`, or give the axes by axes={path: ",
    ),
    "all axes summed": (
        lambda m, p, q: linen.quantize(m, p, ["up"], axes={"up.kernel": "kn,kn->"}),
        "up.kernel: batch (), contracted (0, 1) and kept () axes are no matrix product with a "
        "weight of 2 axes; give each axis once, and at least one to sum over and one to keep, by "
        "axes={path: ",
    ),
    "no equation": (
        lambda m, p, q: linen.quantize(m, p, ["up"], axes={"up.kernel": "kn"}),
        "up.kernel: 'kn' is no einsum of an input and a weight; give one such as '...k,kn->...n' "
        "by axes={path: ",
    ),
    "unknown path": (
        lambda m, p, q: linen.quantize(m, p, ["up"], axes={"down": "k,kn->n"}),
        "axes: 'down' is none of the weights; there are ",
    ),
    "dora on embedding": (
        lambda m, p, q: linen.add_lora(m, p, ["embed"], TOKENS, key=KEY, variant="dora"),
        "embed.embedding: variant dora does not support embeddings; leave it out of `where`, or ",
    ),
    "unknown setting": (
        lambda m, p, q: linen.add_lora(m, q, ["up"], key=KEY, name="x", ranks=3),
        "ranks",
    ),
    "other axis": (
        lambda m, p, q: linen.add_lora(*other_axis(), key=KEY),
        "Dense_0.kernel: no matrix product of the call has it, only: a loop along another axis "
        "than its first (give it variable_axes={'params': 0}); leave it out of `where`, or give",
    ),
}


def other_axis():
    scan = nn.scan(Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=4)()
    x = jnp.ones((2, 96))
    return (
        scan,
        jax.eval_shape(scan.init, jax.random.key(0), x, None)["params"],
        ".*kernel",
        x,
        None,
    )


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_told_in_one_line(model, qlora, name):
    call, message = CASES[name]
    with pytest.raises(UserError) as told:
        call(*model, qlora)
    assert message in str(told.value)
    assert "\n" not in str(told.value)

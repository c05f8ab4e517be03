"""State that a call changes, copies and checkpoints of models, and training with NNX."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from nnx_models import (
    Block,
    Busy,
    D,
    Experts,
    Layers,
    OneVariable,
    Outside,
    Pair,
    Scanned,
    Structured,
    Tied,
    Twice,
    X,
)
from selection import mostly_slow

import qlora_jax as qj
from qlora_jax.modules.nnx_model import all_adapters
from qlora_jax.runtime.errors import UserError

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module", autouse=True)
def _axes():
    qj.register_kernel(Structured, "w", "...k,kn->...n")
    qj.register_kernel(Busy, "w", "...k,kn->...n")


def qlora(model, where=".*", **settings):
    qj.quantize_model(model, where, block_size=32, embeddings=True)
    qj.add_lora(model, where, rank=2, rngs=nnx.Rngs(1), **settings)
    for _, _, adapter in all_adapters(model):
        adapter.b.set_value(adapter.b.get_value() + 0.02)
    return model


def same(x, y, tolerance=1e-5):
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


def numbers(model):
    """Returns all values of `Busy` that a call changes."""
    hidden = [float(x) for x in model.hidden.get_value()]
    values = (model.norm.mean, model.norm.var, model.count, model.drop.rngs.count)
    return [*(np.asarray(v.get_value(), np.float32) for v in values), np.asarray(hidden)]


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
@pytest.mark.parametrize(
    "how",
    mostly_slow(
        ["as it is", "jit", "grad", "jit of grad", "eval_shape"], "as it is", "jit of grad"
    ),
)
def test_what_a_call_changes_beside_a_kernel_is_as_in_the_plain_model(how):
    model = qlora(Busy(nnx.Rngs(0)), "w")
    plain = qj.merge(model)
    call = {
        "as it is": lambda m: m(X),
        "jit": nnx.jit(lambda m: m(X)),
        "grad": lambda m: nnx.grad(lambda m: jnp.sum(m(X)))(m),
        "jit of grad": nnx.jit(lambda m: nnx.grad(lambda m: jnp.sum(m(X)))(m)),
        "eval_shape": lambda m: nnx.eval_shape(lambda m: m(X), m),
    }[how]
    for _ in range(1 if how == "eval_shape" else 2):
        call(model)
        call(plain)
    if how == "eval_shape":
        assert int(model.count[...]) == int(plain.count[...])
        return
    assert int(model.count[...]) == 2
    for x, y in zip(numbers(model), numbers(plain), strict=True):
        same(x, y)


def test_modes_reach_what_is_beside_a_kernel():
    model = qlora(Busy(nnx.Rngs(0)), "w")
    model.eval()
    same(model(X), model(X), 0)
    model.train()
    assert np.abs(model(X) - model(X)).max() > 0.1


class Counting(nnx.Linear):
    def step(self):
        self.steps = getattr(self, "steps", 0) + 1
        self.last = nnx.Cache(jnp.ones(2))
        return self

    def forget(self):
        del self.steps, self.last


def test_attributes_that_a_method_sets_and_deletes():
    model = qlora(Counting(D, 4, rngs=nnx.Rngs(0)))
    assert model.step().step() is model
    assert model.steps == 2
    same(model.last[...], [1, 1], 0)
    model.forget()
    assert not hasattr(model, "steps")
    assert not hasattr(model, "last")


class Yielding(nnx.Linear):
    def both(self, x):
        yield x @ self.kernel[...]
        yield self(x)


def test_generators_read_the_decoded_weight():
    model = qj.quantize_model(Yielding(D, 4, use_bias=False, rngs=nnx.Rngs(0)), ".*")
    first, second = model.both(X)
    same(first, second)


class Writing(nnx.Linear):
    def __call__(self, x):
        self.kernel[...] = self.kernel[...] * 2
        return super().__call__(x)


def test_a_method_that_writes_to_a_frozen_weight_is_an_error():
    model = qlora(Writing(D, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match=r"Writing\.__call__ writes to kernel.*`where`"):
        model(X)


def test_arguments_and_results_of_all_kinds():
    model = qlora(Structured(nnx.Rngs(0)))
    plain = qj.merge(model)
    rngs, others = nnx.Rngs(noise=5), nnx.Rngs(noise=5)
    for _ in range(2):
        y = model.encode({"x": X}, scale=0.5, name="some", rngs=rngs)
        expected = plain.encode({"x": X}, scale=0.5, name="some", rngs=others)
        assert type(y) is Pair
        assert y.right == {"name": "some", "n": 3, "more": None}
        same(y.left, expected.left)
    assert int(rngs.noise.count[...]) == int(others.noise.count[...]) == 2
    y = jax.jit(lambda x: model.encode({"x": x}, skip=True).left)(X)
    same(y, plain.encode({"x": X}, skip=True).left)


def test_a_weight_that_another_module_reads_is_decoded_and_told():
    model = qj.quantize_model(Outside(nnx.Rngs(0)), ".*")
    same(model(X), qj.merge(model)(X), 1e-3)
    assert qj.summary(model, X).decoded == {"inner.kernel": ("read",)}
    assert "QWeight" in str(model)


def test_training_with_nnx_changes_adapters_alone():
    model = qlora(Layers(nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=qj.LoraParam)
    before = jax.tree.map(np.asarray, nnx.state(model))

    def loss(model, x):
        return jnp.mean((model(x) - 1) ** 2)

    @nnx.jit
    def step(model, optimizer, x):
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, qj.LoraParam))(model, x)
        optimizer.update(model, grads)
        return value

    values = [float(step(model, optimizer, X)) for _ in range(8)]
    assert values[-1] < 0.8 * values[0]
    after = dict(nnx.to_flat_state(nnx.state(model)))
    for path, variable in nnx.to_flat_state(before):
        equal = jax.tree.map(np.array_equal, variable.get_raw_value(), after[path].get_raw_value())
        trained = isinstance(variable, qj.LoraParam)
        assert all(jax.tree.leaves(equal)) is not trained, path


@pytest.mark.slow
def test_training_with_jax_is_training_with_nnx():
    model = qlora(Tied(nnx.Rngs(0)))
    tokens = jnp.asarray([[1, 2]])
    f = lambda m: jnp.sum(jnp.tanh(m(tokens)))  # noqa: E731
    grads = nnx.grad(f, argnums=nnx.DiffState(0, qj.LoraParam))(model)
    graph, lora, frozen = qj.split(model)
    again = jax.jit(jax.grad(lambda lora: f(qj.join(graph, lora, frozen))))(lora)
    jax.tree.map(lambda x, y: same(x, y), nnx.to_pure_dict(grads), nnx.to_pure_dict(again))


COPIES = {
    "deepcopy": copy.deepcopy,
    "clone": nnx.clone,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "split and merge": lambda m: nnx.merge(*nnx.split(m)),
    "join": lambda m: qj.join(*qj.split(m)),
    "map": lambda m: nnx.merge(nnx.graphdef(m), jax.tree.map(jnp.asarray, nnx.state(m))),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", mostly_slow([Block, Scanned], Block))
def test_copies_are_the_model(how, make):
    model = qlora(make(nnx.Rngs(0)))
    again = COPIES[how](model)
    assert type(again) is type(model)
    same(again(X), model(X), 0)
    same(qj.merge(again)(X), model(X), 1e-4)


def test_orbax_keeps_codes(tmp_path):
    model = qlora(Layers(nnx.Rngs(0)))
    state = nnx.state(model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    other = qlora(Layers(nnx.Rngs(5)))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.state(other))
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update(other, checkpointer.restore(tmp_path / "state", target))
    for x, y in zip(jax.tree.leaves(nnx.state(other)), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(x, y)
    same(other(X), model(X), 0)


def test_an_abstract_call_has_the_shapes_of_a_real_one():
    model = qlora(Layers(nnx.Rngs(0)))
    assert nnx.eval_shape(lambda m: m(X), model).shape == X.shape
    abstract = nnx.eval_shape(lambda: qlora(Block(nnx.Rngs(0))))
    assert abstract.up.kernel.shape == (D, 2 * D)
    pure = nnx.to_pure_dict(nnx.state(model))
    assert pure["layers"][0]["up"]["kernel"].shape == (D, 2 * D)


def test_what_is_tied_stays_tied():
    model = qlora(Tied(nnx.Rngs(0)))
    for each in (model, nnx.clone(model), qj.merge(model)):
        variables = nnx.to_flat_state(nnx.state(each))
        assert len([p for p, _ in variables if p[-1] == "embedding"]) == 1


@pytest.mark.parametrize("make", [Twice, OneVariable])
def test_what_is_shared_stays_shared(make):
    model = qlora(make(nnx.Rngs(0)))
    assert model.first.kernel is model.second.kernel
    assert model.first.kernel_adapters["default"] is model.second.kernel_adapters["default"]
    plain = qj.merge(model)
    assert plain.first.kernel is plain.second.kernel
    assert type(plain.first) is nnx.Linear
    assert qj.summary(model).quantized.variables == 1


def test_merging_leaves_the_model_as_it_is_and_brings_the_class_back():
    model = qlora(Experts(nnx.Rngs(0)), ["router.kernel"])
    y = model(X)
    plain = qj.merge(model)
    assert type(plain) is Experts
    assert type(plain.router.kernel) is nnx.Param
    assert isinstance(model, Experts)
    same(model(X), y, 0)
    assert not any("_adapters" in str(path) for path, _ in nnx.to_flat_state(nnx.state(plain)))

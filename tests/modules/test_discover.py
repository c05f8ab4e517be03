"""Axes found by one abstract call or by a registered class, and the report of `summary`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_models import TOKENS, language

import qlora_jax as qj
from qlora_jax import UserError
from qlora_jax.modules.axes import TABLE, Axes
from qlora_jax.modules.variables import QWeight
from qlora_jax.quant import bits_per_parameter

pytestmark = pytest.mark.quick


class Bare(nnx.Module):
    """Four kinds of weights: a table, a product over three axes, a factor, a summed array."""

    def __init__(self, rngs: nnx.Rngs):
        def draw(*shape):
            return nnx.Param(0.1 * jax.random.normal(rngs.params(), shape))

        self.table, self.project = draw(10, 64), draw(64, 4, 32)
        self.factor, self.summed = draw(4, 32), draw(64, 8)

    def __call__(self, index: jax.Array, times: int = 1) -> jax.Array:
        x = jnp.take(self.table[...], index, axis=0)
        y = jnp.einsum("td,dnh->tnh", x, self.project[...]) * self.factor[...]
        return times * y + self.summed[...].sum()


INDEX = jnp.arange(5)


def test_axes_are_found_and_kept():
    model = Bare(nnx.Rngs(0))
    found = qj.discover(model, INDEX, times=2)
    assert found == {"project": Axes((), (0,), (1, 2)), "table": TABLE}
    assert type(model) is Bare
    qj.quantize_model(model, ["project", "table"], embeddings=True)
    assert qj.summary(model, INDEX).decoded == {}
    qj.add_lora(model, ["project", "table"], rank=4, rngs=nnx.Rngs(1))
    assert qj.summary(model).adapters == {"default": 2}
    np.testing.assert_allclose(qj.merge(model)(INDEX), model(INDEX), atol=1e-6)


def test_weights_without_axes_are_refused_by_name():
    with pytest.raises(
        UserError, match=r"Bare.project \(64, 4, 32\).*qlora_jax.discover.*register"
    ):
        qj.quantize_model(Bare(nnx.Rngs(0)), "project")


def test_weights_without_product_are_not_offered():
    model = Bare(nnx.Rngs(0))
    qj.discover(model, INDEX)
    with pytest.raises(UserError, match=r"none of the weights; there are table, project$"):
        qj.quantize_model(model, "summed")


def test_a_weight_that_is_left_out_is_told():
    model = Bare(nnx.Rngs(0))
    qj.discover(model, INDEX)
    with pytest.warns(
        UserWarning, match="no product of the example call uses; they are not changed: summed$"
    ):
        qj.quantize_model(model, "project|summed")
    assert isinstance(model.summed, nnx.Param)


def test_registered_class():
    class Project(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 64, 32)))

        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.einsum("btd,ndh->btnh", x, self.w[...])

    qj.register_kernel(Project, "w", "btd,ndh->btnh")
    model, x = Project(nnx.Rngs(0)), jnp.ones((2, 3, 64))
    before = model(x)
    qj.quantize_model(model, "w")
    assert model.w.get_raw_value().shape == (64, 128)
    assert qj.summary(model, x).decoded == {}
    assert jnp.abs(model(x) - before).max() < 0.3 * jnp.abs(before).max()


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("ab,cd->abcd", "no matrix product"),
        ("ab,bc,cd->ad", "no einsum of an input and a weight"),
        (Axes((), (0,), (0,)), "no matrix product"),
        (Axes((), (), (0, 1)), "no matrix product"),
    ],
)
def test_what_is_no_product_is_refused(axes, message):
    with pytest.raises(UserError, match=f"Bare.project: .*{message}.*register_kernel"):
        qj.register_kernel(Bare, "project", axes)


def test_register_needs_a_class_of_modules():
    with pytest.raises(UserError, match="no class of NNX modules"):
        qj.register_kernel(dict, "w", "ab,bc->ac")


def test_stacks_along_another_axis_are_refused():
    make = nnx.vmap(lambda rngs: nnx.Linear(64, 32, rngs=rngs), out_axes=1)
    stack = make(nnx.Rngs(0).split(3))
    with pytest.raises(UserError, match=r"kernel: .* \(64, 32\).*\(3, 32\); stack the layers"):
        qj.quantize_model(stack, "kernel")


def test_counts_and_bytes():
    model = qj.quantize_model(language(), ".*kernel")
    qj.add_lora(model, ["query", "up"], rank=4, rngs=nnx.Rngs(1))
    found = qj.summary(model)
    sizes = [x.size for x in jax.tree.leaves(nnx.state(language(), nnx.Param))]
    assert found.quantized.parameters + found.frozen.parameters == sum(sizes)
    assert found.quantized.variables == 12
    assert found.trained.parameters == 2 * 4 * (64 + 64 + 64 + 128)
    assert found.frozen.bytes == 4 * found.frozen.parameters
    quantized = [x for _, x in nnx.iter_graph(model) if isinstance(x, QWeight)]
    bits = [bits_per_parameter(x.get_raw_value()) * x.size for x in quantized]
    assert found.quantized.bytes == sum(bits) / 8
    total = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    assert total == sum(part.bytes for part in found[:4])
    assert "give example inputs" in str(found)


def test_decoded_weights_are_named():
    class Doubled(nnx.Linear):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ (2 * self.kernel[...])

    model = nnx.List([Doubled(64, 32, rngs=nnx.Rngs(0)), nnx.Linear(64, 32, rngs=nnx.Rngs(1))])
    qj.quantize_model(model, ".*kernel")

    class Both(nnx.Module):
        def __init__(self):
            self.parts = nnx.data(model)

        def __call__(self, x: jax.Array) -> jax.Array:
            return sum(part(x) for part in self.parts) + self.parts[1].kernel[...].sum()

    found = qj.summary(Both(), jnp.ones((3, 64)))
    assert found.decoded == {"parts.0.kernel": ("mul",), "parts.1.kernel": ("read",)}
    assert "parts.0.kernel (mul)" in str(found)
    assert "no weight is decoded" in str(
        qj.summary(qj.quantize_model(language(), ".*kernel"), TOKENS)
    )

"""Bad input for NNX models: one line names the fault and the remedy; the model is unchanged."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_models import Experts, Layers, Tied

import qlora_jax as qj
from qlora_jax.runtime.errors import UserError

pytestmark = pytest.mark.quick
RNGS = {"rngs": nnx.Rngs(1)}


def contents(model):
    """Returns the classes, variables and arrays of a model, for comparison."""
    classes = [(path, type(m)) for path, m in nnx.iter_modules(model)]
    state = nnx.to_flat_state(nnx.state(model))
    values = [(path, type(v), [np.asarray(x) for x in jax.tree.leaves(v)]) for path, v in state]
    return classes, values


def poisoned(model=None):
    model = model or Layers(nnx.Rngs(0))
    kernel = model.layers[1].down.kernel
    kernel.set_value(kernel.get_value().at[3, 4].set(jnp.nan))
    return model


def quantized(**settings):
    return qj.quantize_model(Layers(nnx.Rngs(0)), r".*down.*", **settings)


def adapted(**settings):
    return qj.add_lora(Layers(nnx.Rngs(0)), r".*down.*", **RNGS, **settings)


CASES = {
    "where matches nothing": (
        lambda: Layers(nnx.Rngs(0)),
        lambda m: qj.quantize_model(m, "kernel"),
        r"where: 'kernel' matches none of the weights; there are layers\.0\.down\.kernel, ",
    ),
    "a name that matches nothing": (
        lambda: Layers(nnx.Rngs(0)),
        lambda m: qj.add_lora(m, ["up", "query"], **RNGS),
        r"where: 'query' names none of the weights; there are layers",
    ),
    "a function that matches nothing": (
        lambda: Layers(nnx.Rngs(0)),
        lambda m: qj.add_lora(m, lambda path, module: False, **RNGS),
        r"matches none of the weights",
    ),
    "no regular expression": (
        lambda: Layers(nnx.Rngs(0)),
        lambda m: qj.quantize_model(m, "(down"),
        r"where: '\(down' is not a regular expression.*list of names",
    ),
    "embeddings alone": (
        lambda: Tied(nnx.Rngs(0)),
        lambda m: qj.quantize_model(m, ".*embedding"),
        "embeddings=True",
    ),
    "quantized twice": (
        quantized,
        lambda m: qj.quantize_model(m, ".*"),
        r"layers\.0\.down\.kernel: is in 4 bits already; .*merge first",
    ),
    "a name twice": (
        adapted,
        lambda m: qj.add_lora(m, ".*", **RNGS),
        r"layers\.0\.down\.kernel: has an adapter 'default' already; give another name",
    ),
    "merging a plain model": (
        lambda: Layers(nnx.Rngs(0)),
        qj.merge,
        "nothing to merge; use the model as it is",
    ),
    "splitting a plain model": (lambda: quantized(), qj.split, "call add_lora first"),
    "splitting off a stranger": (adapted, lambda m: qj.split(m, "other"), "adapter 'other'"),
    "using a stranger": (
        adapted,
        lambda m: qj.use_adapter(m, "default", "other"),
        "adapter 'other': the model has default; give one of these",
    ),
    "NaN": (
        poisoned,
        lambda m: qj.quantize_model(m, ".*"),
        r"layers\.1\.down\.kernel: holds NaN or Inf.*check the checkpoint",
    ),
    "NaN and loftq": (
        poisoned,
        lambda m: qj.add_lora(m, ".*", init="loftq", quantization={"codebook": "nf4"}, **RNGS),
        r"layers\.1\.down\.kernel: holds NaN or Inf",
    ),
    "unknown axes": (
        lambda: Experts(nnx.Rngs(0)),
        lambda m: qj.quantize_model(m, "w_up"),
        r"w_up: .*Experts\.w_up \(3, 32, 16\).*discover\(model.*register_kernel\(Experts, 'w_up'",
    ),
    "unknown axes beside known ones": (
        lambda: Experts(nnx.Rngs(0)),
        lambda m: qj.add_lora(m, ".*", **RNGS),
        "register_kernel",
    ),
    "an unknown codebook": (
        lambda: Layers(nnx.Rngs(0)),
        lambda m: qj.quantize_model(m, ".*", codebook="nf5"),
        "nf5",
    ),
    "a block size": (
        lambda: Layers(nnx.Rngs(0)),
        lambda m: qj.quantize_model(m, ".*", block_size=48),
        "48",
    ),
    "an unknown setting": (
        lambda: Layers(nnx.Rngs(0)),
        lambda m: qj.add_lora(m, ".*", ranks=3, **RNGS),
        "ranks",
    ),
    "a setting that is elsewhere": (
        lambda: Layers(nnx.Rngs(0)),
        lambda m: qj.add_lora(m, ".*", target_modules=["up"], **RNGS),
        "target_modules: `where` chooses the weights; remove it",
    ),
    "an unknown variant": (
        lambda: Layers(nnx.Rngs(0)),
        lambda m: qj.add_lora(m, ".*", variant="dorra", **RNGS),
        "dorra",
    ),
    "rank 0": (
        lambda: Layers(nnx.Rngs(0)),
        lambda m: qj.add_lora(m, ".*", rank=0, **RNGS),
        "rank",
    ),
    "a pattern that matches nothing": (
        lambda: Layers(nnx.Rngs(0)),
        lambda m: qj.add_lora(m, ".*", rank_pattern={"query": 2}, **RNGS),
        "rank_pattern: 'query' matches",
    ),
    "DoRA on a table": (
        lambda: Tied(nnx.Rngs(0)),
        lambda m: qj.add_lora(m, ".*", variant="dora", **RNGS),
        r"embed\.embedding: variant dora does not support embeddings.*`where`",
    ),
    "DoRA on a table in 4 bits": (
        lambda: qj.quantize_model(Tied(nnx.Rngs(0)), ".*", embeddings=True),
        lambda m: qj.add_lora(m, ".*", variant="dora", **RNGS),
        r"embed\.embedding: variant dora does not support embeddings.*`where`",
    ),
    "pissa on 4 bits": (
        quantized,
        lambda m: qj.add_lora(m, ".*", init="pissa", **RNGS),
        r"layers\.0\.down\.kernel: init pissa needs a 16-bit weight.*before quantize_model",
    ),
    "loftq on 4 bits": (
        quantized,
        lambda m: qj.add_lora(m, ".*", init="loftq", quantization={}, **RNGS),
        r"layers\.0\.down\.kernel: is in 4 bits already",
    ),
    "loftq without quantization": (
        lambda: Layers(nnx.Rngs(0)),
        lambda m: qj.add_lora(m, ".*", init="loftq", **RNGS),
        "init loftq .*quantization=",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_errors_leave_the_model_as_it_was(name):
    make, act, message = CASES[name]
    model = make()
    classes, values = contents(model)
    with pytest.raises(UserError, match=message) as error:
        act(model)
    assert "\n" not in str(error.value)
    after, others = contents(model)
    assert after == classes
    assert [x[:2] for x in others] == [x[:2] for x in values]
    for (_, _, x), (_, _, y) in zip(values, others):
        jax.tree.map(np.testing.assert_array_equal, x, y)


ABSTRACT = {
    "quantize_model": lambda m: qj.quantize_model(m, ".*"),
    "add_lora": lambda m: qj.add_lora(m, ".*", **RNGS),
}


@pytest.mark.parametrize("name", ABSTRACT)
def test_an_abstract_model_needs_values(name):
    model = nnx.eval_shape(lambda: Layers(nnx.Rngs(0)))
    with pytest.raises(UserError, match=r"layers\.0\.down\.kernel: is abstract.*qlora_jax\.fill"):
        ABSTRACT[name](model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Dense(3), r"Dense is no flax\.nnx module; use qlora_jax\.linen"),
        ({"kernel": np.ones((2, 2))}, r"dict is no flax\.nnx module; give the model itself"),
        (None, "NoneType is no"),
        (nnx.Linear, "give the model itself"),
    ],
)
@pytest.mark.parametrize(
    "act",
    [
        lambda m: qj.quantize_model(m, ".*"),
        lambda m: qj.add_lora(m, ".*", **RNGS),
        qj.merge,
        qj.split,
        qj.use_adapter,
        qj.summary,
        qj.discover,
    ],
)
def test_what_is_no_nnx_model(model, message, act):
    with pytest.raises(UserError, match=message):
        act(model)


class Scaled(nnx.Module):
    def __init__(self):
        self.scales = nnx.Param(jnp.ones((4, 4)))

    def __call__(self, x):
        return x * self.scales[...]


def test_a_weight_that_no_product_has_is_named():
    model = Scaled()
    with pytest.raises(UserError, match=r"scales: .*discover.*register_kernel"):
        qj.add_lora(model, ".*", **RNGS)
    assert qj.discover(model, jnp.ones((4, 4))) == {}
    with pytest.raises(UserError, match="matches none of the weights; there are none"):
        qj.add_lora(model, ".*", **RNGS)


def test_a_module_without_weights():
    with pytest.raises(UserError, match="there are none"):
        qj.quantize_model(nnx.Dropout(0.5), ".*")


def test_a_dora_adapter_is_on_alone():
    model = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    qj.add_lora(model, "kernel", rngs=nnx.Rngs(1), variant="dora")
    with pytest.raises(UserError, match="kernel: adapters default, second cannot be on at once"):
        qj.add_lora(model, "kernel", rngs=nnx.Rngs(2), name="second")
    qj.use_adapter(model)
    qj.add_lora(model, "kernel", rngs=nnx.Rngs(2), name="second")
    with pytest.raises(UserError, match="a DoRA adapter must be on alone"):
        qj.use_adapter(model, "default", "second")
    qj.use_adapter(model, "default")

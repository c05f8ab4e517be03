"""A model filled from an abstract one equals the same model quantized with all its values."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax_models import TOKENS, language
from safetensors.numpy import save_file
from selection import mostly_slow

import qlora_jax as qj
from qlora_jax import UserError

WHERE = ".*kernel"


@pytest.fixture(scope="module")
def values():
    model = language()
    return {
        ".".join(map(str, path)): np.asarray(x.get_raw_value())
        for path, x in nnx.iter_graph(model)
        if isinstance(x, nnx.Param)
    }


@pytest.fixture(scope="module")
def expected():
    return qj.quantize_model(language(), WHERE)(TOKENS)


def abstract():
    return nnx.eval_shape(language)


def _function(values, folder):
    return lambda path, shape: values.get(path)


def _file(values, folder):
    save_file(values, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def _folder(values, folder):
    save_file(values, folder / "model.safetensors")
    return folder


def _state(values, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", nnx.state(language()))
    return folder / "state"


def _pure(values, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "pure", nnx.to_pure_dict(nnx.state(language())))
    return folder / "pure"


@pytest.mark.parametrize("source", mostly_slow([_function, _file, _folder, _state, _pure], _state))
def test_sources(values, expected, source, tmp_path):
    model = qj.fill(abstract(), source(values, tmp_path), WHERE)
    np.testing.assert_array_equal(model(TOKENS), expected)


def test_nothing_is_quantized_without_where(values):
    model = qj.fill(abstract(), lambda path, shape: values[path])
    np.testing.assert_array_equal(model(TOKENS), language()(TOKENS))


def test_one_value_at_a_time(values):
    """The float array of a quantized weight is freed before the next value is read."""
    read_before = []

    def read(path, shape):
        assert all(array() is None for array in read_before)
        array = values[path].copy()
        if path.endswith("kernel"):
            read_before.append(weakref.ref(array))
        return array

    qj.fill(abstract(), read, WHERE)
    assert len(read_before) == 12


def test_random_keys_start_anew():
    def make():
        return nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    model = qj.fill(nnx.eval_shape(make), lambda path, shape: None)
    assert not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(nnx.state(model)))
    model(jnp.ones(3))


def test_stacks_are_quantized_matrix_by_matrix():
    make = nnx.vmap(lambda rngs: nnx.Linear(64, 32, rngs=rngs))
    whole = make(nnx.Rngs(0).split(3))
    kernel, bias = np.asarray(whole.kernel[...]), np.asarray(whole.bias[...])
    shapes = nnx.eval_shape(lambda: make(nnx.Rngs(0).split(3)))
    values = {"kernel": kernel, "bias": bias}
    model = qj.fill(shapes, lambda path, shape: values[path], "kernel")
    stacked = qj.quantize(kernel)
    for x, y in zip(jax.tree.leaves(model.kernel.get_raw_value()), jax.tree.leaves(stacked)):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "no such file or folder"),
        (lambda path, shape: None, "the source has no value for it"),
        (lambda path, shape: np.zeros(3), r"is \(3,\) in the source and"),
        (lambda path, shape: np.full(shape.shape, np.nan, np.float32), "holds NaN or Inf"),
    ],
)
def test_refused(source, message):
    model = abstract()
    before = jax.tree.leaves(nnx.state(model))
    with pytest.raises(UserError, match=message):
        qj.fill(model, source, WHERE)
    assert jax.tree.leaves(nnx.state(model)) == before


def test_damaged_files_are_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match="truncated or damaged"):
        qj.fill(abstract(), tmp_path / "a.safetensors")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "_METADATA").write_text("{")
    with pytest.raises(UserError, match="no orbax checkpoint"):
        qj.fill(abstract(), tmp_path / "checkpoint")

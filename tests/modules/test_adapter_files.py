"""Adapters of an NNX model in a folder: loading gives the saved values back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax_models import TOKENS, language, trained
from safetensors.numpy import load_file, save_file
from selection import mostly_slow

import qlora_jax as qj
from qlora_jax import UserError

pytestmark = pytest.mark.quick


def base():
    return qj.quantize_model(language(), ".*kernel")


def adapted(variant="lora", rank=4):
    model = qj.add_lora(base(), ["query", "up"], rank, rngs=nnx.Rngs(1), variant=variant)
    return trained(model)


@pytest.mark.parametrize("variant", mostly_slow(["lora", "dora"], "dora"))
def test_round_trip(variant, tmp_path):
    model = adapted(variant)
    qj.save_adapter(model, tmp_path / "a")
    fresh = qj.load_adapter(base(), tmp_path / "a")
    np.testing.assert_array_equal(fresh(TOKENS), model(TOKENS))
    again = qj.add_lora(base(), ["query", "up"], 4, rngs=nnx.Rngs(7), variant=variant)
    np.testing.assert_array_equal(qj.load_adapter(again, tmp_path / "a")(TOKENS), model(TOKENS))


def test_several_names(tmp_path):
    model = adapted()
    qj.save_adapter(model, tmp_path / "a")
    qj.load_adapter(model, tmp_path / "a", "second")
    with pytest.raises(UserError, match="the model has default, second; give the name of one"):
        qj.save_adapter(model, tmp_path / "b")
    qj.use_adapter(model, "second")
    np.testing.assert_array_equal(model(TOKENS), adapted()(TOKENS))
    qj.save_adapter(model, tmp_path / "b", "second")
    first, second = (load_file(tmp_path / x / "adapter.safetensors") for x in "ab")
    assert first.keys() == second.keys()
    assert all((first[k] == second[k]).all() for k in first)


def test_orbax_holds_a_and_b(tmp_path):
    model = adapted()
    _, state, _ = qj.split(model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        fresh = qj.add_lora(base(), ["query", "up"], 4, rngs=nnx.Rngs(7))
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, qj.split(fresh)[1])
        nnx.update(fresh, checkpointer.restore(tmp_path / "state", shapes))
    np.testing.assert_array_equal(fresh(TOKENS), model(TOKENS))


def test_whole_model_in_orbax(tmp_path):
    model = adapted()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
        checkpointer.wait_until_finished()
        fresh = qj.add_lora(base(), ["query", "up"], 4, rngs=nnx.Rngs(7))
        nnx.update(fresh, checkpointer.restore(tmp_path / "state", nnx.state(fresh)))
    np.testing.assert_array_equal(fresh(TOKENS), model(TOKENS))


def test_adapter_of_another_model_is_refused(tmp_path):
    qj.save_adapter(adapted(), tmp_path / "a")
    other = language(features=128)
    with pytest.raises(UserError) as error:
        qj.load_adapter(other, tmp_path / "a")
    for line in (
        "blocks.0.attn.query.kernel is (64, 64) in the adapter and (128, 128) in the model",
        "blocks.1.up.kernel is (64, 128) in the adapter and (128, 256) in the model",
    ):
        assert line in str(error.value)
    with pytest.raises(UserError, match="in the adapter and not in the model"):
        qj.load_adapter(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), tmp_path / "a")
    with pytest.raises(UserError, match="of another rank or variant"):
        qj.load_adapter(adapted(rank=8), tmp_path / "a")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter.json").unlink(), "adapter.json: no such file"),
        (lambda f: (f / "adapter.json").write_text("[]"), "adapter.json: "),
        (lambda f: _edited(f, format=2), "adapter.json: format"),
        (lambda f: _edited(f, variant="other"), "adapter.json: variant"),
        (lambda f: (f / "adapter.safetensors").write_bytes(b"abc"), "truncated or damaged"),
        (lambda f: save_file({"x": np.zeros(1)}, f / "adapter.safetensors"), "is missing"),
        (lambda f: _ranked(f), "does not have the rank in adapter.json, 2"),
    ],
)
def test_damaged_files_are_refused(damage, message, tmp_path):
    qj.save_adapter(adapted(), tmp_path / "a")
    damage(tmp_path / "a")
    model = base()
    with pytest.raises(UserError, match=message):
        qj.load_adapter(model, tmp_path / "a")
    np.testing.assert_array_equal(model(TOKENS), base()(TOKENS))


def _edited(folder, **changes):
    content = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps(content | changes))


def _ranked(folder):
    content = json.loads((folder / "adapter.json").read_text())
    for own in content["weights"].values():
        own["rank"] = 2
    (folder / "adapter.json").write_text(json.dumps(content))


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes.txt, which is not an adapter's"):
        qj.save_adapter(adapted(), tmp_path)
    with pytest.raises(UserError, match="the model has no adapter"):
        qj.save_adapter(base(), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert jnp.isfinite(base()(TOKENS)).all()

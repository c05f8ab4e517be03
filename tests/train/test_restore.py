"""Loads a run directory as the trained model, or as the model before training."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax import config as configs
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.models import trees
from qlora_jax.runtime.errors import UserError
from qlora_jax.train import rundir
from qlora_jax.train.checkpoint import Checkpoints
from qlora_jax.train.optimizer import adamw
from qlora_jax.train.restore import from_config, restore
from qlora_jax.train.setup import load_run_model, open_model
from qlora_jax.train.state import init_state

pytestmark = pytest.mark.quick

TOKENS = jnp.asarray([[5, 17, 201, 40, 3, 99, 128, 7]], jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def apply(structure, weights):
    model = nnx.merge(structure, weights)
    ones, positions = jnp.ones_like(TOKENS), jnp.arange(TOKENS.shape[1])[None]
    return model.logits(model.hidden(TOKENS, ones, positions, dtype=jnp.float32))


def logits(model):
    return np.asarray(apply(*nnx.split(model)))


@pytest.fixture
def make_run(tmp_path, tiny_model, chats):
    """Makes a run directory with a checkpoint of step 7, whose weights are not the initial ones."""

    def make(method, compute="float32", **more):
        tree = {
            "model": {"path": str(tiny_model), "compute_dtype": compute},
            "data": {"source": str(chats), "sequence_length": 64},
            "output": str(tmp_path / "run"),
            "method": method,
            "lora": {"rank": 4, "target_modules": ["q_proj", "down_proj"]},
            "train": {"steps": 10},
        }
        config = configs.from_tree(tree | more, "test")
        with rundir.claim(config, {}, resume=False, overwrite=False):
            pass
        model, _ = load_run_model(config, open_model(config)[0], pytest.fail)
        graph, trained, frozen = trees.split(model, method)
        random = np.random.default_rng(0)
        trained = jax.tree.map(
            lambda x: x + jnp.asarray(random.normal(size=x.shape) * 0.1, x.dtype), trained
        )
        state = init_state(trained, adamw(config.optimizer, 10), compute == "float16")
        state = state._replace(step=jnp.int32(7))
        checkpoints = Checkpoints(tmp_path / "run", 2)
        checkpoints.save(state, {})
        checkpoints.close()
        return tmp_path / "run", nnx.merge(graph, trained, frozen)

    return make


@pytest.mark.parametrize(
    ("method", "compute"), [("qlora", "float16"), ("lora", "float32"), ("full", "float32")]
)
def test_the_trained_model_comes_back(make_run, method, compute):
    folder, trained = make_run(method, compute)
    before = sorted(folder.rglob("*"))
    restored = restore(folder, base=False, warn=pytest.fail)
    assert restored.step == 7
    assert restored.config == rundir.open_run(folder)
    assert sorted(folder.rglob("*")) == before
    assert trees.sha256(nnx.state(restored.model)) == trees.sha256(nnx.state(trained))


def test_its_logits_are_the_trained_models_and_the_bases_those_of_the_files(make_run, tiny_model):
    folder, trained = make_run("lora", model={"path": str(tiny_model), "storage_dtype": "float32"})
    found = logits(restore(folder, base=False, warn=pytest.fail).model)
    np.testing.assert_array_equal(found, logits(trained))
    base = restore(folder, base=True, warn=pytest.fail)
    assert base.step == 0
    plain = logits(load_model(open_folder(tiny_model), quant=None, dtype=jnp.float32))
    np.testing.assert_allclose(logits(base.model), plain, rtol=0, atol=1e-6)
    assert np.abs(found - plain).max() > 0.1


def test_a_config_gives_the_model_it_starts_from(make_run):
    folder, _ = make_run("lora")
    base = restore(folder, base=True, warn=pytest.fail)
    start = from_config(base.config, pytest.fail)
    assert (start.step, start.config) == (0, base.config)
    assert trees.sha256(nnx.state(start.model)) == trees.sha256(nnx.state(base.model))


def test_a_run_without_a_checkpoint(tmp_path, make_run):
    folder, _ = make_run("lora")
    os.rename(folder / "checkpoints", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"^{folder / 'checkpoints'}: no checkpoint in it; train"):
        restore(folder, base=False, warn=pytest.fail)
    assert restore(folder, base=True, warn=pytest.fail).step == 0


def test_not_a_run_directory(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}: not a run directory"):
        restore(tmp_path, base=False, warn=pytest.fail)

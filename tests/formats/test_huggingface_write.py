import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.config import QuantConfig
from qlora_jax.errors import UserError
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.huggingface_write import config_json, write_folder
from qlora_jax.formats.load import load
from qlora_jax.formats.names import expected_shapes
from qlora_jax.formats.unload import parameter
from qlora_jax.models.config import from_hugging_face
from qlora_jax.quant import dequantize, quantize

KINDS = (
    *("llama", "mistral", "qwen2", "llama_rope_llama3"),
    *("llama_rope_linear_biases", "mistral_window", "qwen2_window"),
)
SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 4)}
VALUES = {
    name: np.random.default_rng(i).normal(size=shape).astype(np.float32)
    for i, (name, shape) in enumerate(SHAPES.items())
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_whole(models, kind, tmp_path):
    checkpoint = open_folder(models / kind)
    model = load(checkpoint, quant=None, dtype=jnp.float32)
    folder = tmp_path / "deep" / "model"
    config = config_json(checkpoint.config, eos_id=2, bos_id=1, pad_id=None)
    shapes = expected_shapes(model.config)
    write_folder(folder, config, shapes, lambda name: parameter(model, name), np.float32)
    again = open_folder(folder)
    assert again.config == checkpoint.config
    assert again.description == "safetensors F32"
    for name in checkpoint.names():
        np.testing.assert_array_equal(again.read(name), checkpoint.read(name).astype(np.float32))
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", KINDS)
def test_config_json_is_read_back(models, kind):
    config = from_hugging_face(json.loads((models / kind / "config.json").read_text()), kind)
    written = config_json(config, eos_id=[2, 3], bos_id=None, pad_id=0)
    assert from_hugging_face(json.loads(json.dumps(written)), "again") == config


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_safetensors_itself_reads_what_is_streamed(tmp_path, dtype):
    write_folder(tmp_path / "m", {"x": 1}, SHAPES, VALUES.__getitem__, dtype)
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert list(found) == list(SHAPES)
    for name, values in VALUES.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], values.astype(dtype))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config == {"x": 1, "dtype": np.dtype(dtype).name}


def test_shards_hold_what_fits(tmp_path):
    write_folder(tmp_path, {}, SHAPES, VALUES.__getitem__, np.float32, shard_bytes=61)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index["weight_map"] == {"a": first, "b": second, "c": second}
    assert index["metadata"]["total_size"] == 4 * (15 + 7 + 8)
    assert set(load_file(tmp_path / second)) == {"b", "c"}
    assert not (tmp_path / "model.safetensors").exists()


def test_a_transposed_view_is_written_as_it_reads(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_folder(tmp_path, {}, {"a": (3, 2)}, lambda name: values.T, np.float32)
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["a"], values.T)


def test_a_failure_leaves_what_was_there(tmp_path):
    folder = tmp_path / "m"
    write_folder(folder, {"x": 1}, SHAPES, VALUES.__getitem__, np.float32)

    def fail(name):
        raise RuntimeError(name)

    with pytest.raises(RuntimeError):
        write_folder(folder, {"x": 2}, SHAPES, fail, np.float32)
    with pytest.raises(ValueError, match=r"a is \(7,\) and not \(3, 5\)"):
        write_folder(folder, {"x": 2}, SHAPES, lambda name: VALUES["b"], np.float32)
    assert json.loads((folder / "config.json").read_text())["x"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    write_folder(folder, {"x": 3}, SHAPES, VALUES.__getitem__, np.float32)
    assert json.loads((folder / "config.json").read_text())["x"] == 3


def test_strangers_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="exists and is no model's"):
        write_folder(tmp_path, {}, SHAPES, VALUES.__getitem__, np.float32)
    with pytest.raises(UserError, match="a file is in the way"):
        write_folder(tmp_path / "thesis.tex", {}, SHAPES, VALUES.__getitem__, np.float32)


def test_a_quantized_weight_comes_out_as_it_multiplies(models):
    checkpoint = open_folder(models / "llama")
    model = load(checkpoint, quant=QuantConfig(), dtype=jnp.float32)
    name = "model.layers.1.mlp.down_proj.weight"
    expected = dequantize(quantize(checkpoint.read(name).astype(np.float32).T))
    np.testing.assert_array_equal(parameter(model, name), np.asarray(expected).T)


@pytest.mark.parametrize(
    "name",
    [
        *("lm_head.bias", "model.layers.99.mlp.up_proj.weight"),
        "model.layers.0.mlp.up_proj.bias",
    ],
)
def test_no_such_parameter(models, name):
    model = load(open_folder(models / "llama"), quant=None, dtype=jnp.float32)
    with pytest.raises(KeyError):
        parameter(model, name)


def test_windows_of_a_family_that_has_none_stay_none(models):
    config = open_folder(models / "mistral").config
    plain = dataclasses.replace(config, windows=(None,) * config.num_layers)
    written = config_json(plain, eos_id=2, bos_id=1, pad_id=None)
    assert from_hugging_face(written, "again").windows == plain.windows

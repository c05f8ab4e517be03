import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.config import QuantConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.formats.unload import parameter
from qlora_jax.quant import dequantize, quantize


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox", "opt"])
@pytest.mark.quick
def test_every_parameter_comes_back(models, kind):
    checkpoint = open_folder(models / kind)
    model = load_model(checkpoint, quant=None, dtype=jnp.float32)
    for name in checkpoint.names():
        found = parameter(model, name)
        np.testing.assert_array_equal(found, checkpoint.read(name).astype(np.float32), err_msg=name)


def test_a_quantized_weight_comes_out_as_it_multiplies(models):
    checkpoint = open_folder(models / "llama")
    model = load_model(checkpoint, quant=QuantConfig(), dtype=jnp.float32)
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
    model = load_model(open_folder(models / "llama"), quant=None, dtype=jnp.float32)
    with pytest.raises(KeyError):
        parameter(model, name)

"""Runs the Python lines of the README and of docs/any_model.md unchanged."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.modules.summary import summary
from qlora_jax.modules.variables import QWeight
from qlora_jax.quant import dequantize

pytestmark = pytest.mark.quick


class MyModel(nnx.Module):
    """A user's model: attention and a linear layer."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.attn = nnx.MultiHeadAttention(num_heads=2, in_features=64, decode=False, rngs=rngs)
        self.mlp = nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mlp(x + self.attn(x))


def loss(model, batch):
    return jnp.mean((model(batch) - 1) ** 2)


def test_lines(tmp_path, monkeypatch, capsys):
    text = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    section = text[text.index("## Any Flax model") :]
    lines = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    batch = jax.random.normal(jax.random.key(0), (2, 5, 64))
    names = {"MyModel": MyModel, "loss": loss, "batch": batch}
    exec(lines, names)

    model, plain = names["model"], names["plain"]
    assert isinstance(model.mlp.kernel, QWeight)
    assert summary(model).adapters == {"default": 2}
    assert "quantized" in capsys.readouterr().out
    b = model.attn.query.kernel_adapters["default"].b.get_value()
    assert jnp.abs(b).max() > 0, "B was not trained"
    assert type(plain) is MyModel
    assert {type(x) for _, x in nnx.iter_graph(plain) if isinstance(x, nnx.Variable)} == {nnx.Param}
    np.testing.assert_allclose(plain(batch), model(batch), atol=2e-6)


def test_lines_on_plain_trees():
    text = Path(__file__).parents[2].joinpath("docs", "any_model.md").read_text(encoding="utf-8")
    section = text[text.index("## Arrays and plain pytrees") :]
    names = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
    w, q = names["w"], names["q"]
    assert 8 * q.nbytes / w.size == pytest.approx(4.127, abs=5e-4)
    exact = np.asarray(dequantize(q, jnp.bfloat16), np.float64).sum(axis=0)  # x is ones
    np.testing.assert_allclose(np.asarray(names["y"][0], np.float64), exact, rtol=2**-8, atol=1e-2)
    np.testing.assert_array_equal(names["adapted"]["query"]["kernel"], w)  # B is zero

"""Merges a run from the command line; checks the report against independent numpy arithmetic."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qlora_jax.config import QuantConfig
from qlora_jax.evaluate import merging
from qlora_jax.evaluate.heldout import held_out_loss
from qlora_jax.evaluate.merging import shares
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.lora import Adapter, AdapterSpec, LoraLinear
from qlora_jax.quant import codebook, dequantize, quantize
from qlora_jax.runtime import manifest
from qlora_jax.train.restore import restore

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def make_run(run_cli, write_config, tmp_path_factory):
    """Trains a few steps; returns the run's folder and the ended command with its messages."""

    def make(**changes):
        folder = tmp_path_factory.mktemp("merge")
        ended = run_cli("train", write_config(folder, **changes))
        assert ended.code == 0, ended.err
        return folder / "run", ended

    return make


@pytest.fixture(scope="module")
def qlora(make_run):
    return make_run(optimizer={"learning_rate": 0.05})[0]


def test_the_report_tells_the_ways_apart(run_cli, qlora, tmp_path):
    out = tmp_path / "out"
    ended = run_cli("merge", qlora, out, "--to", "float32", "--report", "--json")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told["report"] == json.loads((out / "merge_report.json").read_text())
    live, merged, original, requantized = told["report"]["routes"]
    assert [r["name"] for r in told["report"]["routes"]] == [
        "live",
        "merged",
        "original",
        "requantized",
    ]
    assert abs(live["kl"]) < 1e-7
    assert abs(merged["kl"]) < 1e-6
    assert merged["loss"] == pytest.approx(live["loss"], rel=1e-5)
    assert original["kl"] > 1e-5
    assert requantized["kl"] > 1e-5
    expected = held_out_loss(restore(qlora, base=False, warn=pytest.fail))[""]
    assert live["tokens"] == expected.tokens
    assert live["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert live["perplexity"] == pytest.approx(expected.perplexity, rel=1e-4)
    assert len(told["report"]["shares"]) == 21
    assert (out / "merge_report.png").stat().st_size > 10_000
    assert "| requantized |" in (out / "merge_report.md").read_text()
    assert (out / "tokenizer.json").exists()


def test_4_bits_again_come_with_the_report(run_cli, qlora, tmp_path):
    ended = run_cli("merge", qlora, tmp_path / "out", "--to", "nf4", "--rows", "2")
    assert ended.code == 0, ended.err
    assert ended.err.startswith("merge: about ")
    assert "requantized" in ended.out
    assert "nf4, block 64, double quantization" in ended.out
    assert (tmp_path / "out" / "merge_report.md").exists()
    assert open_folder(tmp_path / "out").quantization.config == QuantConfig()


def test_a_report_that_does_not_fit_leaves_nothing(run_cli, qlora, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merging, "write_report", full)
    ended = run_cli("merge", qlora, tmp_path / "out", "--to", "nf4", "--rows", "2")
    assert ended.code == 2
    assert f"{tmp_path}: no space left on this disk" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_floats_come_without(run_cli, qlora, tmp_path):
    ended = run_cli("merge", qlora, tmp_path / "out", "--base", "original")
    assert ended.code == 0, ended.err
    assert "KL" not in ended.out
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert not any(name.startswith("merge_report") for name in names)
    kinds = {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert kinds == {jnp.dtype(jnp.bfloat16)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_another_base_is_refused_by_its_hash(run_cli, qlora, tmp_path):
    shutil.copytree(qlora, tmp_path / "run")
    told = manifest.read(tmp_path / "run")
    before = told["base_hash"]
    manifest.write(tmp_path / "run", told | {"base_hash": "2:" + "ab" * 32})
    ended = run_cli("merge", tmp_path / "run", tmp_path / "out")
    assert ended.code == 2
    assert "ab" * 32 in ended.message
    assert before in ended.message
    assert not (tmp_path / "out").exists()


def test_a_full_run_is_its_weights(run_cli, make_run, tmp_path):
    folder, _ = make_run(method="full")
    ended = run_cli("merge", folder, tmp_path / "out", "--to", "float32", "--report", "--json")
    assert ended.code == 0, ended.err
    routes = {r["name"]: r["kl"] for r in json.loads(ended.out)["report"]["routes"]}
    assert routes.keys() == {"live", "merged", "requantized"}
    assert abs(routes["merged"]) < 1e-7
    weights = load_file(tmp_path / "out" / "model.safetensors")
    model = restore(folder, base=False, warn=pytest.fail).model
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], model.embed.get_value())
    up = model.runs[0].linears()["mlp.up_proj"].weight.get_value()
    np.testing.assert_array_equal(weights["model.layers.2.mlp.up_proj.weight"], up[2].T)
    refused = run_cli("merge", folder, tmp_path / "o", "--base", "original")
    assert refused.code == 2
    assert "method full trains every weight" in refused.message


def test_a_run_on_4_bit_weights_defers_to_them(
    run_cli, make_run, write_config, tiny_model, tmp_path
):
    """Checks the message, the manifest and merging of such a run; other methods are refused."""
    ended = run_cli("quantize", tiny_model, tmp_path / "m", "--codebook", "fp4_bnb")
    assert ended.code == 0, ended.err
    folder, ended = make_run(model__path=str(tmp_path / "m"))
    assert (
        "4-bit weights as they are stored: fp4_bnb, block 64, double quantization; "
        "the config's quant (nf4, block 64, double quantization) is not used"
    ) in ended.err
    told = manifest.read(folder)
    assert told["quantization"]["codebook"] == "fp4_bnb"
    assert run_cli("merge", folder, tmp_path / "out", "--to", "float32").code == 0
    refused = run_cli("merge", folder, tmp_path / "o", "--base", "original")
    assert refused.code == 2
    assert "4-bit weights only" in refused.message
    for method in ("lora", "full"):
        config = write_config(tmp_path, model__path=str(tmp_path / "m"), method=method)
        refused = run_cli("train", config)
        assert refused.code == 2
        assert f"method {method}: " in refused.message
        assert "set method to qlora" in refused.message


class OneLinear:
    """A model of one linear, with the only method that `shares` calls."""

    def __init__(self, linear):
        self.linear = linear

    def walk(self):
        yield "model.layers.0.mlp.up_proj", self.linear, 0


def test_a_share_is_what_numpy_says():
    random = np.random.default_rng(3)
    q = quantize(random.normal(size=(1, 128, 24)).astype(np.float32), double_quant=False)
    linear = LoraLinear(q)
    a, b = (random.normal(size=s).astype(np.float32) * 0.2 for s in ((1, 128, 2), (1, 2, 24)))
    spec = AdapterSpec(2, 4.0, 2.0)
    linear.adapter = nnx.data(Adapter(jnp.asarray(a), jnp.asarray(b), jnp.array([2.0]), [spec]))
    (found,) = shares(OneLinear(linear), QuantConfig(double_quant=False))
    base = np.asarray(dequantize(jax.tree.map(lambda x: x[0], q)), np.float64)
    change = 2.0 * a[0].astype(np.float64) @ b[0]
    whole = base + change
    blocks = whole.reshape(2, 64, 24)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    values = codebook("nf4").astype(np.float64)
    nearest = np.abs((blocks / absmax)[..., None] - values).argmin(-1)
    rounded = (values[nearest] * absmax).reshape(128, 24)
    assert found.module == "model.layers.0.mlp.up_proj"
    assert found.delta == pytest.approx(np.linalg.norm(change), rel=1e-5)
    assert found.relative == pytest.approx(np.linalg.norm(change) / np.linalg.norm(base), rel=1e-5)
    assert found.steps == pytest.approx(np.abs(change).mean() / (absmax.mean() * 2 / 15), rel=1e-5)
    assert found.kept == pytest.approx(
        ((rounded - base) * change).sum() / (change**2).sum(), rel=1e-3
    )
    assert found.noise == pytest.approx(
        np.linalg.norm(rounded - whole) / np.linalg.norm(change), rel=1e-3
    )

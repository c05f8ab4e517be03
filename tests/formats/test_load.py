import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qlora_jax.config import QuantConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.models.config import from_hugging_face
from qlora_jax.models.weight_shapes import expected_shapes
from qlora_jax.quant import QTensor, bits_per_parameter, quantize
from qlora_jax.runtime.errors import UserError

MIB = 2**20


def stacked(checkpoint, path):
    layers = range(checkpoint.config.num_layers)
    return np.stack([checkpoint.read(f"model.layers.{i}.{path}").T for i in layers])


@pytest.mark.parametrize(
    "quant",
    [QuantConfig(), QuantConfig(codebook="int4", block_size=32, double_quant=False)],
    ids=["nf4", "int4"],
)
@pytest.mark.quick
def test_layer_by_layer_equals_in_one_go(models, quant):
    checkpoint = open_folder(models / "llama")
    model = load_model(checkpoint, quant=quant, dtype=jnp.float32)
    for path, linear in model.runs[0].linears().items():
        expected = quantize(
            stacked(checkpoint, f"{path}.weight"),
            quant.codebook,
            quant.block_size,
            quant.double_quant,
        )
        ours = linear.weight.get_value()
        assert isinstance(ours, QTensor)
        assert jax.tree.structure(ours) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_floats_are_the_files_transposed(models, name):
    checkpoint = open_folder(models / name)
    model = load_model(checkpoint, quant=None, dtype=jnp.float32)
    run = model.runs[0]
    for path, linear in run.linears().items():
        np.testing.assert_array_equal(
            linear.weight.get_value(), stacked(checkpoint, f"{path}.weight")
        )
        if f"model.layers.0.{path}.bias" in checkpoint.names():
            np.testing.assert_array_equal(
                linear.bias.get_value(), stacked(checkpoint, f"{path}.bias")
            )
        else:
            assert linear.bias is None
    for norm in ("input_layernorm", "post_attention_layernorm"):
        np.testing.assert_array_equal(
            getattr(run, norm).weight.get_value(), stacked(checkpoint, f"{norm}.weight")
        )
    embed = checkpoint.read("model.embed_tokens.weight")
    head = embed if name == "qwen2" else checkpoint.read("lm_head.weight")
    np.testing.assert_array_equal(model.embed.get_value(), embed)
    weight, vocab_axis = model.stored_head()
    np.testing.assert_array_equal(weight if vocab_axis == 1 else weight.T, head.T)
    assert (model.head is None) == (name == "qwen2")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.quick
def test_dtype_is_of_all_that_is_not_quantized(models, dtype):
    model = load_model(open_folder(models / "llama"), quant=QuantConfig(), dtype=dtype)
    assert model.embed.get_value().dtype == model.head.get_value().dtype == dtype
    assert model.norm.weight.get_value().dtype == dtype
    run = model.runs[0]
    assert run.input_layernorm.weight.get_value().dtype == dtype
    q = run.q_proj.weight.get_value()
    # quantized from the file's float32, whatever the dtype of the other weights
    expected = quantize(stacked(open_folder(models / "llama"), "self_attn.q_proj.weight"))
    jax.tree.map(np.testing.assert_array_equal, q, expected)
    floats = load_model(open_folder(models / "llama"), quant=None, dtype=dtype)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(floats))}
    assert kinds == {jnp.dtype(dtype)}


def test_progress_counts_the_tensors(models):
    checkpoint, calls = open_folder(models / "llama"), []
    load_model(checkpoint, quant=None, dtype=jnp.float32, progress=lambda: calls.append(1))
    assert len(calls) == len(checkpoint.names())


@pytest.mark.quick
def test_a_weight_is_let_go_before_the_next_is_read(models, monkeypatch):
    """Counts the arrays of the linears alone: the model may keep the array of a float weight."""
    alive, most = weakref.WeakSet(), []
    checkpoint = open_folder(models / "llama")
    read = type(checkpoint).read

    def watched(self, name):
        most.append(len(alive))
        array = read(self, name)
        held = np.array(array).view(Watched)
        if "_proj" in name:
            alive.add(held)
        return held

    monkeypatch.setattr(type(checkpoint), "read", watched)
    load_model(checkpoint, quant=QuantConfig(), dtype=jnp.float32)
    assert len(most) == len(checkpoint.names())
    assert max(most) <= 2


class Watched(np.ndarray):
    """A hashable array, which a set can hold."""

    __hash__ = object.__hash__


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("quant", [None, QuantConfig()], ids=["float", "nf4"])
@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.down_proj.weight", "model.embed_tokens.weight"]
)
def test_a_weight_that_is_not_finite_is_named(llama, quant, name, bad):
    tensors = load_file(llama / "model.safetensors")
    tensors[name][3, 5] = bad
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(UserError, match=f"{name}: holds NaN or Inf"):
        load_model(open_folder(llama), quant=quant, dtype=jnp.float32)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_dtype_too_narrow_for_a_weight_is_named(llama):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 5] = 1e6
    save_file(tensors, llama / "model.safetensors")
    load_model(open_folder(llama), quant=QuantConfig(), dtype=jnp.bfloat16)
    with pytest.raises(UserError, match=r"as float16; download it again, or hold it in another"):
        load_model(open_folder(llama), quant=QuantConfig(), dtype=jnp.float16)


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        (QuantConfig(codebook="nf5"), "codebook 'nf5' is not known"),
        (QuantConfig(block_size=48), "block_size 48 is not allowed"),
    ],
)
def test_a_quantization_that_is_not_known(models, quant, message):
    with pytest.raises(UserError, match=message):
        load_model(open_folder(models / "llama"), quant=quant, dtype=jnp.float32)


MEASURE = """
import gc
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from qlora_jax.runtime import compilation
from qlora_jax.config import QuantConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

load_model(open_folder(Path(sys.argv[1])), quant=QuantConfig(), dtype=jnp.bfloat16)
gc.collect()
compilation.trim()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model = load_model(open_folder(Path(sys.argv[1])), quant=QuantConfig(), dtype=jnp.bfloat16)
jax.block_until_ready(model.embed.get_value())
print(status("VmHWM") - before)
"""


def write_model(folder: Path, layers: int) -> dict[str, tuple[int, ...]]:
    """Writes a random bfloat16 llama with large layers; returns the shapes of its tensors."""
    raw = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "tie_word_embeddings": True,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    shapes = expected_shapes(from_hugging_face(raw, "config.json"))
    random = np.random.default_rng(0)
    block = random.normal(size=2**21).astype(ml_dtypes.bfloat16)
    tensors = {name: block[: np.prod(s)].reshape(s).copy() for name, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return shapes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read there")
def test_peak_memory_is_the_4_bit_model_and_a_few_tensors(tmp_path):
    """Loading never holds the 16-bit model; a first load compiles, so that only data counts."""
    shapes = write_model(tmp_path / "model", 16)
    sizes = [int(np.prod(s)) for s in shapes.values()]
    linears = [int(np.prod(s)) for name, s in shapes.items() if name.endswith("_proj.weight")]
    bits = bits_per_parameter(
        jax.eval_shape(quantize, jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16))
    )
    whole = sum(sizes) * 2
    model = sum(linears) * bits / 8 + (sum(sizes) - sum(linears)) * 2
    tensor = max(sizes) * 4

    script = [sys.executable, "-c", MEASURE, str(tmp_path / "model")]
    # malloc returns large freed blocks at once; else the amount that it keeps varies by run
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    ended = subprocess.run(script, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    peak = int(ended.stdout)
    print(f"peak {peak / MIB:.0f} MiB, model {model / MIB:.0f}, 16 bits {whole / MIB:.0f}")
    assert peak < model + 4 * tensor
    assert peak < whole / 2

"""Folders of 4-bit weights; the reference is the folder that transformers wrote."""

import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_gguf import GGUF_NAMES

from qlora_jax.config import QuantConfig
from qlora_jax.formats import folder as folders
from qlora_jax.formats.bitsandbytes import DTYPES, pack
from qlora_jax.formats.gguf import open_gguf
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.formats.write import write_model
from qlora_jax.runtime import time_estimates
from qlora_jax.runtime.errors import UserError
from qlora_jax.text import tokenizer

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "bnb_rows.npz")
CASES = sorted({k.rpartition("/")[0] for k in GOLDEN.files if k.count("/") == 2})
BOOKS = {"nf4": "nf4", "fp4": "fp4_bnb"}
NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@pytest.mark.quick
def test_blocks_across_rows_are_quantized_with_bitsandbytes_bytes():
    for folder in CASES:
        case, spec = folder.split("/")
        kind, block = spec.split(".b")
        name = NAMES[case.rpartition(".")[2]]
        weight = GOLDEN[f"{case}/input"]
        weight = weight.view(DTYPES[name]) if name == "bfloat16" else weight
        assert weight.shape[-1] % int(block)
        quant = QuantConfig(codebook=BOOKS[kind], block_size=int(block), double_quant=False)
        found = pack("w", weight, quant, name)
        for part, key in (("", "packed"), (".absmax", "absmax")):
            expected = GOLDEN[f"{folder}/{key}"]
            np.testing.assert_array_equal(found[part].reshape(-1), expected, err_msg=folder)
    assert len(CASES) == 38


def test_a_model_is_the_one_that_transformers_wrote(models, tmp_path):
    size = write_model(open_folder(models / "llama"), tmp_path / "out", QuantConfig(), "float32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(models / "llama" / "bnb_nf4" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert size == sum(t.nbytes for t in found.values())
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        if name.endswith(".absmax"):  # bitsandbytes' 8-bit table is not exact
            assert np.abs(found[name].astype(int) - tensor.astype(int)).max() <= 1
        elif "quant_state" in name:
            ours, theirs = (json.loads(x[name].tobytes()) for x in (found, expected))
            assert list(ours) == list(theirs)
            offsets = np.float32([ours.pop("nested_offset"), theirs.pop("nested_offset")])
            assert np.abs(np.diff(offsets.view(np.int32))) <= 2
            assert ours == theirs
        elif name.endswith("nested_absmax"):
            np.testing.assert_allclose(found[name], tensor, rtol=1e-6)
        else:
            assert found[name].tobytes() == tensor.tobytes(), name
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = json.loads((models / "llama" / "bnb_nf4" / "config.json").read_text())
    assert ours["quantization_config"] == theirs["quantization_config"]
    del ours["transformers_version"], theirs["transformers_version"]
    assert ours == theirs


@pytest.mark.quick
def test_what_is_written_is_read_as_quantizing_it_gives(models, tmp_path):
    quant = QuantConfig(codebook="fp4_bnb", block_size=128, double_quant=False)
    source = open_folder(models / "llama")
    write_model(source, tmp_path / "out", quant, "float16")
    written = open_folder(tmp_path / "out")
    assert written.quantization.config == quant
    again = load_model(written, quant=None, dtype=np.float16)
    direct = load_model(source, quant=quant, dtype=np.float16)
    down = [m.runs[0].linears()["mlp.down_proj"].weight.get_value() for m in (again, direct)]
    for field in ("codes", "scales", "codebook"):
        np.testing.assert_array_equal(getattr(down[0], field), getattr(down[1], field))


def test_shards_are_named_in_an_index_and_hold_every_tensor_once(models, tmp_path):
    source = open_folder(models / "llama")
    tensors = {name: source.read(name) for name in source.names()}
    folders.write_folder(
        tmp_path / "out", source, {}, "float32", iter(tensors.items()), shard_bytes=200_000
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(3)]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for shard in shards:
        held = load_file(tmp_path / "out" / shard)
        assert list(held) == [n for n, s in sorted(index["weight_map"].items()) if s == shard]
        assert sum(t.nbytes for t in held.values()) <= 200_000
    again = open_folder(tmp_path / "out")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again.read(name), tensor)


def test_the_tokenizer_and_generation_config_come_along(tiny_model, make_model, tmp_path):
    source = make_model(tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": [0]}')
    write_model(open_folder(source), tmp_path / "out", QuantConfig(), "bfloat16")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {file.name for file in source.iterdir()}
    for name in names - {"config.json", "model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def write_gguf(path: Path, models: Path) -> None:
    writer = gguf.GGUFWriter(path, "qwen2")
    source = open_folder(models / "qwen2")
    config = source.config
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_context_length(config.max_positions)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    tokens = ["a", "b", "ab", *(f"<{i}>" for i in range(252)), "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * 255 + [3])
    writer.add_eos_token_id(255)
    for name in source.names():
        own = name
        for long, brief in {**GGUF_NAMES, "model.layers.": "blk."}.items():
            own = own.replace(long, brief)
        writer.add_tensor(own, source.read(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_the_folder_it_was_made_of(models, tmp_path):
    write_gguf(tmp_path / "m.gguf", models)
    source = open_gguf(tmp_path / "m.gguf")
    write_model(source, tmp_path / "out", QuantConfig(), "float32")
    write_model(open_folder(models / "qwen2"), tmp_path / "same", QuantConfig(), "float32")
    found, expected = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "same"))
    assert found.keys() == expected.keys()
    assert all(found[n].tobytes() == expected[n].tobytes() for n in expected)
    assert open_folder(tmp_path / "out").config == source.config
    text = tokenizer.load_tokenizer(tmp_path / "out")
    assert text.encode("abba<end>") == [2, 1, 0, 255]
    assert text.stop_ids == (255,)


@pytest.mark.parametrize(
    ("quant", "says"),
    [
        ({"codebook": "lloyd"}, "codebook 'lloyd': not in bitsandbytes; give nf4 or fp4_bnb"),
        ({"block_size": 32}, "block size 32: not in bitsandbytes; give 64, 128"),
    ],
)
def test_what_bitsandbytes_lacks_is_refused(models, tmp_path, quant, says):
    with pytest.raises(UserError, match=says):
        write_model(
            open_folder(models / "llama"), tmp_path / "out", QuantConfig(**quant), "float32"
        )
    assert not any(tmp_path.iterdir())


def test_what_is_4_bit_already_is_refused(models, tmp_path):
    with pytest.raises(UserError, match="bnb_nf4: its weights are in 4 bits already"):
        write_model(
            open_folder(models / "llama" / "bnb_nf4"), tmp_path / "out", QuantConfig(), "float32"
        )


def test_a_folder_in_use_is_left_alone(models, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="exists already; give a new or an empty folder"):
        write_model(open_folder(models / "llama"), tmp_path, QuantConfig(), "float32")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_weight_that_overflows_is_named_and_nothing_is_left(llama, tmp_path):
    weights = load_file(llama / "model.safetensors")
    weights["model.norm.weight"] *= 1e6
    save_file(weights, llama / "model.safetensors")
    with pytest.raises(UserError, match=r"model.norm.weight: holds NaN or Inf as float16"):
        write_model(open_folder(llama), tmp_path / "out", QuantConfig(), "float16")
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


@pytest.mark.slow
def test_the_command_writes_and_says_so(run_cli, tiny_model, tmp_path, monkeypatch):
    ended = run_cli("quantize", tiny_model, tmp_path / "out", "--block-size", "128", "--json")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert told == {
        "out": str(tmp_path / "out"),
        "bytes": sum(math.prod(t.shape) * t.itemsize for t in weights.values()),
    }
    again = run_cli("quantize", tiny_model, tmp_path / "out")
    assert again.code == 2
    assert "exists already" in again.message
    monkeypatch.setattr(time_estimates, "SHORT", 0.5)
    text = run_cli("quantize", tiny_model, tmp_path / "b", "--no-double-quant")
    first, second, *_ = text.err.splitlines()
    assert first == "quantize: about 4 s on 2 CPU cores (an estimate)"
    assert second.startswith("quantizing ")
    assert "nf4, block 64; other tensors bfloat16" in text.out

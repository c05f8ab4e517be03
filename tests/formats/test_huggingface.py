import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.config import QuantConfig
from qlora_jax.formats.bitsandbytes import pack
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.names import expected_shapes
from qlora_jax.runtime import json_files
from qlora_jax.runtime.errors import UserError


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path, parts: int = 3) -> dict[str, str]:
    """Splits model.safetensors as transformers does; returns the weight map."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        chosen = {n: w for i, (n, w) in enumerate(weights.items()) if i % parts == part}
        save_file(chosen, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_reads_what_transformers_wrote(models: Path, family: str) -> None:
    checkpoint = open_folder(models / family)
    weights = load_file(models / family / "model.safetensors")
    assert set(checkpoint.names()) == set(weights)
    for name, weight in weights.items():
        read = checkpoint.read(name)
        assert read.dtype == weight.dtype
        assert read.shape == checkpoint.shape(name) == weight.shape
        np.testing.assert_array_equal(read, weight)
    assert checkpoint.description == "safetensors F32"
    assert checkpoint.config.family == family
    assert checkpoint.tokenizer_path == models / family


def test_expected_shapes_count_the_parameters(models: Path) -> None:
    shapes = expected_shapes(open_folder(models / "qwen2").config)
    assert "lm_head.weight" not in shapes
    assert shapes["model.layers.1.self_attn.k_proj.bias"] == (32,)
    assert shapes["model.layers.2.mlp.down_proj.weight"] == (64, 128)


def test_reads_shards(models: Path, llama: Path) -> None:
    shard(llama)
    checkpoint = open_folder(llama)
    for name, weight in load_file(models / "llama" / "model.safetensors").items():
        np.testing.assert_array_equal(checkpoint.read(name), weight)


@pytest.mark.parametrize(
    ("dtype", "code"), [(ml_dtypes.bfloat16, "BF16"), (np.float16, "F16"), (np.float32, "F32")]
)
def test_keeps_the_stored_dtype(llama: Path, dtype: type, code: str) -> None:
    weights = {n: w.astype(dtype) for n, w in load_file(llama / "model.safetensors").items()}
    save_file(weights, llama / "model.safetensors")
    checkpoint = open_folder(llama)
    assert checkpoint.description == f"safetensors {code}"
    for name, weight in weights.items():
        assert checkpoint.read(name).dtype == np.dtype(dtype)
        np.testing.assert_array_equal(checkpoint.read(name), weight)


def test_bfloat16_can_be_read_in_a_fresh_process(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    save_file(
        {n: w.astype(ml_dtypes.bfloat16) for n, w in weights.items()}, llama / "model.safetensors"
    )
    program = (
        "import sys; from pathlib import Path\n"
        "from qlora_jax.formats.huggingface import open_folder\n"
        "print(open_folder(Path(sys.argv[1])).read('model.norm.weight').dtype)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(llama)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "bfloat16"


def test_an_array_outlives_its_file(llama: Path) -> None:
    weight = open_folder(llama).read("lm_head.weight")
    before = weight.copy()
    (llama / "model.safetensors").write_bytes(b"\0" * 600_000)
    weight[0, 0] = before[0, 0]  # the array is a copy: it can be written to
    np.testing.assert_array_equal(weight, before)


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize(
    ("stored", "tied"),
    [("embed", True), ("head", True), ("equal", True), ("wider", True), ("different", False)],
)
def test_the_tensors_decide_whether_head_and_embedding_are_tied(
    llama: Path, said: bool, stored: str, tied: bool
) -> None:
    weights = load_file(llama / "model.safetensors")
    weights[EMBED] = weights[EMBED].astype(ml_dtypes.bfloat16)
    matrix = weights[EMBED]
    heads = {"equal": matrix, "wider": matrix.astype(np.float32), "head": matrix}
    weights[HEAD] = heads.get(stored, weights[HEAD])
    if stored in ("embed", "head"):
        del weights[HEAD if stored == "embed" else EMBED]
    save_file(weights, llama / "model.safetensors")
    edit_config(llama, tie_word_embeddings=said)
    checkpoint = open_folder(llama)
    assert checkpoint.config.tie_embeddings == tied
    assert (HEAD in checkpoint.names()) != tied
    np.testing.assert_array_equal(checkpoint.read(EMBED), matrix)
    if not tied:
        np.testing.assert_array_equal(checkpoint.read(HEAD), weights[HEAD])
    assert len(checkpoint.notes) == (said != tied)
    assert (
        not checkpoint.notes
        or f"tie_word_embeddings is {str(said).lower()}, but" in (checkpoint.notes[0])
    )


def test_a_difference_in_the_last_row_unties(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    weights[HEAD] = weights[EMBED].copy()
    weights[HEAD][-1, -1] += 1
    save_file(weights, llama / "model.safetensors")
    assert not open_folder(llama).config.tie_embeddings


@pytest.mark.parametrize("quantized", [False, True])
def test_the_head_of_gpt_neox_has_two_names(models: Path, tmp_path: Path, quantized: bool) -> None:
    folder = Path(shutil.copytree(models / "gpt_neox", tmp_path / "m"))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = head = weights.pop("embed_out.weight")
    if quantized:
        parts = pack("lm_head.weight", head, QuantConfig(), "float32")
        weights |= {f"lm_head.weight{suffix}": tensor for suffix, tensor in parts.items()}
    save_file(weights, folder / "model.safetensors")
    read = open_folder(folder).read("embed_out.weight")
    if quantized:
        assert read.shape == head.T.shape
    else:
        np.testing.assert_array_equal(read, head)


def test_names_without_the_models_prefix_are_read(models: Path, llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    stripped = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(stripped, llama / "model.safetensors")
    checkpoint = open_folder(llama)
    assert set(checkpoint.names()) == set(weights)
    for name, weight in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name), weight)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"load_in_4bit": True},
        "yes",
    ],
)
def test_a_stale_quantization_config_over_floats_is_ignored(llama: Path, settings) -> None:
    edit_config(llama, quantization_config=settings)
    checkpoint = open_folder(llama)
    assert checkpoint.quantization is None
    assert "is ignored: the weights are floats" in checkpoint.notes[0]


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def quantized(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    del weights[f"{name}.weight"]
    weights[f"{name}.qweight"] = np.zeros((8, 128), np.int32)
    save_file(weights, folder / "model.safetensors")
    edit_config(folder, quantization_config={"quant_method": "gptq"})


def eight_bits(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    weights[f"{name}.SCB"] = np.ones(128, np.float32)
    weights[f"{name}.weight"] = np.zeros((128, 64), np.int8)
    save_file(weights, folder / "model.safetensors")
    edit_config(folder, quantization_config={"load_in_8bit": True})


def gguf_inside(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "m-Q4_0.gguf").touch()


def run_directory(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").touch()


def nested(folder: Path) -> None:
    (folder / "final").mkdir()
    for file in [file for file in folder.iterdir() if file.is_file()]:
        file.rename(folder / "final" / file.name)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def lost_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def index_without_map(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


def lost_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")


def other_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=96)


def unknown_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_norm.weight"] = np.ones(16, np.float32)
    save_file(weights, folder / "model.safetensors")


def integers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].astype(np.int8)
    save_file(weights, folder / "model.safetensors")


def second_copy(folder: Path) -> None:
    """Adds a tensor to a shard although the index places it in another shard."""
    names = shard(folder)
    last = folder / "model-00003-of-00003.safetensors"
    weights = load_file(last)
    stolen = next(name for name, file in names.items() if file.startswith("model-00001"))
    save_file(weights | {stolen: np.zeros(3, np.float32)}, last)


def unlisted_copy(folder: Path) -> None:
    """Removes a tensor from the index, and adds it to every shard."""
    names = shard(folder)
    del names["model.norm.weight"]
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    for file in sorted(set(names.values())):
        extra = {"model.norm.weight": np.ones(64, np.float32)}
        save_file(load_file(folder / file) | extra, folder / file)


def placed_nowhere(folder: Path) -> None:
    names = shard(folder) | {"zz": "model-00001-of-00003.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def outside(folder: Path) -> None:
    names = shard(folder)
    names["model.norm.weight"] = "../x.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def absolute(folder: Path) -> None:
    names = shard(folder)
    names["model.norm.weight"] = "/etc/passwd"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (second_copy, r"model-00003-of-00003.safetensors: holds .* belongs in model-00001-of"),
        (unlisted_copy, r"model-0000[23].*: holds model.norm.weight, which belongs in model-0000"),
        (placed_nowhere, r"index.json: places zz in model-00001-of-00003.safetensors, which does"),
        (outside, r"index.json: '../x.safetensors' is not the name of a file in the folder"),
        (absolute, r"index.json: '/etc/passwd' is not the name of a file in the folder"),
        (no_config, "no config.json"),
        (adapter, "give the model it was trained on"),
        (broken_config, "config.json: not valid JSON"),
        (quantized, r"config.json: quantization_config \(gptq\).*16-bit checkpoint"),
        (eight_bits, r"config.json: quantization_config \(bitsandbytes in 8 bits\).*16-bit"),
        (gguf_inside, r"it holds a GGUF file; give that: .*m-Q4_0.gguf"),
        (run_directory, "it is a run directory; merge it"),
        (nested, r"it holds a model folder; give that: .*final$"),
        (no_weights, "no model.safetensors"),
        (pickles, r"pytorch_model.bin.*convert"),
        (truncated, r"model.safetensors: truncated or damaged.*download it again"),
        (empty, r"model.safetensors: truncated or damaged"),
        (huge_header, r"model.safetensors: truncated or damaged"),
        (lost_shard, r"model-00002-of-00003.safetensors is missing, 1 of 3"),
        (index_without_map, r"index.json: no weight_map"),
        (lost_tensor, r"missing: model.layers.1.mlp.up_proj.weight$"),
        (
            other_shape,
            r"model.layers.0.mlp.gate_proj.weight is \[128, 64\] and not \[96, 64\].*more",
        ),
        (unknown_tensor, r"does not have: model.layers.0.self_attn.q_norm.weight"),
        (integers, r"lm_head.weight is stored as I8"),
    ],
)
def test_unusable_folders_are_refused_in_one_line(llama: Path, damage, says: str) -> None:
    damage(llama)
    with pytest.raises(UserError, match=says) as e:
        open_folder(llama)
    assert str(llama) in str(e.value)
    assert "\n" not in str(e.value)


def test_a_file_that_cannot_be_read_is_named(llama: Path, monkeypatch) -> None:
    def denied(path: Path, **_: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(json_files, "_bytes", denied)
    with pytest.raises(UserError, match=f"^{llama}/config.json: not readable by this user; change"):
        open_folder(llama)

import contextlib
import dataclasses
import math
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file
from small_gguf import GGUF_NAMES

from qlora_jax.formats.gguf import open_gguf
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.models.config import Rope
from qlora_jax.models.rope import rotation
from qlora_jax.models.shapes import find
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.gguf_header import read_header

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


def llama_cpp_order(heads: int) -> np.ndarray:
    """Returns the index of the Hugging Face row for every row of the file, row by row."""
    order = np.empty(heads * HEAD_DIM, int)
    for head in range(heads):
        for pair in range(HEAD_DIM // 2):
            order[head * HEAD_DIM + 2 * pair] = head * HEAD_DIM + pair
            order[head * HEAD_DIM + 2 * pair + 1] = head * HEAD_DIM + pair + HEAD_DIM // 2
    return order


def permutation(name: str, rows: int) -> np.ndarray:
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    return np.arange(rows) if heads is None else llama_cpp_order(heads)


def to_gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[rest]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def write(
    path: Path,
    weights: dict[str, np.ndarray],
    architecture: str = "llama",
    kind: Type = Type.F32,
    drop: tuple[str, ...] = (),
    **metadata: object,
) -> dict[str, np.ndarray]:
    """Writes a file as llama.cpp's converter does; returns the tensors expected from reading it."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=metadata.pop("part", 0))
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(3)
    writer.add_feed_forward_length(128)
    if "head_count" not in drop:
        writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(metadata.pop("rope_dimensions", HEAD_DIM))
    writer.add_rope_freq_base(metadata.pop("theta", 10000.0))
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(256)])
    if "linear" in metadata:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(metadata["linear"])
    if "rope_scaling" in metadata:
        writer.add_string(f"{architecture}.rope.scaling.type", metadata["rope_scaling"])
    for key, value in metadata.get("rope", {}).items():
        key = f"{architecture}.rope.{key}"
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
            kinds[type(value)](key, value)
    if "sliding_window" in metadata:
        writer.add_sliding_window(metadata["sliding_window"])
    for name, tensor in metadata.get("extra", {}).items():
        writer.add_tensor(name, tensor)
    expected = {}
    for name, weight in weights.items():
        order = np.arange(len(weight))
        if architecture == "llama":
            order = permutation(name, len(weight))
        stored = np.ascontiguousarray(weight[order])
        back = np.argsort(order)
        if weight.ndim == 1:
            writer.add_tensor(to_gguf_name(name), stored)
            expected[name] = weight
        else:
            data = gguf.quantize(stored, kind)
            writer.add_tensor(to_gguf_name(name), data, raw_dtype=kind)
            expected[name] = gguf.dequantize(data, kind)[back]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture
def weights(models: Path) -> dict[str, np.ndarray]:
    return load_file(models / "llama" / "model.safetensors")


@pytest.fixture
def parts(tmp_path: Path, weights) -> list[Path]:
    """A model split in files of 12 tensors, as llama-gguf-split and the `gguf` package write it."""
    write(tmp_path / "m.gguf", weights, part=12)
    return sorted(tmp_path.glob("m-*-of-*.gguf"))


def test_all_parts_of_a_split_file_are_read(tmp_path: Path, weights, parts) -> None:
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    checkpoint = open_gguf(parts[0])
    assert set(checkpoint.names()) == set(weights)
    for name, weight in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name), weight)


def second_given(parts: list[Path]) -> Path:
    return parts[1]


def one_missing(parts: list[Path]) -> Path:
    parts[2].unlink()
    return parts[0]


def one_twice(parts: list[Path]) -> Path:
    parts[2].write_bytes(parts[1].read_bytes())
    return parts[0]


def renamed(parts: list[Path]) -> Path:
    return parts[0].rename(parts[0].with_name("model.gguf"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (second_given, r"m-00002-of-00003.gguf: part 2 of 3; give the first: .*m-00001-of-00003"),
        (one_missing, r"m-00003-of-00003.gguf is missing beside it, 1 of 3 parts are missing"),
        (one_twice, r"m-00003-of-00003.gguf: its metadata says part 1 of 3, counted from 0"),
        (renamed, r"model.gguf: is one of 3 parts.*NAME-00001-of-00003.gguf"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(parts, damage, says: str) -> None:
    with pytest.raises(UserError, match=says) as e:
        open_gguf(damage(parts))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("change", "tied"), [(0, True), (1, False)])
def test_two_equal_matrices_are_tied(tmp_path: Path, weights, change: int, tied: bool) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["lm_head.weight"][-1, -1] += change
    write(tmp_path / "m.gguf", weights)
    checkpoint = open_gguf(tmp_path / "m.gguf")
    assert checkpoint.config.tie_embeddings == tied
    assert ("lm_head.weight" in checkpoint.names()) != tied


@pytest.mark.parametrize(
    "kind",
    [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0],
)
def test_reads_every_type_in_hugging_face_layout(tmp_path: Path, weights, kind: Type) -> None:
    path = tmp_path / "m.gguf"
    expected = write(path, weights, kind=kind)
    checkpoint = open_gguf(path)
    assert set(checkpoint.names()) == set(expected)
    for name, weight in expected.items():
        assert checkpoint.shape(name) == weight.shape
        np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), weight)
    floats = {Type.F16: np.float16, Type.BF16: ml_dtypes.bfloat16}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert checkpoint.read(name).dtype == np.dtype(floats.get(kind, np.float32))
    is_float = kind in (Type.F32, Type.F16, Type.BF16)
    assert checkpoint.description == f"{'GGUF' if is_float else 'dequantized'} {kind.name}"


def is_dequantizable(kind: Type) -> bool:
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


FLOAT_TYPES = (Type.F32, Type.F16, Type.BF16)
DEQUANTIZABLE = [k for k in Type if k not in FLOAT_TYPES and is_dequantizable(k)]
OTHERS = [k for k in Type if not is_dequantizable(k)]


def write_blocks(path: Path, kind: Type) -> dict[str, np.ndarray]:
    """Writes a decoder of one layer with 256 x 256 matrices of random bytes; returns the bytes."""
    random = np.random.default_rng(kind.value)
    block, width = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(512)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-6)
    layer = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    blocks = {
        name: random.integers(0, 256, (256, 256 // block * width), np.uint8)
        for name in ("token_embd", *(f"blk.0.{part}" for part in layer))
    }
    for name, raw in blocks.items():
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return blocks


def test_the_types_in_use_can_be_dequantized() -> None:
    in_use = {Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS}
    assert in_use <= set(DEQUANTIZABLE)


# the random bytes hold some scales that overflow or are NaN
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", DEQUANTIZABLE, ids=lambda kind: kind.name)
def test_blocks_of_any_bytes_are_read_as_the_gguf_package_does(tmp_path: Path, kind: Type) -> None:
    blocks = write_blocks(tmp_path / "m.gguf", kind)
    checkpoint = open_gguf(tmp_path / "m.gguf")
    assert checkpoint.description == f"dequantized {kind.name}"
    back = {to_gguf_name(name).removesuffix(".weight"): name for name in checkpoint.names()}
    for name, raw in blocks.items():
        weight = checkpoint.read(back[name])
        assert weight.shape == (256, 256)
        np.testing.assert_array_equal(weight, gguf.dequantize(raw, kind))


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.name)
def test_a_type_that_cannot_be_dequantized_is_refused(tmp_path: Path, kind: Type) -> None:
    write_blocks(tmp_path / "m.gguf", kind)
    says = f"model.embed_tokens.weight has type {kind.name}, which cannot be dequantized; give a Q4"
    with pytest.raises(UserError, match=says) as e:
        open_gguf(tmp_path / "m.gguf")
    assert str(e.value).startswith(f"{tmp_path}/m.gguf: ")


def test_an_f32_file_gives_back_the_hugging_face_checkpoint(
    tmp_path: Path, weights, models: Path
) -> None:
    write(tmp_path / "m.gguf", weights)
    checkpoint, original = open_gguf(tmp_path / "m.gguf"), open_folder(models / "llama")
    assert checkpoint.names() == original.names()
    for name in original.names():
        np.testing.assert_array_equal(checkpoint.read(name), original.read(name))
    a, b = checkpoint.config, original.config
    assert a.norm_eps == pytest.approx(b.norm_eps, rel=1e-6)
    assert a == type(b)(**{**vars(b), "norm_eps": a.norm_eps})


def test_qwen2_is_not_permuted_and_has_biases(tmp_path: Path, models: Path) -> None:
    weights = load_file(models / "qwen2" / "model.safetensors")
    write(tmp_path / "m.gguf", weights, architecture="qwen2")
    checkpoint = open_gguf(tmp_path / "m.gguf")
    assert checkpoint.config.qkv_bias
    assert checkpoint.config.tie_embeddings
    for name, weight in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name), weight)


def test_biases_of_a_llama_are_permuted_too(tmp_path: Path, weights) -> None:
    random = np.random.default_rng(0)
    for layer in range(3):
        for name, rows in (("q", 64), ("k", 32), ("v", 32)):
            key = f"model.layers.{layer}.self_attn.{name}_proj.bias"
            weights[key] = random.normal(size=rows).astype(np.float32)
    write(tmp_path / "m.gguf", weights)
    checkpoint = open_gguf(tmp_path / "m.gguf")
    assert checkpoint.config.qkv_bias
    assert not checkpoint.config.output_bias
    for name, weight in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name), weight)


def test_without_an_output_tensor_embeddings_are_tied(tmp_path: Path, weights) -> None:
    del weights["lm_head.weight"]
    write(tmp_path / "m.gguf", weights)
    assert open_gguf(tmp_path / "m.gguf").config.tie_embeddings


def test_linear_rope_scaling(tmp_path: Path, weights) -> None:
    write(tmp_path / "m.gguf", weights, linear=4.0, theta=5e5)
    rope = open_gguf(tmp_path / "m.gguf").config.rope
    assert (rope.kind, rope.factor, rope.theta) == ("linear", 4.0, 5e5)


YARN = {"scaling.factor": 4.0, "scaling.original_context_length": 128}


@pytest.mark.parametrize(
    ("kind", "rope", "expected"),
    [
        (None, {}, Rope()),
        (None, {"scaling.factor": 4.0}, Rope(kind="linear", factor=4.0)),
        (None, {"scaling.factor": 0.0}, Rope()),
        (None, {"scale_linear": 4.0}, Rope(kind="linear", factor=4.0)),
        (None, {"scaling.factor": 2.0, "scale_linear": 4.0}, Rope(kind="linear", factor=2.0)),
        ("none", {"scaling.factor": 4.0}, Rope()),
        ("linear", {"scaling.finetuned": True, "scaling.attn_factor": 1.0}, Rope()),
        (
            "yarn",
            YARN,
            Rope(
                kind="yarn", factor=4.0, original_positions=128, attention_factor=1.138629436111989
            ),
        ),
        (
            "yarn",
            {
                "scaling.factor": 4.0,
                "scaling.finetuned": True,
                "scaling.yarn_ext_factor": 1.0,
                "scaling.yarn_log_multiplier": 0.0,
                "scaling.yarn_beta_fast": 16.0,
                "scaling.yarn_beta_slow": 2.0,
            },
            Rope(
                kind="yarn",
                factor=4.0,
                original_positions=512,
                beta_fast=16.0,
                beta_slow=2.0,
                attention_factor=1.138629436111989,
            ),
        ),
    ],
)
def test_rope_scaling_of_metadata(tmp_path: Path, weights, kind, rope, expected) -> None:
    write(tmp_path / "m.gguf", weights, rope=rope, **({"rope_scaling": kind} if kind else {}))
    assert open_gguf(tmp_path / "m.gguf").config.rope == expected


def ggml_yarn(position: int, dims: int, base: float, factor: float, original: int) -> np.ndarray:
    """Computes the cosines of ggml's rope_yarn with ext_factor 1 and attn_factor 1."""

    def dim(rotations: float) -> float:
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(0, math.floor(dim(32))), min(dims - 1, math.ceil(dim(1)))
    cosines = []
    for pair in range(dims // 2):
        apart = position * base ** (-2 * pair / dims)
        kept = 1 - min(1, max(0, (pair - low) / max(0.001, high - low)))
        angle = apart / factor * (1 - kept) + apart * kept
        cosines.append(math.cos(angle) * (1 + 0.1 * math.log(factor)))
    return np.array(cosines)


@pytest.mark.parametrize(("theta", "original"), [(1e4, 128), (1e6, 32768), (5e5, 20)])
def test_yarn_is_ggmls(tmp_path: Path, weights, theta: float, original: int) -> None:
    rope = YARN | {"scaling.original_context_length": original}
    write(tmp_path / "m.gguf", weights, rope=rope, rope_scaling="yarn", theta=theta)
    read = open_gguf(tmp_path / "m.gguf").config.rope
    cos, _ = rotation(jnp.array([[1, 17, 100]]), read, HEAD_DIM)
    expected = [ggml_yarn(p, HEAD_DIM, theta, 4.0, original) for p in (1, 17, 100)]
    np.testing.assert_allclose(cos[0, :, 0], expected, atol=2e-5)


def llama3_table(factor: float, theta: float, low: float = 1, high: float = 4) -> np.ndarray:
    """Computes llama.cpp's rope_freqs.weight, frequency by frequency."""
    table, length = [], 8192
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * theta ** (i / HEAD_DIM)
        if wavelength < length / high:
            table.append(1.0)
        elif wavelength > length / low:
            table.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            table.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(table, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recovered_from_its_table(
    tmp_path: Path, weights, factor: float
) -> None:
    extra = {"rope_freqs.weight": llama3_table(factor, 5e5)}
    write(tmp_path / "m.gguf", weights, theta=5e5, extra=extra)
    rope = open_gguf(tmp_path / "m.gguf").config.rope
    assert (rope.kind, rope.factor, rope.theta) == ("llama3", factor, 5e5)
    assert (rope.low_freq_factor, rope.high_freq_factor, rope.original_positions) == (1, 4, 8192)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"architecture": "bloom"}, "'bloom' is not supported; supported: llama, qwen2"),
        ({"rope_scaling": "ntk"}, "scaling 'ntk' is not supported; supported: none, linear, yarn"),
        ({"rope_scaling": "yarn"}, "llama.rope.scaling.factor is None; expected a positive number"),
        ({"rope": {"dimension_sections": [1, 2, 3]}}, "llama.rope.dimension_sections .* is not"),
        (
            {"rope": {"scaling.attn_factor": 1.25}},
            "llama.rope.scaling.attn_factor 1.25 is not supp",
        ),
        ({"rope": {"freq_base_swa": 5e5}}, "llama.rope.freq_base_swa 500000.0 is not supported"),
        (
            {"rope": {"scaling.factor": 4.0, "scaling.yarn_beta_fast": 16.0}},
            "yarn_beta_fast 16.0 is not supported with rope scaling 'linear'",
        ),
        (
            {"rope_scaling": "yarn", "rope": YARN | {"scaling.yarn_attn_factor": 1.0}},
            "yarn_attn_factor 1.0 is not supported with rope scaling 'yarn'; give a Hugging Face",
        ),
        (
            {"rope_scaling": "yarn", "rope": YARN | {"scaling.yarn_ext_factor": 0.5}},
            "llama.rope.scaling.yarn_ext_factor 0.5 is not supported",
        ),
        (
            {"linear": 2.0, "extra": {"rope_freqs.weight": np.ones(8, np.float32)}},
            "rope scaling 'linear' beside rope_freqs.weight is not supported",
        ),
        (
            {"extra": {"rope_freqs.weight": np.ones(3, np.float32)}},
            r"has shape \(3,\); expected \(8,",
        ),
        ({"extra": {"rope_freqs.weight": llama3_table(8, 1e4, low=2)}}, "rope_freqs.weight is not"),
        ({"extra": {"blk.0.ffn_gate_exps.weight": np.zeros(4, np.float32)}}, "ffn_gate_exps"),
        ({"rope_dimensions": 8}, "8 of 16 dimensions per head are rotated"),
        ({"drop": ("head_count",)}, r"llama.attention.head_count is None"),
    ],
)
def test_unsupported_files_are_refused(tmp_path: Path, weights, options, says: str) -> None:
    path = tmp_path / "m.gguf"
    write(path, weights, **options)
    with pytest.raises(UserError, match=says) as e:
        open_gguf(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_missing_tensors_and_wrong_shapes_are_refused(tmp_path: Path, weights) -> None:
    short = {n: w for n, w in weights.items() if ".2.mlp.up_proj" not in n}
    write(tmp_path / "m.gguf", short)
    with pytest.raises(UserError, match=r"missing: model.layers.2.mlp.up_proj.weight"):
        open_gguf(tmp_path / "m.gguf")
    weights["model.norm.weight"] = np.ones(32, np.float32)
    write(tmp_path / "m.gguf", weights)
    with pytest.raises(UserError, match=r"model.norm.weight is \[32\] and not \[64\]"):
        open_gguf(tmp_path / "m.gguf")


def test_every_truncation_is_refused(tmp_path: Path, weights) -> None:
    path = tmp_path / "m.gguf"
    write(path, weights)
    whole = path.read_bytes()
    header_end = len(whole) - sum(w.nbytes for w in weights.values())
    for length in [0, 3, 4, 23, 24, *range(25, header_end, 97), len(whole) - 64]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"truncated|not a GGUF file"):
            open_gguf(path)


def test_damaged_bytes_of_the_header_never_escape_as_another_error(tmp_path: Path, weights) -> None:
    path = tmp_path / "m.gguf"
    write(path, weights)
    whole = bytearray(path.read_bytes())
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = whole.copy()
        damaged[int(random.integers(0, 8000))] = int(random.integers(0, 256))
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            open_gguf(path)


def moved(data: bytes, name: str, to: Callable[[int], int]) -> bytes:
    """Returns the file's bytes with a changed offset in the entry of the tensor `name`."""
    at = data.index(name.encode()) + len(name)
    (axes,) = struct.unpack_from("<I", data, at)
    at += 4 + 8 * axes + 4
    (offset,) = struct.unpack_from("<Q", data, at)
    return data[:at] + struct.pack("<Q", to(offset)) + data[at + 8 :]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: moved(d, "blk.1.ffn_up.weight", lambda o: o + 4), "does not start at a multipl"),
        (lambda d: moved(d, "blk.1.ffn_up.weight", lambda o: o + 32), "ffn_up.weight and .* overl"),
        (lambda d: moved(d, "blk.1.ffn_up.weight", lambda o: 0), "overlap"),
        (lambda d: d.replace(b"blk.1.ffn_up", b"blk.0.ffn_up"), "ffn_up.weight is there twice"),
        (lambda d: d.replace(b"context_length", b"rope.freq_base"), "freq_base is there twice"),
    ],
)
def test_tensors_that_cannot_be_where_the_file_says_are_refused(
    tmp_path: Path, weights, damage, says: str
) -> None:
    path = tmp_path / "m.gguf"
    write(path, weights)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"damaged GGUF file .*{says}"):
        read_header(path)


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path, weights) -> None:
    path = tmp_path / "m.gguf"
    write(path, weights)
    data = path.read_bytes()
    name = b"blk.0.attn_norm.weight"
    at = data.index(name) + len(name)
    size = struct.pack("<IQI", 1, 64, Type.F32)
    assert data[at : at + len(size)] == size
    changed = struct.pack("<IQI", 1, 33, Type.Q8_0)
    path.write_bytes(data[:at] + changed + data[at + len(size) :])
    with pytest.raises(UserError, match="rows of 33 values, in blocks of 32"):
        read_header(path)


def test_the_header_agrees_with_the_gguf_packages_reader(tmp_path: Path, weights) -> None:
    path = tmp_path / "m.gguf"
    write(path, weights, kind=Type.Q5_1)
    reader, header = gguf.GGUFReader(path), read_header(path)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert header.metadata == fields
    assert list(header.tensors) == [t.name for t in reader.tensors]
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert ours.shape == tuple(tensor.shape[::-1])
        assert (ours.type, ours.offset, ours.nbytes) == (
            tensor.tensor_type,
            tensor.data_offset,
            tensor.n_bytes,
        )


def test_the_builtin_model(builtin_gguf: Path) -> None:
    checkpoint = open_gguf(builtin_gguf)
    assert checkpoint.description == "dequantized Q4_1"
    shapes = [checkpoint.shape(name) for name in checkpoint.names()]
    assert sum(int(np.prod(shape)) for shape in shapes) == 134_515_008
    config = checkpoint.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (
        30,
        9,
        3,
        64,
    )
    assert config.rope.theta == 1e5
    assert config.tie_embeddings
    assert checkpoint.read("model.layers.29.mlp.down_proj.weight").dtype == np.float32


def test_the_builtin_models_shapes_are_the_published_ones(builtin_gguf):
    published = find("smollm2-135m")
    epsilon = float(np.float32(published.norm_eps))  # the file holds it in float32
    assert open_gguf(builtin_gguf).config == dataclasses.replace(published, norm_eps=epsilon)

"""Reads and writes bitsandbytes 4-bit weights; its bytes, values and logits are the reference."""

import json
import math
import shutil
from collections import ChainMap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from selection import mostly_slow

from qlora_jax.formats import bitsandbytes
from qlora_jax.formats.bitsandbytes import StoredLayout, encode, read_layout, read_weight
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.quant import QTensor, dequantize
from qlora_jax.quant.dynamic8 import dynamic_map
from qlora_jax.runtime.errors import UserError

FILES = [
    np.load(Path(__file__).parents[1] / "golden" / name) for name in ("bnb.npz", "bnb_rows.npz")
]
GOLDEN = ChainMap(*FILES)
FOLDERS = sorted({k.rpartition("/")[0] for k in GOLDEN if k.count("/") == 2})
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
SUBNORMAL = ("tiny.", "subnormal.")
"""Golden cases to skip: XLA:CPU flushes subnormal scales to zero."""


def stored(folder: str, double: bool) -> tuple[StoredLayout, dict[str, np.ndarray]]:
    """Returns a golden weight as bitsandbytes stores it: the layout, and tensors by name suffix."""
    case, spec = folder.split("/")
    kind, block = spec.split(".b")
    dtype = DTYPES[case.rpartition(".")[2]]
    shape = GOLDEN[f"{case}/input"].shape
    shape = (1, *shape) if len(shape) == 1 else (math.prod(shape[:-1]), shape[-1])
    state = {"quant_type": kind, "blocksize": int(block), "dtype": dtype, "shape": shape}
    tensors = {
        "": GOLDEN[f"{folder}/packed"][:, None],
        ".absmax": GOLDEN[f"{folder}/absmax{'_u8' if double else ''}"],
        ".quant_map": GOLDEN[f"code_{kind}"],
    }
    if double:
        tensors[".nested_absmax"] = GOLDEN[f"{folder}/nested_absmax"]
        tensors[".nested_quant_map"] = GOLDEN["code_dynamic8"]
        state["nested_blocksize"] = 256
        state["nested_dtype"] = "float32"
        state["nested_offset"] = float(GOLDEN[f"{folder}/offset"].reshape(()))
    text = json.dumps(state).encode()
    tensors[f".quant_state.bitsandbytes__{kind}"] = np.frombuffer(text, np.uint8)
    return read_layout("w", kind, text, tensors.get(".nested_quant_map")), tensors


def read(layout: StoredLayout, tensors: dict[str, np.ndarray]):
    parts = {p: tensors[f".{p}"] for p in bitsandbytes.PARTS if f".{p}" in tensors}
    state = tensors[f".quant_state.bitsandbytes__{layout.kind}"].tobytes()
    return read_weight("w", layout, tensors[""], parts, state)


def golden_cases(double: bool) -> list[str]:
    return [
        f
        for f in FOLDERS
        if not f.startswith(SUBNORMAL) and (not double or f"{f}/offset" in GOLDEN)
    ][:: 3 - double]


decoded = jax.jit(dequantize, static_argnums=1)


def floats(held, dtype) -> np.ndarray:
    return np.asarray(decoded(held, dtype) if isinstance(held, QTensor) else held)


@pytest.mark.parametrize("double", mostly_slow([False, True], True), ids=["sq", "dq"])
@pytest.mark.quick
def test_every_golden_weight_is_read_with_its_values_and_written_with_its_bytes(double):
    held = {None: 0, "as stored": 0, "in smaller blocks": 0}
    for folder in golden_cases(double):
        layout, tensors = stored(folder, double)
        weight = read(layout, tensors)
        dtype = bitsandbytes.DTYPES[layout.dtype]
        expected = GOLDEN[f"{folder}/deq{'_dq' if double else ''}"].reshape(layout.shape).T
        if layout.dtype == "bfloat16":
            expected = expected.view(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(floats(weight, dtype), expected, err_msg=folder)
        if not isinstance(weight, QTensor):
            assert layout.shape[1] % 32
            held[None] += 1
            continue
        held["as stored" if weight.block_size == layout.block else "in smaller blocks"] += 1
        again = encode(weight, layout)
        assert again.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert again[name].dtype == tensor.dtype
            assert again[name].tobytes() == tensor.tobytes(), f"{folder}{name}"
            assert again[name].shape == tensor.shape
    print(held)
    assert min(held.values()) >= 7


def random_stored(shape: tuple[int, int], block: int, kind: str = "fp4", nested: int | None = 256):
    """Returns a stored weight of random codes and scales, which no quantizer would produce."""
    random = np.random.default_rng(sum(shape) + block)
    count = math.prod(shape)
    scales = -(-count // block)
    state = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": shape}
    tensors = {
        "": random.integers(0, 256, (-(-count // 2), 1), dtype=np.uint8),
        ".absmax": random.integers(0, 256, scales, dtype=np.uint8),
        ".quant_map": GOLDEN[f"code_{kind}"],
    }
    if nested:
        tensors[".nested_absmax"] = random.random(-(-scales // nested), np.float32)
        tensors[".nested_quant_map"] = dynamic_map()
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.5}
    else:
        tensors[".absmax"] = random.random(scales, np.float32)
    tensors[f".quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), "u1")
    return state, tensors


def values_one_by_one(state, tensors) -> np.ndarray:
    """Dequantizes by bitsandbytes' rule in numpy: the reference, [out, in]."""
    codes = np.stack([tensors[""] >> 4, tensors[""] & 15], axis=-1).reshape(-1)
    codes = codes[: math.prod(state["shape"])]
    scales = tensors[".absmax"]
    if "nested_blocksize" in state:
        nested = np.repeat(tensors[".nested_absmax"], state["nested_blocksize"])[: scales.size]
        scales = tensors[".nested_quant_map"][scales] * nested + np.float32(state["nested_offset"])
    scales = np.repeat(scales, state["blocksize"])[: codes.size]
    return (tensors[".quant_map"][codes] * scales).reshape(state["shape"])


@pytest.mark.parametrize("nested", [None, 256, 8])
@pytest.mark.parametrize(
    ("shape", "block", "held"),
    [
        ((6, 128), 64, 64),
        ((6, 96), 64, 32),
        ((5, 96), 64, 32),
        ((3, 4128), 4096, 32),
        ((40, 192), 4096, 64),
        ((7, 320), 256, 64),
        ((4, 100), 64, None),
        ((3, 33), 64, None),
    ],
)
def test_blocks_that_cross_rows_are_held_exactly_where_32_divides_them(shape, block, held, nested):
    state, tensors = random_stored(shape, block, nested=nested)
    text = tensors[".quant_state.bitsandbytes__fp4"].tobytes()
    layout = read_layout("w", "fp4", text, tensors.get(".nested_quant_map"))
    weight = read(layout, tensors)
    assert (weight.block_size if isinstance(weight, QTensor) else None) == held
    np.testing.assert_array_equal(floats(weight, jnp.float32), values_one_by_one(state, tensors).T)
    if held:
        again = encode(weight, layout)
        assert all(again[n].tobytes() == tensors[n].tobytes() for n in tensors)


def test_a_map_of_its_own_for_the_scales_is_honoured():
    state, tensors = random_stored((4, 128), 64)
    tensors[".nested_quant_map"] = np.nextafter(dynamic_map(), np.float32(2))
    text = tensors[".quant_state.bitsandbytes__fp4"].tobytes()
    layout = read_layout("w", "fp4", text, tensors[".nested_quant_map"])
    weight = read(layout, tensors)
    assert not weight.double_quant
    np.testing.assert_array_equal(floats(weight, jnp.float32), values_one_by_one(state, tensors).T)


@pytest.mark.parametrize("storage", [np.uint8, np.float16, ml_dtypes.bfloat16, np.float32])
def test_storage_in_another_dtype_is_the_same_bytes(storage):
    _, tensors = random_stored((6, 128), 64)
    text = tensors[".quant_state.bitsandbytes__fp4"].tobytes()
    layout = read_layout("w", "fp4", text, tensors[".nested_quant_map"])
    expected = read(layout, tensors)
    found = read(layout, tensors | {"": tensors[""].reshape(-1).view(storage)[:, None]})
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def logits(model, tokens) -> np.ndarray:
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, tokens):
        model = nnx.merge(graph, state)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = model.hidden(tokens, jnp.ones_like(tokens), positions, dtype=jnp.float32)
        return model.logits(hidden)

    return np.asarray(run(state, tokens))


@pytest.mark.parametrize("name", mostly_slow(["llama/bnb_nf4", "llama_bnb_fp4"], "llama/bnb_nf4"))
@pytest.mark.quick
def test_a_models_logits_are_transformers(models, name):
    where = models / name
    model = load_model(open_folder(where), quant=None, dtype=jnp.float32)
    tokens = np.load(where.parent / "reference.npz" if "/" in name else where / "reference.npz")
    found = logits(model, jnp.asarray(tokens["tokens"]))
    expected = np.load(where / "reference.npz")["logits"]
    print(name, np.abs(found - expected).max(), np.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


def test_layers_that_are_stored_unlike_make_runs(models):
    checkpoint = open_folder(models / "llama_bnb_fp4")
    assert checkpoint.description == "safetensors F32/bitsandbytes fp4"
    assert checkpoint.quantization.config.block_size == 64
    down = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]
    assert checkpoint.quantization.dequantized == down
    model = load_model(checkpoint, quant=None, dtype=jnp.bfloat16)
    assert [run.linears()["mlp.up_proj"].weight.get_value().shape for run in model.runs] == [
        (1, 96, 80)
    ] * 3
    kinds = [type(run.linears()["mlp.up_proj"].weight.get_value()) for run in model.runs]
    assert [kind is QTensor for kind in kinds] == [True, False, True]
    run = model.runs[0].linears()
    assert run["mlp.gate_proj"].weight.get_value().block_size == 32
    # a dequantized weight keeps the dtype of its quant_state; a float weight gets `dtype`
    assert run["mlp.down_proj"].weight.get_value().dtype == jnp.float32
    assert model.runs[1].linears()["mlp.up_proj"].weight.get_value().dtype == jnp.bfloat16


@pytest.fixture
def nf4(models: Path, tmp_path: Path) -> Path:
    """A copy of a bitsandbytes NF4 model that a test may damage."""
    folder = tmp_path / "nf4"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(models / "llama" / "bnb_nf4" / name, folder / name)
    return folder


WEIGHT = "model.layers.1.mlp.up_proj.weight"


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def without(part: str):
    return lambda tensors: tensors.pop(f"{WEIGHT}.{part}")


def shorter(part: str):
    name = f"{WEIGHT}.{part}" if part else WEIGHT
    return lambda tensors: tensors.update({name: tensors[name][:-1].copy()})


def restated(kind: str = "nf4", **changes: object):
    """Returns a change of the quant_state's keys and kind; the value None removes a key."""

    def change(tensors) -> None:
        state = json.loads(tensors.pop(f"{WEIGHT}.quant_state.bitsandbytes__nf4").tobytes())
        state = {k: v for k, v in (state | changes).items() if v is not None}
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        tensors[f"{WEIGHT}.quant_state.bitsandbytes__{kind}"] = text

    return change


def garbled(tensors) -> None:
    tensors[f"{WEIGHT}.quant_state.bitsandbytes__nf4"] = np.frombuffer(b"{", np.uint8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("nested_absmax"), rf"{WEIGHT}.nested_absmax: missing beside"),
        (without("nested_quant_map"), rf"{WEIGHT}.nested_quant_map: missing beside"),
        (without("absmax"), rf"{WEIGHT}.absmax: missing beside"),
        (without("quant_map"), rf"{WEIGHT}.quant_map: missing beside"),
        (without("quant_state.bitsandbytes__nf4"), r"stored as U8|is \[4096, 1\] and not"),
        (shorter(""), rf"{WEIGHT}: 4095 bytes .*not the 4096 of a nf4 weight \[128, 64\]"),
        (shorter("absmax"), rf"{WEIGHT}.absmax: 127 bytes"),
        (restated("int4"), r"quant_type 'int4' is not known; known: nf4, fp4"),
        (restated(quant_type="fp4"), r"quant_type 'fp4'.*not values .* for kind nf4"),
        (restated(blocksize=48), r"blocksize 48"),
        (restated(dtype="int8"), r"dtype 'int8'"),
        (restated(shape=[64]), r"quant_state has a missing or wrong value"),
        (restated(shape=[64, 64]), r"4096 bytes .*not the 2048"),
        (restated(blocksize=None), r"quant_state has a missing or wrong value: 'blocksize'"),
        (restated(nested_offset=None), r"missing or wrong value: 'nested_offset'"),
        (restated(nested_blocksize=None), rf"{WEIGHT}.absmax: is stored as U8"),
        (garbled, r"quant_state is not JSON"),
    ],
)
def test_damaged_weights_are_refused_in_one_line(nf4, change, says):
    edit(nf4, change)
    with pytest.raises(UserError, match=says) as e:
        open_folder(nf4)
    assert str(nf4) in str(e.value)
    assert "\n" not in str(e.value)


def test_scales_that_are_not_finite_are_refused(nf4):
    def change(tensors) -> None:
        tensors[f"{WEIGHT}.nested_absmax"][0] = np.inf

    edit(nf4, change)
    with pytest.raises(UserError, match=f"{WEIGHT}: holds NaN or Inf"):
        load_model(open_folder(nf4), quant=None, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"load_in_4bit": True}, None),
        ({"quant_method": "awq"}, r"quantization_config (awq) is ignored"),
        ({"load_in_8bit": True}, r"(bitsandbytes in 8 bits) is ignored"),
        ("yes", r"quantization_config (?) is ignored"),
    ],
)
def test_the_weights_decide_and_not_the_quantization_config(nf4, settings, note):
    config = json.loads((nf4 / "config.json").read_text()) | {"quantization_config": settings}
    (nf4 / "config.json").write_text(json.dumps(config))
    checkpoint = open_folder(nf4)
    assert checkpoint.quantization.config.codebook == "nf4"
    assert [note is not None and note in line for line in checkpoint.notes] == [True] * bool(note)


def test_a_config_of_transformers_4_and_one_without_quantization_config_are_read(nf4):
    config = json.loads((nf4 / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    del config["quantization_config"]
    (nf4 / "config.json").write_text(json.dumps(config))
    assert open_folder(nf4).quantization.config.codebook == "nf4"


def test_a_quantized_head_is_held_as_floats(models, tmp_path):
    state, tensors = random_stored((256, 64), 64)
    shutil.copytree(models / "llama" / "bnb_nf4", tmp_path / "m")
    edit(
        tmp_path / "m",
        lambda all: all.update({f"lm_head.weight{n}": t for n, t in tensors.items()}),
    )
    model = load_model(open_folder(tmp_path / "m"), quant=None, dtype=jnp.float32)
    np.testing.assert_array_equal(model.stored_head()[0], values_one_by_one(state, tensors).T)

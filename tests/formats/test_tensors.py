"""Digests in the safetensors files of this project; a file that does not match is refused."""

import json
import random
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from qlora_jax.formats import tensors
from qlora_jax.formats.peft import read_adapter, write_adapter
from qlora_jax.formats.peft.adapter import WEIGHTS
from qlora_jax.lora.weights import LoraWeights
from qlora_jax.runtime.errors import UserError

FLIPS = 200


def read(path: Path, name: str) -> np.ndarray:
    with safe_open(path, framework="numpy", backend="pread") as file:
        return tensors.read(file, name, path)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    random_ = np.random.default_rng(0)
    a, b = (random_.normal(size=shape).astype(np.float32) for shape in ((16, 4), (4, 8)))
    folder = tmp_path / "adapter"
    name = "model.layers.0.self_attn.q_proj"
    write_adapter(folder, {name: LoraWeights(a, b, 8.0, 2.0)}, base_name="base")
    return folder


def test_no_flipped_bit_of_an_adapter_is_read_in_silence(adapter: Path, tmp_path: Path) -> None:
    whole = read_adapter(adapter).adapters
    data = (adapter / WEIGHTS).read_bytes()
    refused = 0
    for seed in range(FLIPS):
        changed = bytearray(data)
        bit = random.Random(seed).randrange(8 * len(data))
        changed[bit // 8] ^= 1 << bit % 8
        folder = Path(shutil.copytree(adapter, tmp_path / str(seed)))
        (folder / WEIGHTS).write_bytes(bytes(changed))
        try:
            found = read_adapter(folder).adapters
        except UserError:
            refused += 1
            continue
        # the flipped bit was in a space, or in a name in the metadata
        for path, one in whole.items():
            np.testing.assert_array_equal(found[path].a, one.a)
            np.testing.assert_array_equal(found[path].b, one.b)
    assert refused > FLIPS / 2


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.uint8])
def test_the_tensor_that_differs_is_named(tmp_path: Path, dtype: np.dtype) -> None:
    whole = {"a": np.ones((3, 4), dtype), "b": np.ones(5, dtype), "c": np.ones((), dtype)}
    path = tmp_path / "x.safetensors"
    save_file(whole | {"b": np.zeros(5, dtype)}, path, metadata=tensors.metadata(whole))
    np.testing.assert_array_equal(read(path, "a"), whole["a"])
    np.testing.assert_array_equal(read(path, "c"), whole["c"])
    with pytest.raises(UserError, match=r"x\.safetensors: b differs from what was saved"):
        read(path, "b")


def test_files_of_other_tools_have_no_digests(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.ones(3)}, path, metadata={"format": "pt"})
    np.testing.assert_array_equal(read(path, "a"), np.ones(3))
    save_file({"a": np.ones(3)}, path)
    np.testing.assert_array_equal(read(path, "a"), np.ones(3))


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, json.dumps("a")])
def test_digests_that_are_no_object_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.ones(3)}, path, metadata={tensors.KEY: text})
    with pytest.raises(UserError, match="not a JSON object"):
        read(path, "a")


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    arrays = {"ä": np.arange(6, dtype=np.float32), 'b"': np.ones((2, 3), ml_dtypes.bfloat16)}
    written = set()
    for i in range(20):
        tensors.save(arrays, tmp_path / str(i))
        written.add((tmp_path / str(i)).read_bytes())
    assert len(written) == 1
    for name, array in arrays.items():
        np.testing.assert_array_equal(read(tmp_path / "0", name), array)

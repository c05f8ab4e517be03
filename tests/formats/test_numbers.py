"""Untrusted files: numbers of a wrong type, not finite or impossibly large are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.peft.read import read_adapter
from qlora_jax.runtime.errors import UserError

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def adapter(models: Path, tmp_path: Path) -> Path:
    """A copy of an adapter that PEFT wrote."""
    return Path(shutil.copytree(models / "llama" / "peft_lora", tmp_path / "adapter"))


def set_keys(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", NAN),
        ("lora_alpha", INFINITY),
        ("lora_alpha", "16"),
        ("lora_alpha", None),
        ("lora_alpha", [8]),
        ("r", 0),
        ("r", -1),
        ("r", 10**30),
        ("r", 2.5),
        ("r", True),
        ("r", {}),
        ("lora_dropout", NAN),
        ("lora_dropout", 2),
        ("rank_pattern", {"q_proj": "8"}),
        ("rank_pattern", [1]),
        ("alpha_pattern", {"q_proj": NAN}),
        ("alpha_pattern", 3),
        ("target_modules", 3),
        ("target_modules", [1, 2]),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", [None]),
        ("base_model_name_or_path", 7),
        ("use_rslora", "no"),
        ("use_dora", []),
    ],
)
def test_a_setting_of_an_adapter_that_cannot_be_is_named(
    adapter: Path, key: str, value: Any
) -> None:
    read_adapter(adapter)
    set_keys(adapter / "adapter_config.json", **{key: value})
    with pytest.raises(UserError, match=rf"adapter_config\.json: {key}") as caught:
        read_adapter(adapter)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_number_of_an_adapter_that_is_none_is_named(
    adapter: Path, value: float, dtype: np.dtype
) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.astype(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    read_adapter(adapter)
    name = sorted(tensors)[3]
    tensors[name].reshape(-1)[-1] = value
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"{name} holds NaN or Inf"):
        read_adapter(adapter)


@pytest.mark.parametrize("layers", [0, -1, 5000, 10**8, 10**300, INFINITY, NAN, "x", None, []])
def test_layers_that_cannot_be_are_refused_at_once(
    models: Path, tmp_path: Path, layers: Any
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(models / "llama" / name, folder / name)
    set_keys(folder / "config.json", num_hidden_layers=layers)
    with pytest.raises(UserError) as caught:
        open_folder(folder)
    assert "config.json" in str(caught.value) or "not a whole llama checkpoint" in str(caught.value)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (r"(.|[a-z])*\d\d", "takes over 1 s to match"),
        ("(", "is not a regular expression"),
        ("(?P<n>a)(?P<n", "is not a regular expression"),
    ],
)
def test_a_pattern_that_never_ends_is_named(
    adapter: Path, key: str, pattern: str, says: str
) -> None:
    set_keys(adapter / "adapter_config.json", **{key: {pattern: 4}})
    with pytest.raises(UserError, match=rf"adapter_config\.json: {key}: .*{says}"):
        read_adapter(adapter)

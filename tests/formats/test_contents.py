"""Messages for a folder that holds something else than a model or an adapter."""

from pathlib import Path

import pytest

from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.peft import read_adapter
from qlora_jax.runtime.errors import UserError


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "no config.json in it; give a Hugging Face model folder"),
        (
            ["m.gguf", "README.md"],
            "no config.json in it; it holds a GGUF file; give that: {}/m.g",
        ),
        (["m-00002-of-00002.gguf", "m-00001-of-00002.gguf"], "give that: {}/m-00001-of-00002.gguf"),
        (["adapter_config.json", "adapter_model.bin"], "it is an adapter; give the model it was"),
        (["config.yaml", "adapter/adapter_config.json"], "it is a run directory; merge it into"),
        (["pytorch_model.bin"], "PyTorch pickle, {}/pytorch_model.bin, which can hold code; conv"),
        (["consolidated.00.pth", "params.json"], "pickle, {}/consolidated.00.pth, which can hold"),
        (["flax_model.msgpack"], "its weights are in Flax's format, {}/flax_model.msgpack"),
        (["checkpoint-20/config.json"], "it holds a model folder; give that: {}/checkpoint-20"),
    ],
)
def test_a_folder_that_is_no_model(tmp_path: Path, files: list[str], says: str) -> None:
    fill(tmp_path, *files)
    with pytest.raises(UserError) as e:
        open_folder(tmp_path)
    assert says.format(tmp_path) in str(e.value)
    assert str(e.value).startswith(f"{tmp_path}: ")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "no adapter_config.json in it; give a folder in PEFT's format"),
        (
            ["checkpoint-5/adapter_config.json"],
            "an adapter folder; give that: {}/checkpoint-5",
        ),
        (["lora-f16.gguf"], "it holds a GGUF file, {}/lora-f16.gguf; give an adapter in PEFT's"),
        (
            ["config.json", "model.safetensors"],
            "it is a model, not an adapter; give it as model",
        ),
    ],
)
def test_a_folder_that_is_no_adapter(tmp_path: Path, files: list[str], says: str) -> None:
    fill(tmp_path, *files)
    with pytest.raises(UserError) as e:
        read_adapter(tmp_path)
    assert says.format(tmp_path) in str(e.value)

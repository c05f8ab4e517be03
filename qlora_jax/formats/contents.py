"""Errors for a folder that is not a model or not an adapter: its content, and what to do."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError

CONVERT = "convert it with save_pretrained(..., safe_serialization=True)"


class Content(NamedTuple):
    """A kind of file that a folder may hold instead of the expected one.

    Attributes:
      pattern: glob pattern of the files.
      words: part of the message, which says what the file is and what to do; {} is replaced by the
        path of the file, or of its folder if the pattern begins with */.
    """

    pattern: str
    words: str


IN_PLACE_OF_A_MODEL = (
    Content("adapter_config.json", "it is an adapter; give the model it was trained on"),
    Content("adapter/adapter_config.json", "it is a run directory; merge it into a model first"),
    Content("*.gguf", "it holds a GGUF file; give that: {}"),
    Content("*.bin", "its weights are a PyTorch pickle, {}, which can hold code; " + CONVERT),
    Content("*.pth", "its weights are a PyTorch pickle, {}, which can hold code; " + CONVERT),
    Content("*.pt", "its weights are a PyTorch pickle, {}, which can hold code; " + CONVERT),
    Content("*.msgpack", "its weights are in Flax's format, {}; " + CONVERT),
    Content("*.h5", "its weights are in TensorFlow's format, {}; " + CONVERT),
    Content("*.safetensors", "it holds only {}; download the whole folder"),
    Content("*/config.json", "it holds a model folder; give that: {}"),
)
IN_PLACE_OF_AN_ADAPTER = (
    Content("*/adapter_config.json", "it holds an adapter folder; give that: {}"),
    Content("*.gguf", "it holds a GGUF file, {}; give an adapter in PEFT's format"),
    Content("config.json", "it is a model, not an adapter; give it as model.path"),
)


def not_a_model(folder: Path, lacks: str) -> UserError:
    """Returns the error for a folder that is not a model.

    Args:
      folder: the folder.
      lacks: name of the missing file.
    """
    return _error(folder, lacks, IN_PLACE_OF_A_MODEL, "give a Hugging Face model folder")


def not_an_adapter(folder: Path, lacks: str) -> UserError:
    """Returns the error for a folder that is not an adapter.

    Args:
      folder: the folder.
      lacks: name of the missing file.
    """
    return _error(folder, lacks, IN_PLACE_OF_AN_ADAPTER, "give a folder in PEFT's format")


def _error(folder: Path, lacks: str, known: Sequence[Content], otherwise: str) -> UserError:
    if not paths.is_dir(folder):
        return UserError(f"{folder}: no such folder; {otherwise}")
    for content in known:
        if files := sorted(folder.glob(content.pattern)):
            given = files[0].parent if content.pattern.startswith("*/") else files[0]
            return UserError(f"{folder}: no {lacks} in it; {content.words.format(given)}")
    return UserError(f"{folder}: no {lacks} in it; {otherwise}")

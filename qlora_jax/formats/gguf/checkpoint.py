"""Opens a .gguf file as a `Checkpoint`."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from qlora_jax.formats import tying
from qlora_jax.formats.gguf.architectures import ARCHITECTURES, hugging_face_name
from qlora_jax.formats.gguf.config import config_of
from qlora_jax.formats.gguf.rope import TABLES
from qlora_jax.formats.gguf.split_files import read_parts
from qlora_jax.formats.gguf.tensors import (
    Layout,
    check_dequantizable,
    describe,
    layouts,
    read_tensor,
)
from qlora_jax.formats.names import check_shapes
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.families import FAMILIES
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.gguf_header import GgufTensor


@dataclasses.dataclass(frozen=True)
class GgufCheckpoint:
    """A `Checkpoint` in a .gguf file.

    Attributes:
      layouts: name to the function that converts the stored tensor to Hugging Face's form; tensors
        that need no conversion are absent.
    """

    path: Path
    config: DecoderConfig
    description: str
    tensors: dict[str, GgufTensor]
    layouts: dict[str, Layout]
    quantization: None = None
    notes: tuple[str, ...] = ()

    @property
    def tokenizer_path(self) -> Path:
        return self.path

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        weight = read_tensor(self.tensors[name])
        return self.layouts[name](weight) if name in self.layouts else weight


def open_gguf(path: Path) -> GgufCheckpoint:
    """Opens a .gguf file of one of `ARCHITECTURES`.

    Raises:
      UserError: the file is not a complete GGUF file; an architecture, rope scaling or tensor is
        not supported; or the tensors do not agree with the metadata.
    """
    header = read_parts(path)
    architecture = str(header.metadata.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: architecture {architecture!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    kind = ARCHITECTURES[architecture]
    found = {
        hugging_face_name(n, FAMILIES[kind.family], path): t
        for n, t in header.tensors.items()
        if n not in TABLES
    }
    config = config_of(header, found, path)
    # GGUF metadata does not say whether head and embedding are tied, so the note is not needed.
    matrices = tying.matrices(config)
    config = tying.resolve_tying(
        config, found, lambda: _equal(*(found[n] for n in matrices))
    ).config
    expected = check_shapes({name: t.shape for name, t in found.items()}, config, path)
    tensors = {name: found[name] for name in expected}
    for name, tensor in tensors.items():
        check_dequantizable(name, tensor, path)
    return GgufCheckpoint(
        path=path,
        config=config,
        description=describe(tensors),
        tensors=tensors,
        layouts=layouts(kind, config, tensors),
    )


def _equal(first: GgufTensor, second: GgufTensor) -> bool:
    """Returns whether two matrices are stored as the same bytes."""
    if (first.shape, first.type) != (second.shape, second.type):
        return False
    rows = [functools.partial(_rows, tensor) for tensor in (first, second)]
    return tying.equal_rows(first.shape[0], *rows)


def _rows(tensor: GgufTensor, start: int, stop: int) -> np.ndarray:
    size = tensor.nbytes // tensor.shape[0]
    offset = tensor.offset + start * size
    return np.fromfile(tensor.file, np.uint8, (stop - start) * size, offset=offset)

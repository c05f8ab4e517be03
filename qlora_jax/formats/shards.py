"""Finds the tensors of a Hugging Face folder: one safetensors file, or shards with an index."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors asks for by name)
import numpy as np
from safetensors import SafetensorError, safe_open

from qlora_jax.formats import contents, tensors
from qlora_jax.runtime import json_files, paths
from qlora_jax.runtime.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file.

    Attributes:
      file: path of the file.
      name: name of the tensor in the file.
      shape: shape of the tensor.
      dtype: dtype by its name in safetensors, such as BF16.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        """Reads the tensor into a new array.

        Raises:
          UserError: the tensor does not match its digest.
        """
        # pread needs memory for this tensor only; pages of a memory map stay until it is closed.
        with safe_open(self.file, framework="numpy", backend="pread") as file:
            return tensors.read(file, self.name, self.file)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Reads a range of the tensor's rows."""
        with safe_open(self.file, framework="numpy", backend="pread") as file:
            found: np.ndarray = file.get_slice(self.name)[start:stop]
        return found


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Returns all tensors of a folder by name. Reads only the headers of the files.

    Raises:
      UserError: a file is missing or damaged, or the files contradict the index.
    """
    found: dict[str, StoredTensor] = {}
    places = _places(folder)
    for path in _weight_files(folder, places):
        for name, tensor in read_header(path).items():
            place = places.get(name) or found.get(name, tensor).file.name
            if place != path.name:
                raise UserError(
                    f"{path}: holds {name}, which belongs in {place}; download both again"
                )
            found[name] = tensor
    if absent := sorted(set(places or ()) - set(found)):
        raise UserError(
            f"{folder / INDEX}: places {absent[0]} in {places[absent[0]]}, which does not hold it; "
            "download both again"
        )
    return found


def _places(folder: Path) -> dict[str, str]:
    """Returns tensor name to file name, from the index; empty if the weights are in one file."""
    index = folder / INDEX
    if paths.is_file(folder / WEIGHTS) or not paths.is_file(index):
        return {}
    places = json_files.read_object(index, "download it again").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise UserError(f"{index}: no weight_map in it; download it again")
    for file in places.values():
        if Path(file).name != file:
            raise UserError(
                f"{index}: {file!r} is not the name of a file in the folder; download it again"
            )
    return places


def _weight_files(folder: Path, places: Mapping[str, str]) -> list[Path]:
    single = folder / WEIGHTS
    if paths.is_file(single):
        return [single]
    if places:
        shards = [folder / name for name in sorted(set(places.values()))]
        if absent := [shard.name for shard in shards if not paths.is_file(shard)]:
            raise UserError(
                f"{folder}: {absent[0]} is missing, {len(absent)} of {len(shards)} shards are "
                "missing; download them"
            )
        return shards
    raise contents.not_a_model(folder, WEIGHTS)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one file by name.

    Raises:
      UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="numpy", backend="pread") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(path, name, tuple(s.get_shape()), s.get_dtype())
                for name, s in slices.items()
            }
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: truncated or damaged ({e}); download it again") from None

"""Reads the values of an abstract model from files, a checkpoint or a function, one at a time."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from qlora_jax.formats.shards import StoredTensor, find_tensors, read_header
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError, first_line

Array = np.ndarray | jax.Array
Read = Callable[[str, jax.ShapeDtypeStruct], Array | None]
"""Function (path of a variable, shape and dtype) to value; None if the source has no value."""

Source = Read | str | Path
"""`Read` function, .safetensors file, folder of them, or folder of an orbax checkpoint."""

ORBAX = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")
"""Names of files; the folder of an orbax checkpoint holds at least one of them."""


def reader(source: Source) -> Read:
    """Returns a function that reads one value of a source.

    Args:
      source: function, file or folder. In files the names are the paths of the variables. An orbax
        checkpoint may hold an `nnx.State` or pure dictionaries.

    Raises:
      UserError: the file or folder does not exist, or is damaged.
    """
    if callable(source):
        return source
    path = Path(source).expanduser()
    if paths.is_dir(path):
        if any(paths.exists(path / name) for name in ORBAX):
            return _orbax(path)
        return _from_tensors(find_tensors(path))
    if not paths.is_file(path):
        raise UserError(f"{path}: no such file or folder; correct the path")
    return _from_tensors(read_header(path))


def _from_tensors(tensors: Mapping[str, StoredTensor]) -> Read:
    def read(name: str, shape: jax.ShapeDtypeStruct) -> Array | None:
        return tensors[name].read() if name in tensors else None

    return read


def _orbax(folder: Path) -> Read:
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        found = checkpointer.metadata(folder.absolute()).item_metadata
        leaves = jax.tree_util.tree_leaves_with_path(found.tree)
    except (OSError, ValueError, KeyError, AttributeError) as e:
        raise UserError(
            f"{folder}: no orbax checkpoint that can be read ({first_line(e)}); save it again"
        ) from None
    by_path = {}
    for keys, leaf in leaves:
        names = [str(getattr(k, "key", getattr(k, "idx", k))) for k in keys]
        by_path[".".join(names[:-1] if names[-1] == "value" else names)] = names, leaf

    def read(name: str, shape: jax.ShapeDtypeStruct) -> Array | None:
        if name not in by_path:
            return None
        keys, leaf = by_path[name]
        item: Any = functools.reduce(lambda inner, key: {key: inner}, reversed(keys), leaf)
        restore = functools.reduce(
            lambda inner, key: {key: inner},
            reversed(keys),
            ocp.RestoreArgs(restore_type=np.ndarray),
        )
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore, partial_restore=True)
        return jax.tree.leaves(checkpointer.restore(folder.absolute(), args=args))[0]

    return read

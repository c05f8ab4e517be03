"""Where the values of an abstract model come from: one array at a time."""

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
"""A variable's path, and its shape and dtype, to its value; None where the source has none."""

Source = Read | str | Path
"""Such a function, a .safetensors file, a folder of them, or the folder of an orbax checkpoint."""

ORBAX = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")
"""Files of which an orbax checkpoint has one."""


def reader(source: Source) -> Read:
    """Returns what reads one value of a source.

    In files, names are the paths of the variables. A checkpoint of an `nnx.State`, or of pure
    dictionaries, is read.

    Raises:
      UserError: there is no such file, or it is damaged.
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

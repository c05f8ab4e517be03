"""Reads adapters from folders that a client or user names; refuses files that are not regular."""

import stat
from pathlib import Path

from qlora_jax.formats.peft.adapter import CONFIG, WEIGHTS
from qlora_jax.formats.peft.plain import adapter_folder, check_shared, read_plain
from qlora_jax.lora.weights import LoraSet
from qlora_jax.models.decoder import Decoder
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError

KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
"""File types other than a regular file, by their bits in `st_mode`."""


def read_regular(path: str, model: Decoder | None = None) -> LoraSet:
    """Reads an adapter as `read_plain` does, but only from regular files.

    Raises:
      UserError: `read_plain` fails, a file is not regular, or the adapter changes the embedding or
        the head.
    """
    folder = regular_folder(path)
    found = read_plain(folder, model)
    check_shared(folder, found)
    return found


def regular_folder(path: str) -> Path:
    """Returns the PEFT folder that a path names, after a check that its files are regular files.

    The type of a file is checked before the file is opened, because reading a FIFO or a device may
    block or never end.

    Raises:
      UserError: a file is not regular.
    """
    try:
        folder = adapter_folder(path)
    except RuntimeError:  # raised by pathlib for ~NAME
        raise UserError(f"{path}: no such user here; give the folder's whole path") from None
    for name in (CONFIG, WEIGHTS):
        _check_regular(folder / name)
    return folder


def _check_regular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return  # the reader of the file reports this
    except OSError as e:
        raise paths.unreadable(path, e) from None
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "something else")
        raise UserError(f"{path}: {kind} and no regular file; give the folder of an adapter")

"""Reads untrusted JSON in limited time and memory, and computes digests of JSON values."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError

MOST = 2**28
"""Maximum size of a JSON file, in bytes."""


def parse(text: str | bytes | bytearray) -> Any:
    """Parses JSON.

    Raises:
      json.JSONDecodeError: the text is not JSON, is nested too deeply, or has a number with too
        many digits.
      UnicodeDecodeError: the bytes are not text.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None
    except ValueError:  # Python limits the digits of an int
        raise json.JSONDecodeError("a number has too many digits", "", 0) from None


def read_object(
    path: Path, remedy: str, missing: str = "no such file; correct the path"
) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
      path: path of a regular file of at most `MOST` bytes.
      remedy: remedy for a damaged file, for the error message.
      missing: error message with a remedy if the file does not exist.

    Raises:
      UserError: the file is missing, is not a regular file, is too large, or does not hold one
        JSON object.
    """
    try:
        tree = parse(_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: {missing}") from None
    except OSError as e:
        raise paths.unreadable(path, e) from None
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON ({e}); {remedy}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a JSON object; {remedy}")
    return tree


def digest(tree: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of JSON values, as hex; the order of the keys does not matter."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _bytes(path: Path) -> bytes:
    # O_NONBLOCK: opening a pipe that has no writer must not block.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a regular file; put a file there")
        if status.st_size > MOST:
            raise UserError(
                f"{path}: {status.st_size} bytes are too many for a file of settings; "
                f"at most {MOST} are read: put the right file there"
            )
        return file.read()

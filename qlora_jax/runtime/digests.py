"""Computes SHA-256 digests of arrays, to detect damaged files."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qlora_jax.runtime import json_files
from qlora_jax.runtime.mesh import to_host

DIGESTS, OWN = "digests", "sha256"
"""Keys of sealed JSON: the digests of arrays by name, and the digest of all other content."""


class Damaged(Exception):
    """An error: a file's content differs from what was written; the message names the part."""


def digest(array: jax.Array | np.ndarray) -> str:
    """Returns one line of text: the array's dtype, shape and the SHA-256 of its bytes."""
    flat = np.ascontiguousarray(to_host(array)).reshape(-1).view(np.uint8)
    return f"{array.dtype}{list(array.shape)} {hashlib.sha256(flat.data).hexdigest()}"


def seal(values: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns JSON values plus the digests of arrays by name, plus a digest of all of these."""
    sealed = {**values, DIGESTS: {name: digest(array) for name, array in arrays.items()}}
    return {**sealed, OWN: json_files.digest(sealed)}


def unseal(sealed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Splits the result of `seal` into the values and the digests of the arrays.

    The digests are None if the file has none, because earlier versions did not write them.

    Raises:
      Damaged: the JSON differs from the result of `seal`.
    """
    rest = dict(sealed)
    own = rest.pop(OWN, None)
    if own is None and DIGESTS not in rest:
        return rest, None
    if own != json_files.digest(rest):
        raise Damaged("its JSON differs from what was saved")
    return rest, rest.pop(DIGESTS)


def check(name: str, array: jax.Array | np.ndarray, expected: str) -> None:
    """Checks that an array has the expected digest.

    Raises:
      Damaged: the digests differ; the message names the array.
    """
    if expected != digest(array):
        raise Damaged(f"{name} differs from what was saved")

"""SHA-256 digests of arrays, by which damaged files are known."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qlora_jax.runtime import json_files
from qlora_jax.runtime.mesh import to_host

DIGESTS, OWN = "digests", "sha256"
"""Keys of sealed JSON: the digests of arrays by name, and that of everything else in it."""


class Damaged(Exception):
    """A file does not hold what was written; the text says which part of it."""


def digest(array: jax.Array | np.ndarray) -> str:
    """Returns an array's dtype, shape and the SHA-256 of its bytes, as one line of text."""
    flat = np.ascontiguousarray(to_host(array)).reshape(-1).view(np.uint8)
    return f"{array.dtype}{list(array.shape)} {hashlib.sha256(flat.data).hexdigest()}"


def seal(values: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns JSON values with the digests of arrays by name, and with a digest of both."""
    sealed = {**values, DIGESTS: {name: digest(array) for name, array in arrays.items()}}
    return {**sealed, OWN: json_files.digest(sealed)}


def unseal(sealed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Splits what `seal` gave into the values and the digests of the arrays.

    The digests are None where there are none: earlier versions did not write them.

    Raises:
      Damaged: it is not what was sealed.
    """
    rest = dict(sealed)
    own = rest.pop(OWN, None)
    if own is None and DIGESTS not in rest:
        return rest, None
    if own != json_files.digest(rest):
        raise Damaged("its JSON differs from what was saved")
    return rest, rest.pop(DIGESTS)


def check(name: str, array: jax.Array | np.ndarray, expected: str) -> None:
    """Compares an array with its digest.

    Raises:
      Damaged: they differ; names the array.
    """
    if expected != digest(array):
        raise Damaged(f"{name} differs from what was saved")

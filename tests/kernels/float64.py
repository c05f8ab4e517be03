"""Products in float64, and the error bound of a product in fewer bits."""

from typing import Any

import jax
import numpy as np

EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
"""The distance from 1 to the next number, by dtype."""


def to_float64(array: Any) -> np.ndarray:
    """Returns an array's values in float64."""
    return np.asarray(array).astype(np.float64)


def assert_product(y: jax.Array, left: Any, right: Any, dtype: Any) -> None:
    """Asserts that y is left @ right, accumulated in float32 and rounded once to `dtype`."""
    left, right = to_float64(left), to_float64(right)
    exact, size = left @ right, np.abs(left) @ np.abs(right)
    allowed = EPSILON[np.dtype(dtype).name] / 2 * np.abs(exact)
    allowed = allowed + left.shape[-1] * 2.0**-24 * size
    assert y.dtype == dtype
    assert np.all(np.abs(to_float64(y) - exact) <= allowed * (1 + 1e-6))

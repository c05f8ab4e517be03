"""One linear's adapter as plain arrays, whoever made it: a run, a file, or arithmetic."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

Array = np.ndarray | jax.Array


class LoraWeights(NamedTuple):
    """An adapter of one linear: x @ W becomes x @ W + scale * (x @ a) @ b.

    Attributes:
      a: [in, r].
      b: [r, out].
      alpha: the alpha from which `scale` is computed.
      scale: the factor, a function of alpha and r (`spec.SCALINGS`).
      magnitude: DoRA's m [out], or None.
    """

    a: Array
    b: Array
    alpha: float
    scale: float
    magnitude: Array | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out) of the linear."""
        return self.a.shape[0], self.b.shape[1]


LoraSet = Mapping[str, LoraWeights]
"""The adapters of a model, by Hugging Face module path, such as model.layers.0.mlp.up_proj."""


class Misfit(NamedTuple):
    """A linear that an adapter has and a model lacks, or has in another shape.

    Attributes:
      path: the path of the linear.
      adapter: (in, out) in the adapter.
      model: (in, out) in the model; None where the model lacks the linear.
    """

    path: str
    adapter: tuple[int, int]
    model: tuple[int, int] | None


def misfits(adapters: LoraSet, linears: Mapping[str, tuple[int, int]]) -> Iterator[Misfit]:
    """Yields what of a set of adapters does not fit a model.

    Args:
      adapters: the set.
      linears: the model's module paths to (in, out).
    """
    for path, weights in adapters.items():
        found = linears.get(path)
        model = None if found is None else (found[0], found[1])
        if weights.shape != model:
            yield Misfit(path, weights.shape, model)


def largest_rank(adapters: LoraSet) -> int:
    """Returns the largest rank in a set; 0 if it is empty."""
    return max((weights.rank for weights in adapters.values()), default=0)

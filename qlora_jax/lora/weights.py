"""Adapters as plain arrays; the common form of adapters from runs, files and arithmetic."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

Array = np.ndarray | jax.Array


class LoraWeights(NamedTuple):
    """The adapter of one linear: y = x @ W + scale * (x @ a) @ b.

    Attributes:
      a: A, [in, r].
      b: B, [r, out].
      alpha: the alpha from which `scale` is computed.
      scale: factor on the product, computed from alpha and r (`spec.SCALINGS`).
      magnitude: m of DoRA, [out]; None without DoRA.
    """

    a: Array
    b: Array
    alpha: float
    scale: float
    magnitude: Array | None = None

    @property
    def rank(self) -> int:
        """Rank r of A and B."""
        return self.a.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the linear, (in, out)."""
        return self.a.shape[0], self.b.shape[1]


LoraSet = Mapping[str, LoraWeights]
"""The adapters of a model, by Hugging Face module path, such as model.layers.0.mlp.up_proj."""


class Misfit(NamedTuple):
    """A linear of an adapter that the model lacks, or that has another shape in the model.

    Attributes:
      path: path of the linear.
      adapter: shape (in, out) in the adapter.
      model: shape (in, out) in the model; None if the model lacks the linear.
    """

    path: str
    adapter: tuple[int, int]
    model: tuple[int, int] | None


def misfits(adapters: LoraSet, linears: Mapping[str, tuple[int, int]]) -> Iterator[Misfit]:
    """Yields the adapters that do not fit a model.

    Args:
      adapters: adapters by path.
      linears: linears of the model, module path to (in, out).
    """
    for path, weights in adapters.items():
        found = linears.get(path)
        model = None if found is None else (found[0], found[1])
        if weights.shape != model:
            yield Misfit(path, weights.shape, model)


def largest_rank(adapters: LoraSet) -> int:
    """Returns the largest rank in a set of adapters; 0 if the set is empty."""
    return max((weights.rank for weights in adapters.values()), default=0)

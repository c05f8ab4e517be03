"""Sums and differences of adapters, as task arithmetic has them (arXiv 2212.04089)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qlora_jax.lora.spec import SCALINGS
from qlora_jax.lora.weights import LoraSet, LoraWeights


class Truncated(NamedTuple):
    """An adapter of a smaller rank, and what it lacks.

    Attributes:
      adapters: the weights of the smaller rank, by path.
      error: |exact - truncated| / |exact| over all linears, Frobenius norm; 0 where exact is 0.
      worst: the linear with the largest such error of its own, and that error.
    """

    adapters: dict[str, LoraWeights]
    error: float
    worst: tuple[str, float]


def combine(terms: Sequence[tuple[float, LoraSet]]) -> dict[str, LoraWeights]:
    """The weighted sum of adapters, exactly: A and B side by side, so that ranks add up.

    Args:
      terms: weight and adapter; a negative weight subtracts. Adapters may have linears that
        others lack.

    Returns:
      Float32 adapters of scale 1. An adapter with itself subtracted is zero in effect, not in rank.
    """
    paths = dict.fromkeys(path for _, adapters in terms for path in adapters)
    return {
        path: _joined([(w, adapters[path]) for w, adapters in terms if path in adapters])
        for path in paths
    }


def _joined(terms: Sequence[tuple[float, LoraWeights]]) -> LoraWeights:
    a = np.concatenate([own.a for _, own in terms], axis=1)
    b = np.concatenate([own.b * np.float32(w * own.scale) for w, own in terms])
    return _of_scale_1(a, b)


def _of_scale_1(a: np.ndarray, b: np.ndarray) -> LoraWeights:
    return LoraWeights(a.astype(np.float32), b.astype(np.float32), alpha=1.0, scale=1.0)


def difference(now: LoraWeights, start: LoraWeights, scaling: str) -> LoraWeights:
    """Returns the adapter of twice the rank that changes W by what `now` does less `start`.

    Args:
      now: the adapter; its magnitude stays.
      start: the adapter to subtract, of the same rank and alpha.
      scaling: a key of `SCALINGS`, by which both have their scale.

    Raises:
      ValueError: unlike rank or alpha.
    """
    if (now.rank, now.alpha) != (start.rank, start.alpha):
        raise ValueError("adapters of unlike rank or alpha")
    a = np.concatenate([now.a, start.a], axis=1)
    b = np.concatenate([now.b, -start.b])
    growth = 1 / SCALINGS[scaling](1.0, 2)  # of alpha, so that the scale stays
    return LoraWeights(a, b, now.alpha * growth, now.scale, now.magnitude)


def truncate(adapters: LoraSet, rank: int) -> Truncated:
    """The nearest adapter of at most this rank, by the singular values of each linear's update.

    Nearest in Frobenius norm (Eckart and Young). The matrix [in, out] is never formed: of
    A = Qa Ra and Bᵀ = Qb Rb, the small Ra Rbᵀ has the same singular values.

    Args:
      adapters: the exact ones.
      rank: of every linear whose own is above it; the others stay as they are.
    """
    kept, errors, totals = {}, {}, {}
    for path, own in adapters.items():
        qa, ra = np.linalg.qr(own.a.astype(np.float64))
        qb, rb = np.linalg.qr(own.b.astype(np.float64).T * own.scale)
        u, s, vt = np.linalg.svd(ra @ rb.T, full_matrices=False)
        root = np.sqrt(s[:rank])
        shorter = _of_scale_1((qa @ u[:, :rank]) * root, ((qb @ vt[:rank].T) * root).T)
        short = own.rank <= rank
        kept[path] = own if short else shorter
        errors[path] = 0.0 if short else float((s[rank:] ** 2).sum())
        totals[path] = float((s**2).sum())
    shares = {path: _share(errors[path], totals[path]) for path in adapters}
    worst = max(shares, key=lambda path: shares[path])
    whole = _share(sum(errors.values()), sum(totals.values()))
    return Truncated(kept, whole, (worst, shares[worst]))


def _share(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0

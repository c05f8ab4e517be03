"""Sums and differences of adapters, as task arithmetic has them (arXiv 2212.04089)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qlora_jax.lora.update import Update, Updates


class Truncated(NamedTuple):
    """An adapter of a smaller rank, and what it lacks.

    Attributes:
      updates: the adapter.
      error: |exact - truncated| / |exact| over all linears, Frobenius norm; 0 where exact is 0.
      worst: the linear with the largest such error of its own, and that error.
    """

    updates: dict[str, Update]
    error: float
    worst: tuple[str, float]


def combine(terms: Sequence[tuple[float, Updates]]) -> dict[str, Update]:
    """The weighted sum of adapters, exactly: A and B side by side, so that ranks add up.

    Args:
      terms: weight and adapter; a negative weight subtracts. Adapters may have linears that
        others lack.

    Returns:
      Float32 updates of scale 1. An adapter with itself subtracted is zero in effect, not in rank.
    """
    paths = dict.fromkeys(path for _, updates in terms for path in updates)
    return {
        path: _joined([(w, updates[path]) for w, updates in terms if path in updates])
        for path in paths
    }


def _joined(terms: Sequence[tuple[float, Update]]) -> Update:
    a = np.concatenate([update.a for _, update in terms], axis=1)
    b = np.concatenate([update.b * np.float32(w * update.scale) for w, update in terms])
    return Update(a.astype(np.float32), b.astype(np.float32), 1.0)


def truncate(updates: Updates, rank: int) -> Truncated:
    """The nearest adapter of at most this rank, by the singular values of each linear's update.

    Nearest in Frobenius norm (Eckart and Young). The matrix [in, out] is never formed: of
    A = Qa Ra and Bᵀ = Qb Rb, the small Ra Rbᵀ has the same singular values.

    Args:
      updates: the exact adapter.
      rank: of every linear whose own is above it; the others stay as they are.
    """
    kept, errors, totals = {}, {}, {}
    for path, update in updates.items():
        qa, ra = np.linalg.qr(update.a.astype(np.float64))
        qb, rb = np.linalg.qr(update.b.astype(np.float64).T * update.scale)
        u, s, vt = np.linalg.svd(ra @ rb.T, full_matrices=False)
        root = np.sqrt(s[:rank])
        shorter = Update(
            ((qa @ u[:, :rank]) * root).astype(np.float32),
            ((qb @ vt[:rank].T) * root).T.astype(np.float32),
            1.0,
        )
        short = update.a.shape[1] <= rank
        kept[path] = update if short else shorter
        errors[path] = 0.0 if short else float((s[rank:] ** 2).sum())
        totals[path] = float((s**2).sum())
    own = {path: _share(errors[path], totals[path]) for path in updates}
    worst = max(own, key=lambda path: own[path])
    return Truncated(kept, _share(sum(errors.values()), sum(totals.values())), (worst, own[worst]))


def _share(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0

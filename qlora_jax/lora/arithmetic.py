"""Sums, differences and rank truncation of adapters, for task arithmetic (arXiv 2212.04089)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qlora_jax.lora.spec import SCALINGS
from qlora_jax.lora.weights import LoraSet, LoraWeights


class Truncated(NamedTuple):
    """Adapters of a smaller rank, and their error.

    Attributes:
      adapters: truncated adapters by path.
      error: ‖exact - truncated‖ / ‖exact‖ over all linears, in the Frobenius norm; 0 if exact is 0.
      worst: path of the linear with the largest error of this kind, and its error.
    """

    adapters: dict[str, LoraWeights]
    error: float
    worst: tuple[str, float]


def combine(terms: Sequence[tuple[float, LoraSet]]) -> dict[str, LoraWeights]:
    """Returns the exact weighted sum of adapters.

    For terms w_i * scale_i * A_i @ B_i of one linear, the sum is A @ B with A = [A_1, A_2, ...] and
    B = [w_1 * scale_1 * B_1; w_2 * scale_2 * B_2; ...]. So the ranks add up.

    Args:
      terms: pairs of a weight and a set of adapters; a negative weight subtracts. A set may lack
        linears that another set has.

    Returns:
      Adapters in float32 with scale 1. An adapter minus itself has an update of zero, but twice the
      rank.
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


def adapter_difference(now: LoraWeights, start: LoraWeights, scaling: str) -> LoraWeights:
    """Returns the adapter of twice the rank with the update of `now` minus the update of `start`.

    scale * [A_now, A_start] @ [B_now; -B_start] = scale * (A_now @ B_now - A_start @ B_start)

    Args:
      now: adapter to subtract from; the result has its magnitude.
      start: adapter to subtract, of the same rank and alpha.
      scaling: key of `SCALINGS` from which both adapters have their scale.

    Raises:
      ValueError: the two adapters differ in rank or alpha.
    """
    if (now.rank, now.alpha) != (start.rank, start.alpha):
        raise ValueError("the two adapters differ in rank or alpha")
    a = np.concatenate([now.a, start.a], axis=1)
    b = np.concatenate([now.b, -start.b])
    growth = 1 / SCALINGS[scaling](1.0, 2)  # factor on alpha that keeps the scale at twice the rank
    return LoraWeights(a, b, now.alpha * growth, now.scale, now.magnitude)


def truncate(adapters: LoraSet, rank: int) -> Truncated:
    """Returns the adapters of at most this rank that are nearest in the Frobenius norm.

    For each linear this is the truncated SVD of the update (Eckart and Young). The matrix [in, out]
    is never formed: with A = Qa Ra and scale * Bᵀ = Qb Rb (QR), scale * A @ B has the singular
    values of the small matrix Ra Rbᵀ.

    Args:
      adapters: exact adapters.
      rank: largest rank of the result; adapters of this rank or less are returned unchanged.
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

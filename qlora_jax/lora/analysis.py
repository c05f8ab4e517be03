"""Analysis of a weight update (LoRA, section 7): singular values, subspaces, amplification.

Weights are [in, out], A is [in, r], B is [r, out]. All results are computed in float64 with numpy.
"""

import dataclasses

import numpy as np


def subspace_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Measures how far the leading column directions of two matrices coincide.

    phi(i, j) = ‖U_i(a)ᵀ U_j(b)‖²_F / min(i, j)          (LoRA, section 7.2, equation 4)

    U_i holds the first i left singular vectors. phi is 1 if one of the two spans contains the
    other, and 0 if they are orthogonal. In the paper A is [r, in], so it takes the right singular
    vectors.

    Args:
      a: first matrix, [in, r]; in the paper both are A matrices of trained adapters.
      b: second matrix, [in, s].

    Returns:
      float64[min(in, r), min(in, s)]; entry [i - 1, j - 1] is phi(i, j).
    """
    overlaps = (_directions(a).T @ _directions(b)) ** 2
    sums = overlaps.cumsum(axis=0).cumsum(axis=1)
    i, j = np.indices(sums.shape) + 1
    return sums / np.minimum(i, j)


def singular_values(update: np.ndarray) -> np.ndarray:
    """Returns the singular values of ΔW [in, out], largest first."""
    return np.linalg.svd(update.astype(np.float64), compute_uv=False)


def rank_of_energy(values: np.ndarray, share: float) -> int:
    """Returns the fewest singular values whose squares reach `share` of the sum of all squares."""
    energy = np.cumsum(np.square(values.astype(np.float64)))
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12)) + 1)


@dataclasses.dataclass(frozen=True)
class Amplification:
    """Norms that relate an update ΔW to its weight W (LoRA, section 7.3, Table 7).

    Attributes:
      within_update: ‖Uᵀ W V‖_F, with U and V the first r singular directions of ΔW.
      within_weight: ‖Uᵀ W V‖_F with the directions of W; no other r directions give more.
      within_random: ‖Uᵀ W V‖_F with the directions of a random matrix.
      weight: ‖W‖_F.
      update: ‖ΔW‖_F.
      factor: amplification factor, ‖ΔW‖_F / within_update.
    """

    within_update: float
    within_weight: float
    within_random: float
    weight: float
    update: float

    @property
    def factor(self) -> float:
        """Amplification factor, ‖ΔW‖_F / ‖Uᵀ W V‖_F."""
        return self.update / self.within_update


def amplification(
    weight: np.ndarray, update: np.ndarray, rank: int, seed: int = 0
) -> Amplification:
    """Projects W onto the directions of ΔW, of W itself and of a random matrix.

    Args:
      weight: W [in, out].
      update: ΔW [in, out].
      rank: number r of directions.
      seed: seed of the random matrix.
    """
    weight, update = weight.astype(np.float64), update.astype(np.float64)
    noise = np.random.default_rng(seed).normal(size=weight.shape)

    def within(directions_of: np.ndarray) -> float:
        u, _, vh = np.linalg.svd(directions_of, full_matrices=False)
        return float(np.linalg.norm(u[:, :rank].T @ weight @ vh[:rank].T))

    return Amplification(
        within_update=within(update),
        within_weight=within(weight),
        within_random=within(noise),
        weight=float(np.linalg.norm(weight)),
        update=float(np.linalg.norm(update)),
    )


def _directions(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix.astype(np.float64), full_matrices=False)[0]

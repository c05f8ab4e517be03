import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.lora.analysis import (
    amplification,
    rank_of_energy,
    singular_values,
    subspace_similarity,
)


def orthogonal(seed: int, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), r=st.integers(1, 6), s=st.integers(1, 6))
def test_similarity_is_the_papers_equation(seed, r, s):
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(12, r)), random.normal(size=(12, s))
    got = subspace_similarity(a, b)
    u, v = np.linalg.svd(a)[0], np.linalg.svd(b)[0]
    for i in range(1, r + 1):
        for j in range(1, s + 1):
            direct = np.linalg.norm(u[:, :i].T @ v[:, :j], "fro") ** 2 / min(i, j)
            assert got[i - 1, j - 1] == pytest.approx(direct)
    assert got.min() >= -1e-12
    assert got.max() <= 1 + 1e-12


def test_a_space_lies_within_itself_and_apart_from_its_complement():
    q = orthogonal(0, 10, 8)
    a, b = q[:, :4] * [4, 3, 2, 1], q[:, 4:] * [4, 3, 2, 1]
    np.testing.assert_allclose(np.diag(subspace_similarity(a, a)), 1)
    np.testing.assert_allclose(subspace_similarity(a, a), 1)
    np.testing.assert_allclose(subspace_similarity(a, b), 0, atol=1e-12)


def test_random_spaces_overlap_by_their_share_of_the_dimensions():
    # random i- and j-dimensional subspaces of R^n: expected similarity i·j / (n·min(i, j))
    random = np.random.default_rng(0)
    mean = np.mean(
        [
            subspace_similarity(random.normal(size=(64, 8)), random.normal(size=(64, 4)))[7, 3]
            for _ in range(200)
        ]
    )
    assert mean == pytest.approx(8 * 4 / (64 * 4), abs=0.01)


def test_rank_of_energy():
    values = singular_values(np.diag([3.0, 2.0, 1.0]))
    np.testing.assert_allclose(values, [3, 2, 1])
    assert rank_of_energy(values, 9 / 14) == 1
    assert rank_of_energy(values, 9 / 14 + 0.01) == 2
    assert rank_of_energy(values, 1.0) == 3


def test_amplification_of_directions_that_the_weight_has_and_has_not():
    u, v = orthogonal(1, 8, 8), orthogonal(2, 6, 6)
    weight = u[:, :2] @ np.diag([5.0, 4.0]) @ v[:, :2].T
    along = amplification(weight, 0.1 * weight, 2)
    assert along.within_update == pytest.approx(np.hypot(5, 4))
    assert along.within_update == pytest.approx(along.within_weight)
    assert along.factor == pytest.approx(0.1)
    mixed = u[:, [0, 3]] @ np.diag([1.0, 1.0]) @ v[:, [0, 3]].T
    assert amplification(weight, mixed, 2).within_update == pytest.approx(5)
    assert amplification(weight, mixed, 2).within_random < along.within_weight

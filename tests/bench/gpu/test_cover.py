"""Tests pairwise covering and the list of cases that a GPU checks."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.bench.gpu import products
from qlora_jax.bench.gpu.cover import pairwise
from qlora_jax.bench.gpu.lane import FULL, REHEARSAL
from qlora_jax.kernels.select import FUSED

FACTORS = st.dictionaries(
    st.sampled_from("abcdef"),
    st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
    min_size=2,
)


@given(FACTORS)
def test_every_pair_is_covered(factors: dict[str, list[int]]) -> None:
    cases = pairwise(factors)
    for a, b in itertools.combinations(factors, 2):
        wanted = set(itertools.product(factors[a], factors[b]))
        assert {(case[a], case[b]) for case in cases} == wanted
    assert len(cases) <= len(list(itertools.product(*factors.values())))


def test_a_pair_that_is_not_allowed_is_left_out() -> None:
    factors = {"a": (1, 2), "b": (1, 2), "c": (1, 2)}
    cases = pairwise(factors, lambda case: not (case["a"] == 2 and case["b"] == 2))
    pairs = {(case["a"], case["b"]) for case in cases}
    assert pairs == {(1, 1), (1, 2), (2, 1)}
    assert {(case["b"], case["c"]) for case in cases} == {(1, 1), (1, 2), (2, 1), (2, 2)}


@pytest.mark.parametrize("scale", [FULL, REHEARSAL])
def test_the_cases_of_all_implementations(scale: str) -> None:
    found = [case for name in products.IMPLEMENTATIONS for case in products.cases(scale, name)]
    assert len(found) <= products.MOST
    assert len({case.name for case in found}) == len(found)
    for name in products.IMPLEMENTATIONS:
        own = [case for case in found if case.implementation == name]
        plain = name == products.PLAIN
        rows = (products.FEWER if plain else products.FACTORS)[scale]["rows"]
        wanted = set(itertools.product(("forward", "backward"), rows))
        assert {(case.direction, case.rows) for case in own} >= wanted
        assert plain or products.LARGE[scale] in {case.shape for case in own}
        assert {case.dtype for case in own} == set(products.DTYPES[name])


def test_each_fused_kernel_is_checked_in_every_dtype_it_takes() -> None:
    assert all(products.DTYPES[name] == fused.dtypes for name, fused in FUSED.items())
    assert {1, 3, 16, 33, 64, 512, 2049} == set(products.FACTORS[FULL]["rows"])

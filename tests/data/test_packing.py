import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.encode import Example
from qlora_jax.data.packing import bucket_lengths, fill, pack


def example(*ids, target=None):
    marks = [False] + [True] * (len(ids) - 1) if target is None else target
    return Example(np.array(ids, np.int32), np.array(marks, np.bool_))


@st.composite
def problems(draw):
    capacity = draw(st.integers(1, 40))
    lengths = draw(st.lists(st.integers(1, capacity), max_size=60))
    return lengths, capacity, draw(st.permutations(range(len(lengths))))


@given(problems())
def test_every_example_is_in_one_row_that_holds_it(problem):
    lengths, capacity, order = problem
    rows = pack(lengths, capacity, order)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= capacity for row in rows)


@given(problems())
def test_no_two_rows_could_be_one(problem):
    """No two rows fit in one: the first example of a row did not fit in any earlier row."""
    lengths, capacity, order = problem
    rows = pack(lengths, capacity, order)
    totals = [sum(lengths[i] for i in row) for row in rows]
    assert all(a + b > capacity for i, a in enumerate(totals) for b in totals[i + 1 :])


def test_best_fit_picks_the_fullest_row_with_room():
    # After three examples the rows hold 6, 7 and 8 of 10; then 2 joins 8, 3 joins 7, 4 joins 6.
    assert pack([6, 7, 8, 2, 3, 4], 10, range(6)) == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize("mean", [32, 64, 128])
def test_rows_are_nearly_full(mean):
    rng = np.random.default_rng(mean)
    lengths = np.clip(rng.exponential(mean, 20_000).astype(int), 1, 512).tolist()
    rows = pack(lengths, 512, rng.permutation(len(lengths)).tolist())
    assert sum(lengths) / (512 * len(rows)) > 0.95


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="example 0 takes 5 positions"):
        pack([5], 4, [0])


def test_fill_by_hand():
    examples = [example(5, 6, 7), example(8, 9, 10, 11, target=[False, False, True, True])]
    out = fill([[1, 0], [0]], examples, 6, 3, pad_id=1)
    expected = {
        "tokens": [[8, 9, 10, 5, 6, 1], [5, 6, 1, 1, 1, 1], [1] * 6],
        "targets": [[9, 10, 11, 6, 7, 1], [6, 7, 1, 1, 1, 1], [1] * 6],
        "mask": [[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0] * 6],
        "segments": [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0], [0] * 6],
        "positions": [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6],
    }
    assert {k: v.astype(int).tolist() for k, v in out.items()} == expected
    dtypes = {k: v.dtype for k, v in out.items()}
    assert dtypes.pop("mask") == np.bool_
    assert set(dtypes.values()) == {np.dtype(np.int32)}


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [(512, [64, 128, 256, 512]), (100, [13, 25, 50, 100]), (3, [1, 2, 3]), (1, [1])],
)
def test_bucket_lengths(capacity, expected):
    assert bucket_lengths(capacity) == expected

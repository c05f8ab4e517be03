import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.evaluate.rouge import rouge_l


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004, section 3.1
        ("the gunman kill police", "police killed the gunman", 1 / 2),
        ("Copies a Tree.", "copies a tree", 1.0),
        ("a b", "a x b y", 2 / 3),
        ("nothing", "shared", 0.0),
        ("", "", 0.0),
        ("", "word", 0.0),
    ],
)
def test_known_scores(answer, reference, score):
    assert rouge_l(answer, reference) == pytest.approx(score)


@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_it_is_the_textbooks_recursion(a, b):
    @functools.cache
    def longest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    expected = 2 * longest(0, 0) / (len(a) + len(b)) if longest(0, 0) else 0.0
    assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)

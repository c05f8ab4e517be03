import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.lora.arithmetic import combine, truncate
from qlora_jax.lora.weights import LoraWeights

PATHS = ["p", "q"]


def effect(update):
    """Returns the change of the weight, scale * A @ B, in float64."""
    return update.scale * update.a.astype(np.float64) @ update.b.astype(np.float64)


def adapter(seed, rank, scale, paths=PATHS, k=20, n=14):
    random = np.random.default_rng(seed)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    return {path: LoraWeights(draw(k, rank), draw(rank, n), 1.0, scale) for path in paths}


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.floats(-3, 3), st.integers(1, 5), st.floats(0.1, 4), st.sampled_from([PATHS, ["p"]])
        ),
        min_size=1,
        max_size=4,
    )
)
def test_the_sum_is_the_sum_of_effects_and_ranks_add_up(parts):
    terms = [(w, adapter(i, r, s, paths)) for i, (w, r, s, paths) in enumerate(parts)]
    total = combine(terms)
    for path, update in total.items():
        own = [(w, u[path]) for w, u in terms if path in u]
        close(effect(update), sum(w * effect(u) for w, u in own))
        assert update.a.shape[1] == sum(u.a.shape[1] for _, u in own)
    assert set(total) == {p for _, u in terms for p in u}


def test_an_adapter_minus_itself_is_nothing():
    one = adapter(0, 4, 2.0)
    zero = combine([(1.0, one), (-1.0, one)])
    for path in PATHS:
        close(effect(zero[path]), np.zeros((20, 14)))
    assert truncate(zero, 3).adapters["p"].a.shape == (20, 3)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_truncation_is_the_best_of_its_rank(rank):
    """Compares with the truncated SVD of the whole matrix in float64."""
    exact = combine([(0.7, adapter(1, 3, 1.5)), (-1.2, adapter(2, 4, 0.5))])
    short = truncate(exact, rank)
    errors, totals = [], []
    for path, update in exact.items():
        u, s, vt = np.linalg.svd(effect(update))
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        close(effect(short.adapters[path]), best)
        assert short.adapters[path].a.shape[1] == rank
        errors.append((s[rank:] ** 2).sum())
        totals.append((s**2).sum())
    assert short.error == pytest.approx(np.sqrt(sum(errors) / sum(totals)), rel=1e-5)
    own = np.sqrt(np.array(errors) / totals)
    assert short.worst == (PATHS[int(own.argmax())], pytest.approx(own.max(), rel=1e-5))


def test_a_sum_with_itself_keeps_its_rank_without_loss():
    one = adapter(3, 4, 2.0)
    short = truncate(combine([(1.0, one), (0.5, one)]), 4)
    assert short.error < 1e-6
    for path in PATHS:
        close(effect(short.adapters[path]), 1.5 * effect(one[path]))


def test_what_fits_already_stays_as_it_is():
    one = adapter(3, 4, 2.0)
    short = truncate(one, 4)
    assert short.adapters["p"] is one["p"]
    assert short.error == short.worst[1] == 0

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models.visible import in_segments, up_to


@pytest.mark.parametrize("window", [None, 1, 3])
def test_a_token_sees_its_own_segment_up_to_itself_and_within_the_window(window):
    segments = np.array([[1, 1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2, 2]])
    keys = in_segments(jnp.asarray(segments))
    keys = keys if window is None else keys.within(jnp.int32(window))
    for row, token in np.ndindex(segments.shape):
        start = next(i for i in range(7) if segments[row, i] == segments[row, token])
        first = start if window is None else max(start, token - window + 1)
        assert (keys.first[row, token], keys.last[row, token]) == (first, token)


def test_a_segment_that_another_one_of_the_same_number_follows_later_is_its_own():
    keys = in_segments(jnp.array([[1, 1, 0, 1, 1]]))
    assert keys.first.tolist() == [[0, 0, 2, 3, 3]]


def test_a_cached_token_sees_all_slots_up_to_its_own():
    keys = up_to(jnp.array([[4, 5]]))
    assert (keys.first.tolist(), keys.last.tolist()) == ([[0, 0]], [[4, 5]])
    assert keys.within(jnp.int32(2)).first.tolist() == [[3, 4]]

"""Positions and masks, held against their definitions element by element."""

import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.models.masks import default_positions, reaches, same_segment

pytestmark = pytest.mark.usefixtures("compile_quickly")


def test_positions_count_real_tokens_on_either_side_of_padding():
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    positions = default_positions(3, 5, attention_mask=mask)
    np.testing.assert_array_equal(positions, [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 1, 2, 3, 4]])


def test_positions_restart_with_every_segment():
    segments = jnp.array([[3, 3, 7, 7, 7, 1, 0, 0]], jnp.int32)
    positions = default_positions(1, 8, segment_ids=segments)
    np.testing.assert_array_equal(positions, [[0, 1, 0, 1, 2, 0, 0, 1]])


def test_positions_continue_those_in_the_cache():
    past = jnp.array([4, 9], jnp.int32)
    np.testing.assert_array_equal(default_positions(2, 2, past=past), [[4, 5], [9, 10]])
    mask = jnp.array([[1, 1], [0, 1]])
    positions = default_positions(2, 2, attention_mask=mask, past=past)
    np.testing.assert_array_equal(positions, [[4, 5], [9, 9]])


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("offset", [0, 4])
def test_a_query_reaches_the_past_within_its_window(window, offset):
    queries = jnp.arange(5, dtype=jnp.int32) + offset
    keys = jnp.arange(9, dtype=jnp.int32)
    seen = np.asarray(reaches(queries, keys, window=window))[0, 0]
    for row, i in enumerate(np.asarray(queries)):
        for j in range(9):
            assert seen[row, j] == (j <= i and (window is None or j > i - window))


def test_only_equal_segments_see_each_other():
    segments = jnp.array([[1, 1, 2, 0]], jnp.int32)
    seen = np.asarray(same_segment(segments, segments))[0, 0]
    np.testing.assert_array_equal(seen, np.equal.outer([1, 1, 2, 0], [1, 1, 2, 0]))

"""Masks by hand, and what they are not made of."""

import jax.numpy as jnp
import numpy as np
import pytest

import mqa_jax


def test_masks_by_hand():
    query, key = jnp.array([[2, 3]]), jnp.array([[0, 1, 2, 3, -1]])
    causal = mqa_jax.causal_mask(query, key)
    np.testing.assert_array_equal(causal, [[[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]]])
    local = mqa_jax.causal_mask(query, key, 2)
    np.testing.assert_array_equal(local, [[[[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]]])
    segments = mqa_jax.segment_mask(jnp.array([[1, 2, 0]]), jnp.array([[1, 1, 2, 0]]))
    np.testing.assert_array_equal(segments, [[[[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]]])
    padding = mqa_jax.padding_mask(np.array([2, 0]), 3)
    np.testing.assert_array_equal(padding, [[[[1, 1, 0]]], [[[0, 0, 0]]]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mqa_jax.causal_mask([[0]], [[0]], window=0), "window must be at least 1, not 0"),
        (lambda: mqa_jax.causal_mask([[0]], [[0]], window=2.5), "window must be an integer, not 2"),
        (lambda: mqa_jax.causal_mask([0], [[0]]), r"query_positions_BT .* \[B, T\], not \[1\]"),
        (lambda: mqa_jax.causal_mask([[0]], [[0.5]]), "key_positions_BS must be integers, not fl"),
        (lambda: mqa_jax.segment_mask([[0.5]], [[0]]), "query_segment_ids_BT must be integers"),
        (lambda: mqa_jax.padding_mask([1.5], 3), "lengths_B must be integers, not float64"),
        (lambda: mqa_jax.padding_mask(2, 3), r"lengths_B must have shape \[B\], not \[\]"),
        (lambda: mqa_jax.padding_mask([2, 4], 3), r"lengths_B=\[2, 4\], but each row has 3 tokens"),
        (lambda: mqa_jax.padding_mask([-1], 3), r"lengths_B=\[-1\]"),
        (lambda: mqa_jax.padding_mask([0], -1), "length must be at least 0, not -1"),
        (lambda: mqa_jax.padding_mask([0], 2.0), "length must be an integer, not 2.0"),
    ],
)
def test_misuse_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unsigned_positions_do_not_wrap_around():
    positions = np.arange(4, dtype=np.uint8)[None]
    mask = mqa_jax.causal_mask(positions, positions, window=3)
    np.testing.assert_array_equal(mask, mqa_jax.causal_mask(*[np.arange(4)[None]] * 2, window=3))
    assert mask[0, 0, 0, 0]

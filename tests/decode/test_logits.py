"""The rules on logits, against the same in float64.

B batch   V vocabulary
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from toy_models import property_test

from mqa_jax.decode.logits import keep_probable, scaled


def kept(logits_V, top_k, top_p):
    """The ids that are kept, in float64, one by one; None where rounding decides."""
    best = sorted(range(len(logits_V)), key=lambda id: (-logits_V[id], id))[:top_k]
    if top_p is None:
        return set(best)
    weights = np.exp(np.array([logits_V[id] for id in best]) - logits_V[best[0]])
    reached = np.cumsum(weights / weights.sum()) - top_p
    if np.any((np.abs(reached) > 1e-9) & (np.abs(reached) < 1e-5)):
        return None
    return set(best[: 1 + int(np.argmax(reached > -1e-9))])


numbers = st.integers(-9, 9) | st.just(-np.inf)


@given(
    st.lists(numbers, min_size=1, max_size=9).filter(lambda logits: max(logits) > -np.inf),
    st.none() | st.integers(1, 11),
    st.none() | st.floats(1e-9, 1.0) | st.sampled_from([0.25, 0.5, 0.75]),
)
@property_test(100)
def test_as_many_are_kept_as_top_k_and_top_p_say(logits, top_k, top_p):
    expected = [kept(row, top_k, top_p) for row in (logits, logits[::-1])]
    assume(None not in expected)
    logits_BV = np.array([logits, logits[::-1]], np.float32)
    for row, actual, ids in zip(
        logits_BV, keep_probable(jnp.asarray(logits_BV), top_k, top_p), expected, strict=True
    ):
        is_kept = np.isin(range(len(logits)), [*ids])
        np.testing.assert_array_equal(actual, np.where(is_kept, row, -np.inf))


@pytest.mark.parametrize("vocab_size", [4, 10, 1000, 32_000])
def test_of_equals_those_with_lower_ids(vocab_size):
    logits_BV = jnp.full((2, vocab_size), 0.7)
    for tenths in (1, 3, 5, 9):
        count = max(vocab_size * tenths // 10, 1)
        expected = np.arange(vocab_size) < count
        by_number = keep_probable(logits_BV, count, None)
        np.testing.assert_array_equal(np.isfinite(by_number), [expected] * 2)
        by_mass = keep_probable(logits_BV, None, count / vocab_size)
        np.testing.assert_array_equal(np.isfinite(by_mass), [expected] * 2)


@pytest.mark.parametrize("top_p", [0.3, 0.99, 0.99999, 1 - 1e-7, 1 - 1e-9])
def test_sums_over_a_large_vocabulary(top_p):
    """Near 1 a sum of float32 from the front has lost what decides."""
    logits_V = np.random.default_rng(0).normal(scale=3.0, size=32_768).astype(np.float32)
    probability_V = np.sort(np.exp(logits_V.astype(np.float64)))[::-1]
    probability_V /= probability_V.sum()
    expected = 1 + int(np.argmax(np.cumsum(probability_V) >= top_p))
    actual = int(np.sum(np.isfinite(keep_probable(jnp.asarray(logits_V)[None], None, top_p))))
    # The next token has about one part in 10,000 of what is left out.
    assert abs(actual - expected) <= 1 + expected // 5_000


def test_a_share_for_every_row():
    logits_BV = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7)), jnp.float32)
    top_p = np.array([0.2, 1.0, 0.7])
    for column in (top_p[:, None], jnp.asarray(top_p[:, None], jnp.float32)):
        together = jax.jit(lambda p: keep_probable(logits_BV, 6, p))(column)
        for row, share in enumerate(top_p):
            alone = keep_probable(logits_BV[row : row + 1], 6, float(share))
            np.testing.assert_array_equal(together[row], alone[0])


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 0.3, 1e30, 1e300, 3e38])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e38])
def test_no_temperature_makes_infinity_or_nan(temperature, scale):
    logits_BV = jnp.array([[0.1, 0.9, -0.4, -jnp.inf, -1.0]], jnp.float32) * scale
    actual_V = scaled(logits_BV, np.float64(temperature))[0]
    assert actual_V[1] == 0 and actual_V[3] == -np.inf
    ascending = np.asarray(actual_V)[[3, 4, 2, 0, 1]]
    np.testing.assert_array_equal(ascending, np.sort(ascending))
    assert not np.any(np.isnan(ascending))


@pytest.mark.parametrize("bad", [[np.nan, 0], [np.inf, 0], [np.inf, np.nan], [-np.inf, -np.inf]])
@pytest.mark.parametrize("top_k, top_p", [(None, None), (1, None), (2, 0.5), (None, 0.9)])
def test_what_is_no_number_stays_none(bad, top_k, top_p):
    """Among what is left of such a row there is no finite logit of a token that could be drawn."""
    logits_BV = jnp.array([[*bad, bad[1]]], jnp.float32)
    actual_V = np.asarray(keep_probable(scaled(logits_BV, np.float64(0.5)), top_k, top_p)[0])
    assert not np.any(np.isfinite(actual_V))


def test_top_p_of_one_leaves_nothing_out():
    # In float32 the first two of these add up to one: the cumulated sum says nothing of the rest.
    logits_BV = jnp.array([[-1.0, 0.0, -20.0, -25.0]])
    np.testing.assert_array_equal(keep_probable(logits_BV, None, 1.0), logits_BV)

"""Products with eight bits, beside NumPy's in float64.

Array letters: B batch   K key/value heads   S slots   H head dim
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mqa_jax.attention.products import FEW_INTEGER_ROWS, query_key, weights_value

RNG = np.random.default_rng(0)
B, K, S, H = 2, 3, 11, 16
CACHE = RNG.integers(-127, 128, (B, K, S, H)).astype(np.int8)


@pytest.mark.parametrize("rows", [1, 3, FEW_INTEGER_ROWS, FEW_INTEGER_ROWS + 1])
def test_a_product_with_int8_is_as_exact_as_float32(rows):
    # Each row has a magnitude of its own, of which its products are not a hundred-thousandth wrong.
    query, weights = (
        (RNG.normal(size=(B, K, rows, n)) * 10.0 ** RNG.integers(-9, 9, (B, K, rows, 1))).astype(
            np.float32
        )
        for n in (H, S)
    )
    cases = (
        (query_key, query, np.swapaxes(CACHE, 2, 3)),
        (weights_value, weights, CACHE),
    )
    for product, x, y in cases:
        expected = x.astype(np.float64) @ y.astype(np.float64)
        found = jax.jit(product)(x, CACHE)
        assert found.dtype == jnp.float32
        bound = np.abs(x).max(-1, keepdims=True) * np.abs(y).sum(-2, keepdims=True, dtype=int)
        assert np.all(np.abs(found - expected) <= 5e-7 * bound)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_own_row(bad):
    query = RNG.normal(size=(B, K, 2, H)).astype(np.float32)
    query[0, 0], query[0, 1, 0] = 0, 1e-38
    query[1, 2, 1, 3] = bad
    found = np.array(jax.jit(query_key)(query, CACHE))
    assert not np.isfinite(found[1, 2, 1]).any() and not found[0, 0].any()
    found[1, 2, 1] = 0
    assert np.isfinite(found).all()


@pytest.mark.parametrize("rows", [2, FEW_INTEGER_ROWS + 1])
def test_a_gradient_is_that_of_the_product(rows):
    query, weights = (RNG.normal(size=(B, K, rows, n)).astype(np.float32) for n in (H, S))
    for product, x, cache in (
        (query_key, query, np.swapaxes(CACHE, 2, 3)),
        (weights_value, weights, CACHE),
    ):
        gradient = jax.grad(lambda x, product=product: jnp.sum(jnp.sin(product(x, CACHE) / 99)))(x)
        sums = x.astype(np.float64) @ cache.astype(np.float64) / 99
        expected = np.cos(sums) / 99 @ np.swapaxes(cache, 2, 3).astype(np.float64)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)

"""Random arrays, and how near two may be, as several tests want them."""

import functools

import jax.numpy as jnp
import numpy as np

# float32: a few roundings of sums of at most 11 terms. bfloat16 keeps 8 bits: weights and output
# are each rounded once (2 ** -8 relative to values of about 1), the gradients some times more.
TOLERANCE = {
    "float32": dict(rtol=1e-5, atol=1e-5),
    "bfloat16": dict(rtol=4e-2, atol=4e-2),
    "float16": dict(rtol=5e-3, atol=5e-3),
}

to_float = functools.partial(np.asarray, dtype=np.float64)


def close(actual, expected, **tolerance):
    np.testing.assert_allclose(to_float(actual), to_float(expected), equal_nan=False, **tolerance)


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def random_mask(seed, shape):
    """About half of it, and always key `t` for query `t`: blind rows have a test of their own."""
    itself = np.arange(shape[-2])[:, None] == np.arange(shape[-1])
    return (np.random.default_rng(seed).random(shape) < 0.5) | itself

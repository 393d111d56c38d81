"""Eight bits: what numbers become, and products with them, beside NumPy that does the same."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mqa_jax.core.linear import linear
from mqa_jax.core.quantized import (
    FP8,
    INT8,
    LARGEST,
    SCHEMES,
    QuantizedWeight,
    rounded,
)
from mqa_jax.model.layers import Embedding

RNG = np.random.default_rng(0)


def as_numpy(x, axis, dtype):
    """`rounded` in NumPy; float32, as what lies half way between two numbers is rounded to even."""
    x = np.asarray(x, np.float32)
    most = np.max(np.abs(x), axis=axis, keepdims=True)
    scaled = x * np.divide(LARGEST[dtype], most, out=np.zeros_like(most), where=most > 0)
    values = (np.round(scaled) if dtype == INT8 else scaled).astype(dtype)
    return np.asarray(values, np.float64), most / np.float64(LARGEST[dtype])


@pytest.mark.parametrize("dtype", LARGEST)
def test_each_number_is_as_near_as_its_scale_lets_it_be(dtype):
    x = RNG.normal(size=(64, 50)).astype(np.float32) * np.logspace(-30, 30, 64)[:, None]
    x = x.astype(np.float32)
    x[3], x[4, 7] = 0.0, 1e4 * np.max(np.abs(x[4]))  # Nothing, and one that stands out.
    x[5:7] = np.array([[1e-35], [1e-44]])  # Next to nothing.
    values, scales = rounded(jnp.asarray(x), 1, dtype)
    assert values.dtype == dtype and scales.dtype == jnp.float32 and scales.shape == (64, 1)
    kept = np.asarray(values, np.float64) * np.asarray(scales, np.float64)
    # Of int8 half a scale; of float8 a sixteenth of the number, or half of its smallest step.
    most = np.full(x.shape, 0.5) * scales
    if dtype == FP8:
        most = np.maximum(np.abs(x) / 16, 2.0**-10 * scales)
    rounding = 1e-6 * np.abs(x)
    assert np.all(np.abs(kept - x) <= most + rounding)
    assert not np.any(values[3]) and np.all(scales > 0)
    largest = np.max(np.abs(np.asarray(values, np.float32)), axis=1)
    assert np.all(np.delete(largest, [3, 5, 6]) == LARGEST[dtype])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_that_is_not_finite_spoils_itself_alone(scheme, bad):
    weight = QuantizedWeight(
        nnx.Param(jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32)), 1, scheme
    )
    x = RNG.normal(size=(3, 8)).astype(np.float32)
    whole = np.asarray(linear(jnp.asarray(x), weight[...]))
    x[1, 2] = bad
    found = np.asarray(linear(jnp.asarray(x), weight[...]))
    assert not np.isfinite(found[1]).any()
    np.testing.assert_array_equal(found[[0, 2]], whole[[0, 2]])


SHAPES = [
    # Leading axes, outputs, inputs.
    ((), (6,), (16,)),
    ((1,), (3, 8), (16,)),
    ((2, 1), (24,), (16,)),
    ((3, 5), (16,), (3, 8)),
    ((9, 8), (3, 8), (16,)),
    ((20,), (24,), (16,)),
    ((20,), (8,), (16,)),
    ((0, 4), (3,), (16,)),
]


@pytest.mark.parametrize("leading, outputs, inputs", SHAPES)
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_product_is_that_of_numpy(scheme, x_dtype, leading, outputs, inputs):
    weight = jnp.asarray(RNG.normal(size=(*outputs, *inputs)), jnp.float32)
    x = jnp.asarray(RNG.normal(size=(*leading, *inputs)), x_dtype)
    module = QuantizedWeight(nnx.Param(weight), len(inputs), scheme)
    product = jax.jit(
        functools.partial(linear, num_inputs=len(inputs)), static_argnames="output_dtype"
    )
    found = product(x, module[...], output_dtype=jnp.float32)
    assert found.shape == (*leading, *outputs) and found.dtype == jnp.float32
    dtype, rounds_rows = SCHEMES[scheme]

    def flat(array, axes):
        kept, merged = np.split(np.array(array.shape), [array.ndim - axes])
        return np.asarray(array, np.float64).reshape(*kept, math.prod(merged))

    values, scales = as_numpy(flat(weight, len(inputs)), -1, dtype)
    np.testing.assert_array_equal(flat(module.values[...], len(inputs)), values)
    np.testing.assert_allclose(module.scales[...], scales[..., 0], rtol=1e-6)
    rows, row_scales = flat(x, len(inputs)), 1.0
    if rounds_rows and rows.size:
        rows, row_scales = as_numpy(rows, -1, dtype)
    rows = rows * row_scales
    expected = np.tensordot(rows, values * scales, [[-1], [-1]])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    narrow = product(x, module[...])
    assert narrow.dtype == x_dtype
    np.testing.assert_array_equal(narrow, found.astype(x_dtype))


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_that_eight_bits_hold_exactly_are_those_weights(dtype, rows):
    """Bit for bit, as a product with kept activations is the same sum."""
    values = RNG.integers(-127, 128, (24, 16))
    values[:, 0] = 127
    scales = 2.0 ** RNG.integers(-9, 3, 24)
    weight = jnp.asarray(values * scales[:, None], dtype)
    x = jnp.asarray(RNG.normal(size=(rows, 16)), dtype)
    module = QuantizedWeight(nnx.Param(weight), 1, "int8_weights")
    np.testing.assert_array_equal(module.scales[...], scales)
    np.testing.assert_array_equal(module[...].widened(), weight)
    wide = jax.jit(linear)(x, weight)
    np.testing.assert_array_equal(jax.jit(linear)(x, module[...]), wide)


def test_a_table_of_eight_bits_is_looked_up():
    embedding = Embedding(7, 4, rngs=nnx.Rngs(0))
    table = np.asarray(embedding.table[...])
    embedding.table = QuantizedWeight(embedding.table, 1, "int8")
    found = embedding(jnp.asarray([[2, 6, 7], [-1, 0, 2]]))
    is_unknown = [[False, False, True], [True, False, False]]
    np.testing.assert_array_equal(np.isnan(found).all(-1), is_unknown)
    at = [2, 6, 0]
    half = np.max(np.abs(table[at]), axis=1, keepdims=True) / 254
    kept = np.stack([found[0, 0], found[0, 1], found[1, 1]])
    assert np.all(np.abs(kept - table[at]) <= half * 1.001)


def test_what_no_weight_is():
    weight = nnx.Param(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="scheme 'int4' is not one of int8, int8_weights, fp8"):
        QuantizedWeight(weight, 1, "int4")
    with pytest.raises(ValueError, match="not finite"):
        QuantizedWeight(nnx.Param(jnp.asarray([[1.0, np.nan]])), 1, "int8")
    with pytest.raises(ValueError, match="read whole"):
        QuantizedWeight(weight, 1, "int8")[0]
    nothing = QuantizedWeight(nnx.Param(jnp.zeros((2, 3))), 1, "int8")
    np.testing.assert_array_equal(nothing[...].widened(), np.zeros((2, 3)))
    assert np.all(nothing.scales[...] > 0)

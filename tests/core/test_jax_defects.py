"""jax 0.10.2, the last for Python 3.11, gets a product of this package wrong on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, normal, to_float

from mqa_jax.core.linear import linear


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("outputs", [2, 3])
def test_a_mapped_product_before_a_sum_is_right_in_all_rows(outputs, rows, dtype):
    """jax-ml/jax issue 39103: from 32,768 products of this size on they were those of others."""
    x_VRI = normal(0, 40_009, rows, 3, dtype=dtype)
    weight_OI = normal(1, outputs, 3, dtype=dtype)

    @jax.jit
    def sums(x_VRI):
        product = jax.vmap(lambda x: linear(x, weight_OI, output_dtype=jnp.float32))(x_VRI)
        return jnp.sum(product**2, axis=-1)

    expected = np.sum((to_float(x_VRI) @ to_float(weight_OI).T) ** 2, axis=-1)
    close(sums(x_VRI), expected, rtol=1e-4, atol=1e-4)


def test_a_product_under_many_maps_is_right():
    """jax-ml/jax issues 39257 and 40412: a product and a sum of rank 7 ended the process."""
    x = normal(0, 3, 1, 2, 2, 1, 2, 5, dtype="bfloat16")
    weight = normal(1, 3, 1, 2, 2, 7, 2, 5, dtype="bfloat16")
    product = functools.partial(linear, num_inputs=2, output_dtype=jnp.float32)
    for _ in range(4):
        product = jax.vmap(product)
    expected = np.einsum("abcdrij,abcdoij->abcdro", to_float(x), to_float(weight))
    close(jax.jit(product)(x, weight), expected, rtol=1e-4, atol=1e-4)

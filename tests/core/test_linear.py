import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mqa_jax.core.linear import FEW_ROWS, linear

TOLERANCE = {"float32": dict(rtol=1e-5, atol=1e-5), "bfloat16": dict(rtol=2e-2, atol=2e-2)}


def normal(seed, *shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape, jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("num_inputs", [1, 2])
def test_every_form_of_the_product_is_the_product(rows, num_inputs, dtype):
    inputs, outputs = ((5, 7), (11,)) if num_inputs == 2 else ((13,), (3, 2))
    x = normal(0, 1, rows, *inputs, dtype=dtype)
    weight = normal(1, *outputs, *inputs, dtype=dtype)
    got = jax.jit(lambda x, w: linear(x, w, num_inputs=num_inputs))(x, weight)
    assert got.shape == (1, rows, *outputs) and got.dtype == x.dtype
    x, weight = (np.asarray(array, np.float64) for array in (x, weight))
    expected = np.tensordot(x, weight, [range(2, 2 + num_inputs), range(-num_inputs, 0)])
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS + 1])
def test_sums_are_kept_in_the_output_dtype(rows):
    # 256 + 1, which bfloat16 does not have.
    x = jnp.broadcast_to(jnp.array([256.0, 1.0], jnp.bfloat16), (rows, 2))
    got = jax.jit(lambda x, w: linear(x, w, output_dtype=jnp.float32))(x, jnp.ones_like(x[:1]))
    np.testing.assert_array_equal(got, np.full((rows, 1), 257.0, np.float32))


@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS + 1])
def test_gradients_flow_through_every_form(rows):
    x, weight = normal(0, rows, 5), normal(1, 7, 5)
    d_x, d_weight = jax.jit(jax.grad(lambda x, w: linear(x, w).sum(), argnums=(0, 1)))(x, weight)
    np.testing.assert_allclose(d_x, np.broadcast_to(weight.sum(0), x.shape), rtol=1e-5)
    np.testing.assert_allclose(d_weight, np.broadcast_to(x.sum(0), weight.shape), rtol=1e-4)


def test_the_gradient_of_float32_logits_is_taken_in_bfloat16():
    x, weight = normal(0, FEW_ROWS + 1, 5, dtype="bfloat16"), normal(1, 7, 5, dtype="bfloat16")
    factor = normal(2, FEW_ROWS + 1, 7)

    def total(x, weight):
        return (linear(x, weight, output_dtype=jnp.float32) * factor).sum()

    gradient = jax.grad(total, argnums=(0, 1))
    products = [
        [variable.aval.dtype for variable in equation.invars]
        for equation in jax.make_jaxpr(gradient)(x, weight).eqns
        if equation.primitive.name == "dot_general"
    ]
    assert len(products) >= 3 and {dtype for each in products for dtype in each} == {x.dtype}
    d_x, d_weight = gradient(x, weight)
    assert d_x.dtype == d_weight.dtype == x.dtype
    factor, x, weight = (np.asarray(array, np.float64) for array in (factor, x, weight))
    np.testing.assert_allclose(np.float64(d_x), factor @ weight, rtol=2e-2, atol=5e-2)
    np.testing.assert_allclose(np.float64(d_weight), factor.T @ x, rtol=2e-2, atol=0.2)


def test_a_loop_reads_a_bfloat16_weight_as_it_is():
    """Nothing outside the loop makes a float32 copy of the weight."""

    def loop(x, weight):
        return jax.lax.fori_loop(0, 9, lambda _, x: linear(x, weight), x)

    x, weight = normal(0, 1, 257, dtype="bfloat16"), normal(1, 257, 257, dtype="bfloat16")
    if jax.default_backend() != "cpu":
        pytest.skip("the form is chosen for CPUs")
    entry = jax.jit(loop).lower(x, weight).compile().as_text().split("ENTRY")[1]
    assert "bf16[257,257]" in entry and "f32[257,257]" not in entry

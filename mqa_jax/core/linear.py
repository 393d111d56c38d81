"""The product of activations with a weight, in the form that is fast for one row and for many.

Weights are output-major, `[*outputs, *inputs]`: each output is then the product of one contiguous
row of the weight with a token's vector. For a training batch that is as good as the transpose. A
decode step is bound by reading the weights, and on a CPU only this order of axes, and this order of
operands, reads them as fast as the memory gives them (docs/decisions.md has the figures).

Array letters: R rows (tokens)   O outputs   I inputs
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from mqa_jax.core.quantized import INT8, Quantized, rounded

# Up to here a product is bound by reading the weight; it costs nothing to transpose the output.
FEW_ROWS = 64

# Up to here the weight comes first in a product of integers, too. Behind it the transpose of many
# outputs costs more than the order gains: of 1024 inputs on two cores, the weight first and last,
# 1024 outputs 136 and 162 us for 8 rows, 246 and 283 for 16, 269 and 219 for 32; 32,000 outputs 2.4
# and 3.1, 3.3 and 3.5, 6.3 and 4.2 ms. Of more inputs than outputs the weight stays first.
FEW_INTEGER_ROWS = 16


def linear(
    x: Array,
    weight: Array | Quantized,
    *,
    num_inputs: int = 1,
    output_dtype: DTypeLike | None = None,
) -> Array:
    """Contracts the last `num_inputs` axes of `x` with those of `weight`.

    Args:
      x: `[..., *inputs]`.
      weight: `[*outputs, *inputs]`, of the dtype of `x`; or quantized, without a gradient.
      num_inputs: how many axes are contracted.
      output_dtype: that of `x` when None; the sums are kept in it at least. Gradients are taken in
        the dtype of `x` all the same.

    Returns:
      `[..., *outputs]`.
    """
    output_dtype = jnp.dtype(output_dtype or x.dtype)
    if isinstance(weight, Quantized):
        return _scaled(x, weight, num_inputs).astype(output_dtype)
    if 0 < math.prod(x.shape[: x.ndim - num_inputs]) <= FEW_ROWS:
        return _few_rows(x, weight, num_inputs, output_dtype)
    if output_dtype == x.dtype:
        return _dot(x, weight, num_inputs, output_dtype)
    return _dot_to_other_dtype(x, weight, num_inputs, output_dtype)


def _scaled(x: Array, weight: Quantized, num_inputs: int) -> Array:
    """The product with a quantized weight, float32.

    A row that holds NaN or infinity comes out as such numbers, whatever they are rounded to.
    """
    scales = weight.scales
    if weight.rounds_rows:
        x, row_scales = rounded(x, num_inputs, weight.values.dtype)
        row_scales = row_scales.reshape(*row_scales.shape[: x.ndim - num_inputs])
        # Exact in float32 up to 2 ** 24, a thousand of the largest products.
        wide = jnp.dtype(jnp.int32 if weight.values.dtype == INT8 else jnp.float32)
        scales = jnp.multiply.outer(row_scales, scales)
    else:
        wide = jnp.dtype(jnp.float32)
    few = 0 < math.prod(x.shape[: x.ndim - num_inputs]) <= FEW_ROWS
    product = (_few_rows if few else _dot)(x, weight.values, num_inputs, wide)
    return product.astype(jnp.float32) * jnp.broadcast_to(scales, product.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dot_to_other_dtype(x: Array, weight: Array, num_inputs: int, output_dtype: jnp.dtype) -> Array:
    return _dot(x, weight, num_inputs, output_dtype)


def _dot_forward(
    x: Array, weight: Array, num_inputs: int, output_dtype: jnp.dtype
) -> tuple[Array, tuple[Array, Array]]:
    return _dot(x, weight, num_inputs, output_dtype), (x, weight)


def _dot_backward(
    num_inputs: int, output_dtype: jnp.dtype, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    # JAX would widen `x` and `weight` for products with a float32 gradient: of logits in bfloat16
    # training, twice the bytes and, on a GPU, half the speed.
    x, weight = residuals
    _, vjp = jax.vjp(lambda x, weight: _dot(x, weight, num_inputs, x.dtype), x, weight)
    return vjp(gradient.astype(x.dtype))


_dot_to_other_dtype.defvjp(_dot_forward, _dot_backward)


def _dot(x: Array, weight: Array, num_inputs: int, output_dtype: jnp.dtype) -> Array:
    x_axes, weight_axes = (range(array.ndim - num_inputs, array.ndim) for array in (x, weight))
    axes = (tuple(x_axes), tuple(weight_axes))
    # Of a quantized weight: XLA widens it on its way into the product.
    weight = weight.astype(x.dtype)
    return lax.dot_general(x, weight, (axes, ((), ())), preferred_element_type=output_dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _few_rows(x: Array, weight: Array, num_inputs: int, output_dtype: jnp.dtype) -> Array:
    on_cpu = functools.partial(_dot_on_cpu, num_inputs=num_inputs, output_dtype=output_dtype)
    elsewhere = functools.partial(_dot, num_inputs=num_inputs, output_dtype=output_dtype)
    return lax.platform_dependent(x, weight, cpu=on_cpu, default=elsewhere)


def _dot_on_cpu(x: Array, weight: Array, num_inputs: int, output_dtype: jnp.dtype) -> Array:
    leading, outputs = x.shape[: x.ndim - num_inputs], weight.shape[: weight.ndim - num_inputs]
    x_RI = x.reshape(math.prod(leading), -1)
    weight_OI = weight.reshape(math.prod(outputs), -1)
    if x.dtype == INT8:
        product_RO = _integers_on_cpu(x_RI, weight_OI)
    elif len(x_RI) > 1:
        # The barrier keeps XLA from turning the transposed product back into `x @ weight.T`, for
        # which its CPU library first copies the whole weight into another order.
        product_OR = lax.dot_general(
            weight_OI.astype(x.dtype),
            x_RI,
            (((1,), (1,)), ((), ())),
            preferred_element_type=output_dtype,
        )
        product_RO = lax.optimization_barrier(product_OR).T
    elif x.dtype == jnp.bfloat16:
        # None of XLA's matrix-vector products on a CPU reads bfloat16 at more than 2 GB/s. The
        # barrier ties the weight to the step, so that it is not widened once, before a loop.
        x_RI, weight_OI = lax.optimization_barrier((x_RI, weight_OI))
        product_RO = jnp.sum(
            weight_OI.astype(jnp.float32) * x_RI.astype(jnp.float32), axis=1
        ).astype(output_dtype)[None]
    else:
        product_RO = _dot(x_RI, weight_OI, 1, output_dtype)
    return product_RO.reshape(*leading, *outputs)


def _integers_on_cpu(x_RI: Array, weight_OI: Array) -> Array:
    """`[R, O]` int32. XLA has instructions for sums of integers, but not for those of one row."""
    rows, outputs, inputs = len(x_RI), *weight_OI.shape
    if rows > FEW_INTEGER_ROWS and outputs >= inputs:
        return _dot(x_RI, weight_OI, 1, jnp.dtype(jnp.int32))
    x_RI = jnp.pad(x_RI, ((0, max(2 - rows, 0)), (0, 0)))
    product_OR = _dot(weight_OI, x_RI, 1, jnp.dtype(jnp.int32))
    return lax.optimization_barrier(product_OR).T[:rows]

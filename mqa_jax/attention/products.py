"""The two products of attention, each in the form that is fast where it runs.

A decode step is bound by reading keys and values: what XLA copies, widens or transposes of them on
the way costs more than the products themselves.

Array letters:
  B batch   K key/value heads   R rows: all queries that ask a head   S slots   H head dim
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from mqa_jax.core.linear import FEW_ROWS
from mqa_jax.core.quantized import INT8, LARGEST, SMALLEST

# From here on products of one query with float32 keys are as fast on a CPU as those with values are
# as sums. A sum over keys' last axis reads 10 GB/s; a product 13, but has a start of 10 us.
WIDE_BATCH = 16

# Of a cache in int8 and few rows a CPU multiplies integers: a step of the paper's multi_head at
# batch 32 takes 41 ms, of widened caches 56, and 45 as sums. Of 8 rows a head they take longer.
FEW_INTEGER_ROWS = 4
MAX_INTEGER_SLOTS = 2**17  # Whose sums int32 holds.
PARTS, PART = 3, 254.0


def _is_sum(rows: int, cache_BKSH: Array) -> bool:
    # The product of a long float32 cache is worth its start: it reads 20 GB/s, the sum 12. And for
    # a sum of eight bits a TPU's compiler writes them widened.
    is_long = cache_BKSH.dtype == jnp.float32 and cache_BKSH.shape[2] >= 256
    return rows == 1 and not is_long and cache_BKSH.dtype not in LARGEST


def query_key(query_BKRH: Array, key_BKSH: Array) -> Array:
    """`[B, K, R, S]`, float32."""
    is_wide_batch = key_BKSH.dtype == jnp.float32 and len(key_BKSH) >= WIDE_BATCH
    if _is_sum(query_BKRH.shape[2], key_BKSH) and not is_wide_batch:
        query_BKRH, key_BKSH = lax.optimization_barrier((query_BKRH, key_BKSH))
        product_BKSH = key_BKSH.astype(jnp.float32) * query_BKRH.astype(jnp.float32)
        return jnp.sum(product_BKSH, axis=3)[:, :, None]
    if key_BKSH.dtype in LARGEST:
        return jnp.swapaxes(_widened("...SH,...RH->...SR", key_BKSH, query_BKRH), 2, 3)
    query_BKRH = query_BKRH.astype(key_BKSH.dtype)
    if query_BKRH.shape[:2] == (1, 1) and key_BKSH.dtype != jnp.float32:
        # Else XLA on a CPU may fold the transposes of two projections into this product, late, and
        # then finds that it has no such product of bfloat16.
        query_BKRH, key_BKSH = lax.optimization_barrier((query_BKRH, key_BKSH))
    return jnp.einsum("BKRH,BKSH->BKRS", query_BKRH, key_BKSH, preferred_element_type=jnp.float32)


def weights_value(
    weights_BKRS: Array, value_BKSH: Array, is_seen_BKS: Array | None = None
) -> Array:
    """`[B, K, R, H]`; of values that are not seen nothing is known where `is_seen_BKS` is given."""
    rows = weights_BKRS.shape[2]
    if _is_sum(rows, value_BKSH):
        weights_BKRS, value_BKSH = lax.optimization_barrier((weights_BKRS, value_BKSH))
        weights_BKS1 = weights_BKRS[:, :, 0, :, None].astype(jnp.float32)
        product_BKSH = value_BKSH.astype(jnp.float32) * weights_BKS1
        if is_seen_BKS is not None:
            product_BKSH = jnp.where(is_seen_BKS[..., None], product_BKSH, 0.0)
        return jnp.sum(product_BKSH, axis=2, keepdims=True)
    if is_seen_BKS is not None:
        value_BKSH = jnp.where(is_seen_BKS[..., None], value_BKSH, jnp.zeros((), value_BKSH.dtype))
    if value_BKSH.dtype in LARGEST:
        return _widened("...SH,...RS->...RH", value_BKSH, weights_BKRS)
    output_BKRH = jnp.einsum("BKRS,BKSH->BKRH", weights_BKRS, value_BKSH)
    if rows <= FEW_ROWS:
        # Else XLA transposes the product, not its output, which is five times as slow on a CPU.
        output_BKRH = lax.optimization_barrier(output_BKRH)
    return output_BKRH


def _widened(product: str, cache_BKSH: Array, rows_BKR: Array) -> Array:
    """A product with eight bits, in float32. XLA on a CPU writes what it widens to memory: of one
    batch element after the other that stays in the processor's caches."""
    wide: Callable[..., Array] = functools.partial(_wide, product)
    on_cpu: Callable[..., Array] = functools.partial(_of_integers, product)
    rows, slots = rows_BKR.shape[2], cache_BKSH.shape[2]
    if not (cache_BKSH.dtype == INT8 and rows <= FEW_INTEGER_ROWS and slots <= MAX_INTEGER_SLOTS):
        if rows_BKR.shape[0] == 1 or rows > FEW_ROWS:
            return wide(cache_BKSH, rows_BKR)
        on_cpu = lambda *arrays: lax.map(lambda both: wide(*both), arrays)  # noqa: E731
    return lax.platform_dependent(cache_BKSH, rows_BKR, cpu=on_cpu, default=wide)


def _wide(product: str, cache_BKSH: Array, rows_BKR: Array) -> Array:
    cache_BKSH = cache_BKSH.astype(rows_BKR.dtype)
    return jnp.einsum(product, cache_BKSH, rows_BKR, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _of_integers(product: str, cache_BKSH: Array, rows_BKR: Array) -> Array:
    """As `_wide`, of int8. What is not finite makes its row NaN.

    A number of float32 is three integers here, each with 254 times the next one's scale: as exact
    as its row's largest number, and nothing of the cache is widened.
    """
    rows_BKR = rows_BKR.astype(jnp.float32)
    most_BKR1 = jnp.max(jnp.abs(rows_BKR), axis=3, keepdims=True)
    scales_BKR1 = jnp.maximum(most_BKR1, SMALLEST) / LARGEST[INT8]
    rest_BKR, integers = rows_BKR / scales_BKR1, []
    for _ in range(PARTS):
        integers.append(jnp.round(rest_BKR))
        rest_BKR = (rest_BKR - integers[-1]) * PART
    values_BKR = jnp.concatenate(integers, axis=2).astype(INT8)
    sums = jnp.einsum(product, cache_BKSH, values_BKR, preferred_element_type=jnp.int32)
    of_slots = product.endswith("SR")
    parts = jnp.split(sums.astype(jnp.float32), PARTS, axis=3 if of_slots else 2)
    scales = jnp.swapaxes(scales_BKR1, 2, 3) if of_slots else scales_BKR1
    # From the least one on, which the others would swallow.
    return functools.reduce(lambda total, part: total / PART + part, reversed(parts)) * scales


@_of_integers.defjvp
def _of_integers_jvp(product: str, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    # To round has no gradient; the product is linear in its rows.
    return _of_integers(product, *primals), _wide(product, primals[0], tangents[1])

"""The two products of attention, each in the form that is fast where it runs.

A decode step is bound by reading keys and values: what XLA copies, widens or transposes of them on
the way costs more than the products themselves.

Array letters:
  B batch   K key/value heads   R rows: all queries that ask a head   S slots   H head dim
"""

import jax.numpy as jnp
from jax import Array, lax

from mqa_jax.core.linear import FEW_ROWS
from mqa_jax.core.quantized import LARGEST


def _is_sum(rows: int, cache_BKSH: Array) -> bool:
    # The product of a long float32 cache is worth its start: it reads 20 GB/s, the sum 12. And for
    # a sum of eight bits a TPU's compiler writes them widened.
    is_long = cache_BKSH.dtype == jnp.float32 and cache_BKSH.shape[2] >= 256
    return rows == 1 and not is_long and cache_BKSH.dtype not in LARGEST


def query_key(query_BKRH: Array, key_BKSH: Array) -> Array:
    """`[B, K, R, S]`, float32."""
    if _is_sum(query_BKRH.shape[2], key_BKSH):
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

    def wide(cache_BKSH: Array, rows_BKR: Array) -> Array:
        cache_BKSH = cache_BKSH.astype(rows_BKR.dtype)
        return jnp.einsum(product, cache_BKSH, rows_BKR, preferred_element_type=jnp.float32)

    if rows_BKR.shape[0] == 1 or rows_BKR.shape[2] > FEW_ROWS:
        return wide(cache_BKSH, rows_BKR)
    each = lambda *arrays: lax.map(lambda both: wide(*both), arrays)  # noqa: E731
    return lax.platform_dependent(cache_BKSH, rows_BKR, cpu=each, default=wide)

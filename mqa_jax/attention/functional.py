"""Attention as a pure function, and the masks that it takes.

One code path serves multi-head, grouped-query and multi-query attention. With `N` query heads and
`K` key/value heads the queries are viewed as `[B, T, K, G, H]`, `G = N / K`; keys and values are
never repeated to `N` heads. `K = N` is multi-head attention, `K = 1` is multi-query attention
(Shazeer 2019, section 3).

Array letters, those of `jax.nn.dot_product_attention`:
  B batch   T query length   S key/value length   N query heads   K key/value heads
  G query heads per key/value head   R rows, G * T   H head dim
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from mqa_jax.core.explicit import automatic, spec
from mqa_jax.core.linear import FEW_ROWS

# Queries of longer sequences are taken block by block, so that memory grows with the length and
# not with its square.
QUERY_BLOCK = 512


def causal_mask(
    query_positions_BT: Array, key_positions_BS: Array, window: int | None = None
) -> Array:
    """Which keys a query may see: those at its own position and before, `window` of them at most.

    Returns:
      bool `[B, 1, T, S]`, True where `query - window < key <= query`. A negative key position marks
      an empty cache slot, which nothing sees.
    """
    query = query_positions_BT[:, None, :, None]
    key = key_positions_BS[:, None, None, :]
    mask = (key <= query) & (key >= 0)
    return mask if window is None else mask & (key > query - window)


def segment_mask(query_segment_ids_BT: Array, key_segment_ids_BS: Array) -> Array:
    """Keeps packed sentences apart: True where both sides carry the same segment id, 0 excepted.

    Segment id 0 stands for padding, which nothing sees.

    Returns:
      bool `[B, 1, T, S]`.
    """
    query = query_segment_ids_BT[:, None, :, None]
    key = key_segment_ids_BS[:, None, None, :]
    return (query == key) & (key != 0)


def padding_mask(lengths_B: ArrayLike, length: int) -> Array:
    """bool `[B, 1, 1, S]`, `S = length`: True for the first `lengths_B[b]` keys of row `b`."""
    return jnp.arange(length)[None, None, None, :] < jnp.asarray(lengths_B)[:, None, None, None]


@automatic(lambda query_BTNH, **_: spec(query_BTNH))
def dot_product_attention(
    query_BTNH: ArrayLike,
    key_BSKH: ArrayLike,
    value_BSKH: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Array:
    """Scaled dot-product attention in which `N / K` query heads share each key/value head.

    `K = N` is multi-head attention; `K = 1` is the paper's multi-query attention (Shazeer 2019,
    section 3, where keys and values have no heads axis at all). The softmax is taken in float32
    whatever the dtype of the inputs.

    Args:
      query_BTNH: queries.
      key_BSKH: keys; `K` must divide `N`.
      value_BSKH: values, of the keys' shape.
      mask: bool, broadcastable to `[B, N, T, S]` and of rank 4; True = attend. A query that may
        attend to nothing yields zeros, with a zero gradient.
      is_causal: query `t` sees keys `0..t`; needs `T == S`.
      window: query `t` sees keys `t - window + 1 .. t`, causal by itself; needs `T == S` (the
        paper's local attention, section 4.1, has `window = 32`).
      scale: what the logits are multiplied by; `H ** -0.5` when None.

    Returns:
      `[B, T, N, H]` in the dtype of the queries.

    Raises:
      ValueError: shapes that do not fit, a mask that is not bool, a window below 1, or a causal
        rule for `T != S` (which key the first query stands at would be a guess: pass a mask).
    """
    query_BTNH, key_BSKH, value_BSKH = map(jnp.asarray, (query_BTNH, key_BSKH, value_BSKH))
    _check_shapes(query_BTNH, key_BSKH, value_BSKH)
    batch, length = query_BTNH.shape[:2]
    if mask is not None:
        mask = jnp.asarray(mask)
        check_mask(mask, (batch, query_BTNH.shape[2], length, key_BSKH.shape[1]))
    if is_causal or window is not None:
        check_window(window)
        if length != key_BSKH.shape[1]:
            raise ValueError(
                f"is_causal and window need as many queries as keys, but T={length} and "
                f"S={key_BSKH.shape[1]}: pass mask=causal_mask(query_positions, key_positions), "
                "or decode with a cache (Attention.decode)"
            )
        positions = jnp.arange(length)[None]
        causal = causal_mask(positions, positions, window)
        mask = causal if mask is None else mask & causal
    return attend(query_BTNH, heads_first(key_BSKH), heads_first(value_BSKH), mask, scale)


def attend(
    query_BTNH: Array,
    key_BKSH: Array,
    value_BKSH: Array,
    mask: Array | None,
    scale: float | None = None,
    dropout: Callable[[Array], Array] | None = None,
) -> Array:
    """The attention every public name of this file ends in; keys and values in cache layout."""
    length = query_BTNH.shape[1]
    # A mask of dropout belongs to all queries at once.
    if length <= 2 * QUERY_BLOCK or dropout is not None:
        return _attend_block(query_BTNH, key_BKSH, value_BKSH, mask, scale, dropout)
    blocks = -(-length // QUERY_BLOCK)

    def split(x: Array, axis: int) -> Array:
        """The axis of queries in blocks, which come first."""
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, blocks * QUERY_BLOCK - length)
        x = jnp.pad(x, padding)
        return jnp.moveaxis(
            x.reshape(*x.shape[:axis], blocks, QUERY_BLOCK, *x.shape[axis + 1 :]), axis, 0
        )

    has_query_axis = mask is not None and mask.shape[2] > 1

    @jax.checkpoint  # Backward computes the logits of a block again, else it would keep them all.
    def attend(block: tuple[Array, Array | None]) -> Array:
        query, block_mask = block
        return _attend_block(
            query, key_BKSH, value_BKSH, block_mask if has_query_axis else mask, scale, None
        )

    output = lax.map(attend, (split(query_BTNH, 1), split(mask, 2) if has_query_axis else None))
    return jnp.moveaxis(output, 0, 1).reshape(query_BTNH.shape[0], -1, *query_BTNH.shape[2:])[
        :, :length
    ]


def _attend_block(
    query_BTNH: Array,
    key_BKSH: Array,
    value_BKSH: Array,
    mask: Array | None,
    scale: float | None,
    dropout: Callable[[Array], Array] | None,
) -> Array:
    batch, length, num_heads, head_dim = query_BTNH.shape
    num_kv_heads = key_BKSH.shape[1]
    query_BTKGH = query_BTNH.reshape(batch, length, num_kv_heads, -1, head_dim)
    query_BKGTH = jnp.moveaxis(query_BTKGH, 1, 3)
    # All that ask the same keys are rows of one matrix: for a product over two axes, G and T, XLA
    # takes a quarter longer on a CPU.
    query_BKRH = query_BKGTH.reshape(batch, num_kv_heads, -1, head_dim)
    logits_BKGTS = _query_key(query_BKRH, key_BKSH).reshape(*query_BKGTH.shape[:4], -1)
    logits_BKGTS *= head_dim**-0.5 if scale is None else scale
    if mask is not None:
        if mask.shape[1] == num_heads:
            mask = mask.reshape(mask.shape[0], num_kv_heads, -1, *mask.shape[2:])
        else:
            mask = mask[:, :, None]
        # A finite fill, so that a row with every key masked has a finite softmax (and gradient);
        # the second `where` then makes that row zero, as documented.
        logits_BKGTS = jnp.where(mask, logits_BKGTS, jnp.finfo(jnp.float32).min)
        weights_BKGTS = jnp.where(mask, jax.nn.softmax(logits_BKGTS), 0.0)
    else:
        weights_BKGTS = jax.nn.softmax(logits_BKGTS)
    weights_BKGTS = weights_BKGTS.astype(value_BKSH.dtype)
    if dropout is not None:
        weights_BKGTS = dropout(weights_BKGTS)
    weights_BKRS = weights_BKGTS.reshape(*query_BKRH.shape[:3], -1)
    output_BKGTH = _weights_value(weights_BKRS, value_BKSH).reshape(query_BKGTH.shape)
    output_BTKGH = jnp.moveaxis(output_BKGTH, 3, 1)
    return output_BTKGH.reshape(query_BTNH.shape).astype(query_BTNH.dtype)


def attend_to_cache(
    query_BTNH: Array,
    key_BKSH: Array,
    value_BKSH: Array,
    mask_B1TS: Array,
    end_B: Array | None = None,
) -> Array:
    """As `attend`, with a kernel of its own for few queries on a GPU, which has no gradient.

    Where the mask shows nothing but the first slots of each row, `end_B` says how many.
    """
    if jax.default_backend() == "gpu":
        from mqa_jax.attention.kernels import gpu  # Pallas takes its time to import.

        if gpu.is_supported(query_BTNH, key_BKSH):
            return gpu.flash_decode(
                query_BTNH,
                key_BKSH,
                value_BKSH,
                mask_BTS=mask_B1TS[:, 0] if end_B is None else None,
                end_B=end_B,
                scale=query_BTNH.shape[-1] ** -0.5,
            )
    return attend(query_BTNH, key_BKSH, value_BKSH, mask_B1TS)


def _is_sum(rows: int, cache_BKSH: Array) -> bool:
    # The product of a long float32 cache is worth its start: it reads 20 GB/s, the sum 12.
    is_long = cache_BKSH.dtype == jnp.float32 and cache_BKSH.shape[2] >= 256
    return rows == 1 and not is_long


def _query_key(query_BKRH: Array, key_BKSH: Array) -> Array:
    """`[B, K, R, S]`, float32."""
    if _is_sum(query_BKRH.shape[2], key_BKSH):
        query_BKRH, key_BKSH = lax.optimization_barrier((query_BKRH, key_BKSH))
        product_BKSH = key_BKSH.astype(jnp.float32) * query_BKRH.astype(jnp.float32)
        return jnp.sum(product_BKSH, axis=3)[:, :, None]
    return jnp.einsum("BKRH,BKSH->BKRS", query_BKRH, key_BKSH, preferred_element_type=jnp.float32)


def _weights_value(weights_BKRS: Array, value_BKSH: Array) -> Array:
    """`[B, K, R, H]`."""
    rows = weights_BKRS.shape[2]
    if _is_sum(rows, value_BKSH):
        weights_BKRS, value_BKSH = lax.optimization_barrier((weights_BKRS, value_BKSH))
        weights_BKS1 = weights_BKRS[:, :, 0, :, None].astype(jnp.float32)
        return jnp.sum(value_BKSH.astype(jnp.float32) * weights_BKS1, axis=2, keepdims=True)
    output_BKRH = jnp.einsum("BKRS,BKSH->BKRH", weights_BKRS, value_BKSH)
    if rows <= FEW_ROWS:
        # Else XLA transposes the product, not its output, which is five times as slow on a CPU.
        output_BKRH = lax.optimization_barrier(output_BKRH)
    return output_BKRH


def heads_first(x_BSKH: Array) -> Array:
    """`[B, S, K, H]` in cache layout, `[B, K, S, H]`."""
    return jnp.swapaxes(x_BSKH, 1, 2)


def _check_shapes(query_BTNH: Array, key_BSKH: Array, value_BSKH: Array) -> None:
    shapes = f"query {query_BTNH.shape}, key {key_BSKH.shape}, value {value_BSKH.shape}"
    if query_BTNH.ndim != 4 or key_BSKH.ndim != 4 or key_BSKH.shape != value_BSKH.shape:
        raise ValueError(
            f"expected query [B, T, N, H] and key and value alike [B, S, K, H], but got {shapes}"
        )
    batch, _, num_heads, head_dim = query_BTNH.shape
    if key_BSKH.shape[0] != batch or key_BSKH.shape[3] != head_dim:
        raise ValueError(f"query and key must share B and H, but got {shapes}")
    if num_heads % key_BSKH.shape[2]:
        raise ValueError(
            f"the {key_BSKH.shape[2]} key/value heads do not divide the {num_heads} query heads: "
            f"{shapes}"
        )


def check_mask(mask: Array, shape_BNTS: tuple[int, int, int, int]) -> None:
    fits = mask.ndim == 4 and all(
        size in (1, full) for size, full in zip(mask.shape, shape_BNTS, strict=True)
    )
    if not fits or mask.dtype != bool:
        raise ValueError(
            f"mask must be bool and broadcast to [B, N, T, S] = {list(shape_BNTS)} with four axes "
            f"(a key padding mask is mask[:, None, None, :]), not {mask.dtype} {list(mask.shape)}"
        )


def check_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the token itself), not {window}")

"""The masks that attention takes: which keys each query may see.

Array letters:
  B batch   T query length   S key/value length   N query heads
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from mqa_jax.core.arrays import as_floats, as_integers
from mqa_jax.core.checks import check_integer


def causal_mask(
    query_positions_BT: ArrayLike, key_positions_BS: ArrayLike, window: int | None = None
) -> Array:
    """Which keys a query may see: those at its own position and before, `window` of them at most.

    Args:
      query_positions_BT: integers, the position of each query in its sentence.
      key_positions_BS: integers; a negative one marks an empty cache slot, which nothing sees.
      window: a query sees its own position and the `window - 1` before it; all before when None.

    Returns:
      bool `[B, 1, T, S]`, True where `query - window < key <= query`.

    Raises:
      ValueError: positions that are not integers of these shapes, or a window below 1.
    """
    query = as_integers("query_positions_BT", query_positions_BT)[:, None, :, None]
    key = as_integers("key_positions_BS", key_positions_BS)[:, None, None, :]
    check_window(window)
    mask = (key <= query) & (key >= 0)
    return mask if window is None else mask & (key > query - window)


def segment_mask(query_segment_ids_BT: ArrayLike, key_segment_ids_BS: ArrayLike) -> Array:
    """Keeps packed sentences apart: True where both sides carry the same segment id, 0 excepted.

    Segment id 0 stands for padding, which nothing sees.

    Returns:
      bool `[B, 1, T, S]`.

    Raises:
      ValueError: ids that are not integers of these shapes.
    """
    query = as_integers("query_segment_ids_BT", query_segment_ids_BT)[:, None, :, None]
    key = as_integers("key_segment_ids_BS", key_segment_ids_BS)[:, None, None, :]
    return (query == key) & (key != 0)


def padding_mask(lengths_B: ArrayLike, length: int) -> Array:
    """bool `[B, 1, 1, S]`, `S = length`: True for the first `lengths_B[b]` keys of row `b`.

    Raises:
      ValueError: lengths that are not integers `[B]`, or, where they are known (they are not under
        `jax.jit`), outside `0 .. S`; a `length` below 0.
    """
    lengths_B = as_integers("lengths_B", lengths_B)
    check_lengths(lengths_B, check_integer("length", length, least=0))
    return jnp.arange(length)[None, None, None, :] < lengths_B[:, None, None, None]


def check_mask(mask: ArrayLike, shape_BNTS: tuple[int, int, int, int]) -> Array:
    """`mask` as an array, if it is bool and broadcasts to the shape."""
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    fits = mask.ndim == 4 and all(
        size in (1, full) for size, full in zip(mask.shape, shape_BNTS, strict=True)
    )
    if not fits or mask.dtype != bool:
        raise ValueError(
            f"mask must be bool and broadcast to [B, N, T, S] = {list(shape_BNTS)} with four axes "
            f"(a key padding mask is mask[:, None, None, :]), not {mask.dtype} {list(mask.shape)}"
        )
    return jnp.asarray(mask)


def check_bias(bias: ArrayLike, shape_BNTS: tuple[int, ...]) -> Array:
    """`bias` as an array, if it is of floats and broadcasts to the shape."""
    array = as_floats("bias", bias)
    fits = array.ndim == 4 and all(
        size in (1, full) for size, full in zip(array.shape, shape_BNTS, strict=True)
    )
    if not fits:
        raise ValueError(
            f"bias must broadcast to [B, N, T, S] = {list(shape_BNTS)} with four axes, not "
            f"{list(array.shape)}"
        )
    return array


def check_window(window: int | None) -> int | None:
    return None if window is None else check_integer("window", window)


def bias_of(
    bias: ArrayLike | Callable[[Any, Any], Array] | None,
    query_positions: Any,
    key_positions: Any,
    shape_BNTS: tuple[int, ...],
) -> Array | None:
    """A bias that was given, or that a function makes of positions."""
    if callable(bias):
        bias = bias(query_positions, key_positions)
    return None if bias is None else check_bias(bias, shape_BNTS)


def check_lengths(lengths_B: Array, length: int) -> Array:
    """bool `[B]`, rows whose length is outside `0 .. length`: raised where that is known."""
    is_wrong_B = (lengths_B < 0) | (lengths_B > length)
    if not isinstance(is_wrong_B, jax.core.Tracer) and jnp.any(is_wrong_B):
        raise ValueError(
            f"lengths_B={lengths_B.tolist()}, but each row has {length} tokens: give lengths "
            f"from 0 to {length}"
        )
    return is_wrong_B


def without_padding(x_BTD: Array, is_token_BT: Array) -> Array:
    """Zeros where there is no token, whatever was there."""
    return jnp.where(is_token_BT[..., None], x_BTD, jnp.zeros((), x_BTD.dtype))

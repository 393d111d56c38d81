"""Rules on logits: which tokens may be drawn, and how likely each of them is.

Array letters: B batch   V vocabulary
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# What float32 can divide by. XLA may multiply with the inverse, which must be finite and no 0 too.
_SMALLEST, _LARGEST = 1e-37, 1e37
# Sums of probabilities that are nearer than this are equal: float32 does not tell them apart.
_ROUNDING = 2e-6


def scaled(logits_BV: Array, temperature: np.ndarray | Array) -> Array:
    """The logits, less the greatest of their row, over `temperature` (`[]`, or `[B, 1]`).

    So no temperature above 0 makes NaN of them, however small or large. Where NaN or infinity is
    among the logits of a row, or none of them is finite, its greatest are NaN.
    """
    shifted_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    return shifted_BV / jnp.asarray(temperature.clip(_SMALLEST, _LARGEST), jnp.float32)


def keep_probable(
    logits_BV: Array, top_k: int | None, top_p: float | np.ndarray | Array | None
) -> Array:
    """The logits, with minus infinity for tokens that `top_k` and `top_p` leave out.

    Kept are the `top_k` most probable tokens, exactly, and of these, normalized, the fewest whose
    probability reaches `top_p` (to the precision of float32); of equals, those with lower ids.

    Args:
      logits_BV: `[B, V]` float32.
      top_k: at least 1; all tokens when None, or when there are no more.
      top_p: in (0, 1], `[]` or `[B, 1]`; None or 1: everything.
    """
    vocab_size = logits_BV.shape[-1]
    if top_k is not None and top_k < vocab_size:
        threshold_B1 = lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = _keep_first(logits_BV, threshold_B1, top_k)
    if top_p is None or (not isinstance(top_p, jax.core.Tracer) and np.all(top_p >= 1)):
        return logits_BV
    ascending_BV = jnp.sort(logits_BV, axis=-1)
    # Summed from the least probable on: sums near 1 have lost what is left to reach a top_p of
    # 0.99999. A token is needed if it and those behind it have more than top_p leaves out.
    tail_BV = jnp.cumsum(jax.nn.softmax(ascending_BV), axis=-1)
    left_out = jnp.asarray((1 - top_p) * (1 + _ROUNDING), jnp.float32)
    count_B1 = jnp.sum(tail_BV > left_out, axis=-1, keepdims=True, dtype=jnp.int32)
    count_B1 = jnp.where(top_p >= 1, vocab_size, jnp.maximum(count_B1, 1))
    threshold_B1 = jnp.take_along_axis(ascending_BV, vocab_size - count_B1, axis=-1)
    return _keep_first(logits_BV, threshold_B1, count_B1)


def keep_above(logits_BV: Array, min_p: np.ndarray | Array) -> Array:
    """The logits, with minus infinity for tokens less than `min_p` times as probable as the best.

    Args:
      logits_BV: `[B, V]` float32.
      min_p: in (0, 1], `[]` or `[B, 1]`.
    """
    best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    # In differences of logits, which are exact where probabilities are too small for float32.
    is_left_out_BV = logits_BV - best_B1 < jnp.log(jnp.asarray(min_p, jnp.float32))
    return jnp.where(is_left_out_BV, -jnp.inf, logits_BV)


def _keep_first(logits_BV: Array, threshold_B1: Array, count: Array | int) -> Array:
    """The first `count` logits by size, then by id; `threshold_B1` is the least of them."""
    is_above_BV, is_equal_BV = logits_BV > threshold_B1, logits_BV == threshold_B1
    room_B1 = count - jnp.sum(is_above_BV, axis=-1, keepdims=True, dtype=jnp.int32)
    is_first_BV = jnp.cumsum(is_equal_BV, axis=-1, dtype=jnp.int32) <= room_B1
    return jnp.where(is_above_BV | (is_equal_BV & is_first_BV), logits_BV, -jnp.inf)

"""Rules on logits: which tokens may be drawn.

Array letters: B batch   V vocabulary
"""

import jax
import jax.numpy as jnp
from jax import Array, lax


def keep_probable(logits_BV: Array, top_k: int | None, top_p: float | None) -> Array:
    """The logits, with minus infinity for tokens that `top_k` and `top_p` leave out."""
    if top_k is not None:
        top_k = min(top_k, logits_BV.shape[-1])
        threshold_B1 = lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < threshold_B1, -jnp.inf, logits_BV)
    if top_p is not None and top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probability_BV = jax.nn.softmax(sorted_BV)
        # Kept are tokens before which less than top_p has been gathered: the first one always.
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        threshold_B1 = jnp.min(
            jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True
        )
        logits_BV = jnp.where(logits_BV < threshold_B1, -jnp.inf, logits_BV)
    return logits_BV

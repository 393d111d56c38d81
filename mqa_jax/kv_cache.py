"""KV caches: pytrees that are passed in and returned, so that `jax.jit` can donate them.

All are heads-major, `[B, K, S, H]`: a decode step then reads each head's keys as one contiguous
block, which on a CPU is up to ten times as fast as `[B, S, K, H]`.

Array letters: B batch   T new tokens   S slots   K key/value heads   H head dim   W window
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every token so far, each row at its own position.

    Attributes:
      key: `[B, K, S, H]`.
      value: `[B, K, S, H]`.
      length: `[B]` int32, the tokens each row holds, which is the position of its next one.
    """

    key: Array
    value: Array
    length: Array

    def append(self, key_BTKH: Array, value_BTKH: Array, lengths_B: Array):
        """Writes the first `lengths_B[b]` of `T` tokens of row `b` behind those it holds.

        Returns:
          the new cache; the keys and values to attend to, `[B, K, S, H]`; the position of each of
          them, `[B, S]`; and bool `[B]`, the rows that had no room for all of theirs.

        Raises:
          ValueError: a row has no room for its tokens. Under `jax.jit` lengths are not known, so
            there the flags tell it.
        """
        capacity = self.key.shape[2]
        new_length_B = self.length + lengths_B
        added = key_BTKH.shape[1]
        if not isinstance(new_length_B, jax.core.Tracer) and jnp.max(new_length_B) > capacity:
            row = int(jnp.argmax(new_length_B))
            raise ValueError(
                f"row {row} of the cache would hold {int(new_length_B[row])} tokens, but it has "
                f"room for {capacity}: make it longer, init_cache(batch, length)"
            )
        offset_BT = jnp.arange(added)[None]
        slot_BT = jnp.where(
            offset_BT < lengths_B[:, None], self.length[:, None] + offset_BT, capacity
        )
        cache = _write(self, key_BTKH, value_BTKH, slot_BT, new_length_B)
        position_BS = jnp.arange(capacity)[None]
        return cache, cache.key, cache.value, position_BS, new_length_B > capacity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingCache:
    """Keys and values of the last `W` tokens: the token at position `p` lies in slot `p mod W`.

    What local attention needs, in memory that does not grow with the length.

    Attributes:
      key: `[B, K, W, H]`.
      value: `[B, K, W, H]`.
      length: `[B]` int32, the tokens each row has seen, which is the position of its next one.
    """

    key: Array
    value: Array
    length: Array

    def append(self, key_BTKH: Array, value_BTKH: Array, lengths_B: Array):
        """As `KVCache.append`; there is always room, since the oldest tokens make way."""
        window = self.key.shape[2]
        new_length_B = self.length + lengths_B
        offset_BT = jnp.arange(key_BTKH.shape[1])[None]
        position_BT = self.length[:, None] + offset_BT
        is_token_BT = offset_BT < lengths_B[:, None]
        is_last_BT = position_BT >= new_length_B[:, None] - window
        slot_BT = jnp.where(is_token_BT & is_last_BT, position_BT % window, window)
        cache = _write(self, key_BTKH, value_BTKH, slot_BT, new_length_B)
        no_overflow = jnp.zeros_like(new_length_B, dtype=bool)
        if key_BTKH.shape[1] == 1:
            return cache, cache.key, cache.value, cache._positions(), no_overflow
        # The first of several queries still see tokens that the last of them push out.
        key_BKSH = jnp.concatenate([self.key, jnp.swapaxes(key_BTKH, 1, 2)], axis=2)
        value_BKSH = jnp.concatenate([self.value, jnp.swapaxes(value_BTKH, 1, 2)], axis=2)
        position_BS = jnp.concatenate(
            [self._positions(), jnp.where(is_token_BT, position_BT, -1)], axis=1
        )
        return cache, key_BKSH, value_BKSH, position_BS, no_overflow

    def _positions(self) -> Array:
        """`[B, W]`: the position of the token in each slot, negative where there is none yet."""
        newest_B1 = self.length[:, None] - 1
        window = self.key.shape[2]
        return newest_B1 - (newest_B1 - jnp.arange(window)[None]) % window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossCache:
    """Keys and values of an encoder's output, projected once for a whole decode.

    Attributes:
      key: `[B, K, S, H]`.
      value: `[B, K, S, H]`.
      mask: `[B, S]` bool, True for a source token, False for padding.
    """

    key: Array
    value: Array
    mask: Array


def _write(cache, key_BTKH: Array, value_BTKH: Array, slot_BT: Array, length_B: Array):
    """`cache` with tokens put into their slots; a slot past the end means: do not write."""
    rows_B1 = jnp.arange(slot_BT.shape[0])[:, None]

    def put(buffer_BKSH: Array, new_BTKH: Array) -> Array:
        return buffer_BKSH.at[rows_B1, :, slot_BT].set(
            new_BTKH.astype(buffer_BKSH.dtype), mode="drop"
        )

    return type(cache)(put(cache.key, key_BTKH), put(cache.value, value_BTKH), length_B)

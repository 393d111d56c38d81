"""KV caches: pytrees that are passed in and returned, so that `jax.jit` can donate them.

All are heads-major, `[B, K, S, H]`: a decode step then reads each head's keys as one contiguous
block, which on a CPU is up to ten times as fast as `[B, S, K, H]`.

Array letters:
  B batch   T new tokens   S slots   K key/value heads   H head dim   W window
  b beam   R rows, B * b
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from mqa_jax.core.arrays import check_dtype
from mqa_jax.core.checks import check_integer
from mqa_jax.core.explicit import automatic, partition, spec
from mqa_jax.core.quantized import FP8, LARGEST, Held, Quantized, held

# The tokens of a row that was given more or fewer than there are, where `jax.jit` could raise no
# error. Far enough below 0 to stay there: all that comes behind them is NaN.
LOST = -(2**30)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every token so far, each row at its own position.

    Attributes:
      key: `[B, K, S, H]`, floats or eight bits.
      value: `[B, K, S, H]`, likewise.
      length: `[B]` int32, the tokens each row holds, which is the position of its next one.
    """

    key: Held
    value: Held
    length: Array

    def place(self, added: int, lengths_B: Array) -> tuple[Array, "KVCache", Array]:
        """Where the first `lengths_B[b]` of `added` tokens of row `b` go: behind those it holds.

        Returns:
          the slot of each, `[B, T]`, that past the end for those that are none, and `LOST` in rows
          that had no room for all of theirs, or hold `LOST` tokens; the cache when it holds them,
          but for their keys and values; and the position of each of its slots, `[B, S]`.

        Raises:
          ValueError: a row has no room for its tokens. Under `jax.jit` lengths are not known, so
            there the flags tell it.
        """
        capacity = self.key.shape[2]
        new_length_B = self.length + lengths_B
        is_known = not isinstance(new_length_B, jax.core.Tracer)
        if is_known and jnp.max(new_length_B, initial=0) > capacity:
            row = int(jnp.argmax(new_length_B))
            raise ValueError(
                f"row {row} of the cache would hold {int(new_length_B[row])} tokens, but it has "
                f"room for {capacity}: make it longer, init_cache(batch, length)"
            )
        offset_BT = jnp.arange(added)[None]
        slot_BT = jnp.where(
            offset_BT < lengths_B[:, None], self.length[:, None] + offset_BT, capacity
        )
        is_lost_B = (self.length < 0) | (new_length_B > capacity)
        slot_BT = jnp.where(is_lost_B[:, None], LOST, slot_BT)
        position_BS = jnp.arange(capacity)[None]
        return slot_BT, dataclasses.replace(self, length=new_length_B), position_BS

    def append(
        self, key_BTKH: Array, value_BTKH: Array, lengths_B: Array
    ) -> tuple["KVCache", tuple[Held, Held], Array, Array]:
        """Writes tokens to their places.

        Returns:
          the new cache; the keys and values to attend to, `[B, K, S, H]`; the position of each of
          them, `[B, S]`; and bool `[B]`, the rows that are lost.

        Raises:
          ValueError: as `place`.
        """
        slot_BT, cache, position_BS = self.place(key_BTKH.shape[1], lengths_B)
        key, value = put((self.key, self.value), slot_BT, (key_BTKH, value_BTKH))
        cache = dataclasses.replace(cache, key=key, value=value)
        return cache, (key, value), position_BS, slot_BT[:, 0] < 0

    @automatic(lambda self, **_: _beam_spec(self))
    def expand(self, beam_size: int) -> "BeamCache":
        """The cache of a beam search: what is held so far is what all hypotheses begin with."""
        beam_size = check_integer("beam_size", beam_size)
        batch, _, slots, _ = self.key.shape

        def with_lanes(x: Array) -> Array:
            """`[B, K, S, ...]` as `[B, K, b, S, ...]`."""
            lanes = ((0, 0), (0, 0), (0, beam_size - 1), *((0, 0),) * (x.ndim - 2))
            return jnp.pad(x[:, :, None], lanes)

        return BeamCache(
            key=jax.tree.map(with_lanes, self.key),
            value=jax.tree.map(with_lanes, self.value),
            lane=jnp.zeros((batch, beam_size, slots), jnp.int32),
            length=jnp.repeat(self.length, beam_size),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamCache:
    """Keys and values of the `b` hypotheses of each batch element, which never move.

    Each hypothesis writes its tokens into a lane of its own. When the search replaces hypotheses,
    only the table of lanes is reordered, which says where a hypothesis finds each token of its
    history; hypotheses share what they have in common. Made from a `KVCache` by `expand`.

    Attributes:
      key: `[B, K, b, S, H]`.
      value: `[B, K, b, S, H]`.
      lane: `[B, b, S]` int32, the lane that holds the token in slot `s` of a hypothesis.
      length: `[R]` int32, the tokens of each hypothesis.
    """

    key: Held
    value: Held
    lane: Array
    length: Array

    def append(
        self, key_BbKH: Array, value_BbKH: Array
    ) -> tuple["BeamCache", Held, Held, Array, Array]:
        """Writes one token for each hypothesis.

        Returns:
          the new cache; the keys and values to attend to, `[B, K, b * S, H]`; which of them each
          hypothesis may see, bool `[B, 1, b, b * S]`; and bool `[B, b]`, those without
          room, or of a row that holds `LOST` tokens.

        Raises:
          ValueError: as `KVCache.append`.
        """
        batch, _, beam_size, capacity, _ = self.key.shape
        length_R = self.length + 1
        is_known = not isinstance(length_R, jax.core.Tracer)
        if is_known and jnp.max(length_R, initial=0) > capacity:
            raise ValueError(
                f"a hypothesis would hold {int(jnp.max(length_R))} tokens, but the cache has room "
                f"for {capacity}: make it longer, init_cache(batch, length)"
            )
        slot_Bb = self.length.reshape(batch, beam_size)
        rows_B1 = jnp.arange(batch)[:, None]
        lanes_1b = jnp.arange(beam_size, dtype=jnp.int32)[None]

        at = rows_B1, slice(None), lanes_1b, slot_Bb
        lane_BbS = self.lane.at[rows_B1, lanes_1b, slot_Bb].set(lanes_1b, mode="drop")
        key, value = _put(self.key, at, key_BbKH), _put(self.value, at, value_BbKH)
        cache = BeamCache(key, value, lane_BbS, length_R)
        is_held_BbS = jnp.arange(capacity)[None, None] <= slot_Bb[:, :, None]
        is_mine_BbbS = lane_BbS[:, :, None] == lanes_1b[:, None, :, None]
        mask = (is_mine_BbbS & is_held_BbS[:, :, None]).reshape(
            batch, 1, beam_size, beam_size * capacity
        )
        is_lost_Bb = (slot_Bb < 0) | (slot_Bb >= capacity)
        key, value = jax.tree.map(
            lambda x: x.reshape(*x.shape[:2], beam_size * capacity, *x.shape[4:]), (key, value)
        )
        return cache, key, value, mask, is_lost_Bb

    @automatic(lambda self, **_: jax.tree.map(spec, self))
    def reorder(self, parent_Bb: Array) -> "BeamCache":
        """The cache in which hypothesis `j` continues what was hypothesis `parent_Bb[:, j]`."""
        batch, beam_size, _ = self.lane.shape
        rows_B1 = jnp.arange(batch)[:, None]
        length_Bb = self.length.reshape(batch, beam_size)[rows_B1, parent_Bb]
        return dataclasses.replace(
            self, lane=self.lane[rows_B1, parent_Bb], length=length_Bb.reshape(-1)
        )


def _beam_spec(cache: KVCache) -> BeamCache:
    batch, heads, slots, width = spec(cache.key)
    key = held_spec(partition(batch, heads, None, slots, width), cache.key.dtype)
    return BeamCache(key, key, partition(batch, None, slots), partition(batch))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingCache:
    """Keys and values of the last `W` tokens: the token at position `p` lies in slot `p mod W`.

    What local attention needs, in memory that does not grow with the length.

    Attributes:
      key: `[B, K, W, H]`, floats or eight bits.
      value: `[B, K, W, H]`, likewise.
      length: `[B]` int32, the tokens each row has seen, which is the position of its next one.
    """

    key: Held
    value: Held
    length: Array

    def place(self, added: int, lengths_B: Array) -> tuple[Array, "RingCache", Array]:
        """As `KVCache.place`; there is always room, since the oldest tokens make way."""
        window = self.key.shape[2]
        new_length_B = self.length + lengths_B
        offset_BT = jnp.arange(added)[None]
        position_BT = self.length[:, None] + offset_BT
        is_token_BT = offset_BT < lengths_B[:, None]
        is_last_BT = position_BT >= new_length_B[:, None] - window
        slot_BT = jnp.where(is_token_BT & is_last_BT, position_BT % window, window)
        slot_BT = jnp.where(self.length[:, None] < 0, LOST, slot_BT)
        cache = dataclasses.replace(self, length=new_length_B)
        return slot_BT, cache, cache._positions()

    def append(
        self, key_BTKH: Array, value_BTKH: Array, lengths_B: Array
    ) -> tuple["RingCache", tuple[Held, Held], Array, Array]:
        """As `KVCache.append`, but what to attend to are `W + T`: the first of several queries
        still see tokens that the last of them push out."""
        slot_BT, cache, _ = self.place(key_BTKH.shape[1], lengths_B)
        key, value = put((self.key, self.value), slot_BT, (key_BTKH, value_BTKH))
        key_BKSH, value_BKSH = (
            jax.tree.map(
                lambda old, new: jnp.concatenate([old, new], axis=2),
                buffer,
                held(jnp.swapaxes(new, 1, 2), buffer.dtype),
            )
            for buffer, new in ((self.key, key_BTKH), (self.value, value_BTKH))
        )
        offset_BT = jnp.arange(key_BTKH.shape[1])[None]
        position_BT = jnp.where(
            offset_BT < lengths_B[:, None], self.length[:, None] + offset_BT, -1
        )
        position_BS = jnp.concatenate([self._positions(), position_BT], axis=1)
        cache = dataclasses.replace(cache, key=key, value=value)
        return cache, (key_BKSH, value_BKSH), position_BS, slot_BT[:, 0] < 0

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
      key: `[B, K, S, H]`, floats or eight bits.
      value: `[B, K, S, H]`, likewise.
      mask: `[B, S]` bool, True for a source token, False for padding.
    """

    key: Held
    value: Held
    mask: Array


def put(buffers: tuple[Held, Held], slot_BT: Array, new: tuple[Array, Array]) -> tuple[Held, Held]:
    """Keys and values `[B, K, S, H]` with new ones `[B, T, K, H]` in their slots; a slot past the
    end, or `LOST`, means: do not write."""
    key, value = (_put_into(buffer, slot_BT, x) for buffer, x in zip(buffers, new, strict=True))
    return key, value


def _put_into(buffer: Held, slot_BT: Array, new_BTKH: Array) -> Held:
    at = jnp.arange(slot_BT.shape[0])[:, None], slice(None), slot_BT
    default = functools.partial(_put, at=at, new=new_BTKH)
    if buffer.dtype not in LARGEST or slot_BT.shape[1] > 1 or buffer.shape[1] == 1:
        return default(buffer)
    chosen = functools.partial(_put_chosen, slot_B1=slot_BT, new_B1KH=new_BTKH)
    return lax.platform_dependent(buffer, tpu=chosen, default=default)


def _put_chosen(buffer: Held, slot_B1: Array, new_B1KH: Array) -> Held:
    """As `put`. Around a scatter of eight bits to several heads a TPU's compiler lays a whole cache
    out anew, twice; to choose in each slot goes into the product that reads it anyway."""

    def of(old: Array, new: Array) -> Array:
        is_new_B1S = jnp.arange(old.shape[2])[None, None] == slot_B1[..., None]
        is_new = is_new_B1S.reshape(*is_new_B1S.shape, *(1,) * (old.ndim - 3))
        return jnp.where(is_new, jnp.swapaxes(new, 1, 2), old)

    return jax.tree.map(of, buffer, held(new_B1KH, buffer.dtype))


def _put(buffer: Held, at: tuple, new: Array) -> Held:
    """`buffer` with vectors `[..., H]` in the places `at`; those that are none are left out."""
    return jax.tree.map(
        lambda old, new: old.at[at].set(new, mode="drop"), buffer, held(new, buffer.dtype)
    )


def empty(shape: tuple[int, ...], dtype: jnp.dtype) -> Held:
    """Room for vectors, `[..., H]`."""
    zeros = jnp.zeros(shape, dtype)
    if dtype not in LARGEST:
        return zeros
    return Quantized(zeros, jnp.zeros(shape[:-1], jnp.float32), rounds_rows=False)


def held_spec(key: Any, dtype: jnp.dtype) -> Any:
    """How keys or values of a cache are split, where as floats it is as `key` says."""
    if dtype not in LARGEST:
        return key
    scales: Any = PartitionSpec(*tuple(key)[:-1])
    return Quantized(key, scales, rounds_rows=False)


def check_cache_dtype(name: str, dtype: DTypeLike) -> jnp.dtype:
    """`dtype` as one that keys and values in a cache may have.

    Raises:
      ValueError: it is neither a float, as for activations, nor int8 or fp8 (float8_e4m3fn).
    """
    if isinstance(dtype, str) and dtype == "fp8":
        return FP8
    try:
        if dtype is not None and jnp.dtype(dtype) in LARGEST:
            return jnp.dtype(dtype)
        return check_dtype(name, dtype)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be float32, bfloat16 or float16, or of eight bits, int8 or fp8, not "
            f"{dtype!r}"
        ) from None

"""The attention modules: projections around the function, with caches passed in and returned.

Array letters, those of `jax.nn.dot_product_attention`:
  B batch   T query length   S key/value length   N query heads   K key/value heads
  H head dim   D model dim   R rows   b beam   W window
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, Unpack, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from mqa_jax.attention.cache import (
    LOST,
    BeamCache,
    CrossCache,
    KVCache,
    RingCache,
    check_cache_dtype,
    empty,
)
from mqa_jax.attention.cached import append_and_attend, attend_to_cache
from mqa_jax.attention.functional import attend_finite, attend_seen, finite, heads_first, spoil
from mqa_jax.attention.masks import (
    bias_of,
    causal_mask,
    check_lengths,
    check_mask,
    without_padding,
)
from mqa_jax.attention.positions import BiasFunction
from mqa_jax.attention.projections import Options, Projections, cache_spec, cross_cache_spec
from mqa_jax.core.arrays import as_floats, as_integers
from mqa_jax.core.checks import check_integer
from mqa_jax.core.explicit import automatic, spec
from mqa_jax.core.quantized import held

SelfCache = KVCache | RingCache | BeamCache
# A cache comes back as what it went in.
AnySelfCache = TypeVar("AnySelfCache", bound=SelfCache)
AnyCache = TypeVar("AnyCache", bound=SelfCache | CrossCache)

Bias = ArrayLike | BiasFunction


class Attention(Projections):
    """Attention with `num_heads` query heads over `num_kv_heads` key/value heads.

    The weights are `query [N, H, D]`, `key [K, H, D]`, `value [K, H, D]` and `out [D, N, H]`, and
    the module is the products of the paper's sections 2.4 and 3.1 around `dot_product_attention`.
    It holds no state but its weights: caches are passed in and returned. The options beside them
    are those of later models; as they stand it is the paper's.

    Args:
      d_model: `D`.
      num_heads: `N`.
      num_kv_heads: `K`, which must divide `N`.
      head_dim: `H`; `d_model // num_heads` when None.
      window: local self-attention: a token sees itself and the `window - 1` tokens before it.
      rope: turns queries and keys by their positions before they meet, keys before they are cached:
        a `Rope()`, or a function of your own of `x [B, T, heads, H]` and positions `[B, T]`. For
        self-attention only.
      scale: what the logits are multiplied by; `H ** -0.5` when None.
      softcap: bounds the logits, see `dot_product_attention`.
      qk_norm: an RMS norm of each query and each key over `H`, before `rope`; its scales are
        `query_norm` and `key_norm`, of one head for all.
      norm_epsilon: of that norm.
      qkv_bias: biases of the first three products: `query_bias [N, H]`, `key_bias` and
        `value_bias [K, H]`.
      out_bias: a bias of the last, `out_bias [D]`.
      kernel_init: draws the weights, called with a key, the shape `[inputs, outputs]` and a dtype,
        as flax's initializers are; a normal of standard deviation `inputs ** -0.5` when None.
      dropout_rate: for the attention weights; takes effect where `__call__` is given `rngs`.
      dtype: of the activations, and of the caches if `cache_dtype` is None.
      cache_dtype: of keys and values in caches: another float, or "int8" or "fp8" (float8_e4m3fn),
        with a scale for each token and head.
      param_dtype: of the weights.
      rngs: where the weights' initial values come from.

    Raises:
      ValueError: a size that is no integer of at least 1, `num_kv_heads` that does not divide
        `num_heads`, no `head_dim` where `num_heads` does not divide `d_model`, a rate of dropout
        outside `[0, 1)`, a scale that is not finite, a softcap or an epsilon not above 0, a `rope`
        that is no function, or a dtype that is no float.
    """

    @automatic(lambda x_BTD, **_: spec(x_BTD))
    def __call__(
        self,
        x_BTD: Array,
        memory_BSD: Array | None = None,
        *,
        mask: Array | None = None,
        bias: Bias | None = None,
        positions_BT: ArrayLike | None = None,
        is_causal: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> Array:
        """Attends over a whole sequence: to itself, or to `memory_BSD` where that is given.

        Args:
          x_BTD: what asks.
          memory_BSD: what is attended to (cross-attention); `x_BTD` itself when None.
          mask: bool, rank 4, broadcastable to `[B, N, T, S]`; True = attend.
          bias: added to the scaled logits: floats of rank 4, broadcastable to `[B, N, T, S]`, or,
            for self-attention, a function of positions such as a `RelativeBias`.
          positions_BT: integers, what `rope` and `bias` go by, such as those that restart in each
            sentence of a packed row; 0, 1, 2, ... when None (self-attention only).
          is_causal: a token sees itself and those before it (self-attention only), in the order
            that they stand in.
          rngs: dropout is applied when given (stream `dropout`), see `core.dropout`.

        Returns:
          `[B, T, D]`.

        Raises:
          ValueError: shapes that do not fit, or a window, `is_causal`, a rope, positions or a bias
            that is a function with a memory.
        """
        x_BTD = source_BSD = self._check_input("x_BTD", x_BTD)
        is_cross = memory_BSD is not None
        if memory_BSD is not None:
            source_BSD = self._check_input("memory_BSD", memory_BSD, batch=x_BTD.shape[0])
            if is_causal or self.window is not None:
                raise ValueError(
                    f"is_causal={is_causal}, window={self.window} with a memory: cross-attention "
                    "sees all of its memory; hide keys with a mask"
                )
            self._check_no_positions(positions_BT is not None or callable(bias))
        batch, length, _ = x_BTD.shape
        shape_BNTS = batch, self.query.shape[0], length, source_BSD.shape[1]
        if mask is not None:
            mask = check_mask(mask, shape_BNTS)
        at_BT = None
        if not is_cross:
            at_BT = jnp.arange(length)[None]
            if positions_BT is not None:
                at_BT = as_integers("positions_BT", positions_BT)
                if at_BT.shape not in ((batch, length), (1, length)):
                    raise ValueError(
                        f"positions_BT must be [B, T] = {[batch, length]} (or one row for all), "
                        f"not {list(at_BT.shape)}"
                    )
        added = bias_of(bias, at_BT, at_BT, shape_BNTS)
        if is_causal or self.window is not None:
            positions = jnp.arange(length)[None]
            causal = causal_mask(positions, positions, self.window)
            mask = causal if mask is None else mask & causal
        rngs = self.dropout.drops_with(rngs)
        dropout = None if rngs is None else functools.partial(self.dropout, rngs=rngs)
        if mask is None:
            return self._attend(x_BTD, source_BSD, None, added, at_BT, dropout)
        # What is hidden may be NaN, but no product may see it, and no gradient of one either.
        x_BTD, is_bad_BT = finite(x_BTD.astype(self.dtype))
        source_BSD, is_bad_BS = (
            finite(source_BSD.astype(self.dtype)) if is_cross else (x_BTD, is_bad_BT)
        )
        output_BTD = self._attend(x_BTD, source_BSD, mask, added, at_BT, dropout)
        sees_bad_BT = jnp.any(mask & is_bad_BS[:, None, None], axis=(1, 3))
        return spoil(output_BTD, is_bad_BT | sees_bad_BT)

    def _attend(
        self,
        x_BTD: Array,
        source_BSD: Array,
        mask: Array | None,
        bias: Array | None,
        positions_BT: Array | None,
        dropout: Callable[[Array], Array] | None,
    ) -> Array:
        query_BTNH = self.project_query(x_BTD, positions_BT)
        key_BSKH, value_BSKH = self.project_key_value(source_BSD, positions_BT)
        arrays = query_BTNH, heads_first(key_BSKH), heads_first(value_BSKH)
        logits = self._logits(bias)
        if mask is None:
            return self.project_output(attend_finite(*arrays, None, logits, dropout))
        # What went in is finite; a product of it need not be.
        output_BTNH, is_bad_BTN = attend_seen(*arrays, mask, logits, dropout)
        return spoil(self.project_output(output_BTNH), jnp.any(is_bad_BTN, axis=2))

    @automatic(lambda self, batch, dtype=None, **_: cache_spec(self, batch, dtype))
    def init_cache(
        self, batch: int, length: int, dtype: DTypeLike | None = None
    ) -> KVCache | RingCache:
        """An empty cache: of `length` slots, or a ring of `window` slots for local attention.

        Of modules that are stacked (`nnx.vmap` over the constructor) the caches are as well.

        Args:
          batch: `B`.
          length: tokens that a row has room for; a ring has room for any number.
          dtype: of the keys and values in it; the module's `cache_dtype` when None.
        """
        *stack, num_kv_heads, head_dim, _ = self.key.shape
        batch, length = check_integer("batch", batch), check_integer("length", length)
        dtype = self.cache_dtype if dtype is None else check_cache_dtype("dtype", dtype)
        cache_type, slots = (KVCache, length) if self.window is None else (RingCache, self.window)
        shape = (*stack, batch, num_kv_heads, slots, head_dim)
        # Two buffers, not one twice: a donated buffer may be given away only once.
        return cache_type(
            key=empty(shape, dtype),
            value=empty(shape, dtype),
            length=jnp.zeros((*stack, batch), jnp.int32),
        )

    @automatic(lambda self, memory_BSD, **_: cross_cache_spec(self, *spec(memory_BSD)[:2]))
    def init_cross_cache(self, memory_BSD: Array, mask_BS: Array | None = None) -> CrossCache:
        """Projects an encoder's output, once; `mask_BS` (bool) is False where it is padding."""
        memory_BSD = self._check_input("memory_BSD", memory_BSD)
        if self.window is not None:
            raise ValueError(
                f"window={self.window} with a memory: cross-attention sees all of its memory"
            )
        if mask_BS is None:
            mask_BS = jnp.ones(memory_BSD.shape[:2], bool)
        mask_BS = jnp.asarray(mask_BS)
        if mask_BS.shape != memory_BSD.shape[:2] or mask_BS.dtype != bool:
            raise ValueError(
                f"mask_BS must be bool of shape {memory_BSD.shape[:2]}, the memory's, not "
                f"{mask_BS.dtype} of shape {mask_BS.shape}"
            )
        self._check_no_positions()
        key_BSKH, value_BSKH = self.project_key_value(without_padding(memory_BSD, mask_BS), None)
        key_BKSH, value_BKSH = (
            held(heads_first(x_BSKH), self.cache_dtype) for x_BSKH in (key_BSKH, value_BSKH)
        )
        return CrossCache(key=key_BKSH, value=value_BKSH, mask=mask_BS)

    @automatic(lambda x_BTD, cache, **_: (spec(x_BTD), jax.tree.map(spec, cache)))
    def prefill(
        self,
        x_BTD: Array,
        cache: AnySelfCache,
        lengths_B: ArrayLike | None = None,
        *,
        bias: BiasFunction | None = None,
    ) -> tuple[Array, AnySelfCache]:
        """Causal self-attention of `T` new tokens a row, behind those that the cache holds.

        A prompt goes in whole, or in chunks by several calls.

        Args:
          x_BTD: the new tokens, padded on the right.
          cache: from `init_cache`, or from an earlier call.
          lengths_B: how many of the `T` tokens of each row are real; all when None.
          bias: a function of the positions of queries and keys, as for `__call__`.

        Returns:
          `[B, T, D]`, of no meaning at padding, and the new cache.

        Raises:
          ValueError: shapes that do not fit, lengths outside `0 .. T`, or more tokens than a
            full-length cache has room for; a cache of another module. Under `jax.jit`, where
            lengths are not known, such a row turns to NaN instead, and so does all behind it.
        """
        self._check_cache(cache, SelfCache)
        batch = cache.length.shape[0]
        x_BTD = self._check_input("x_BTD", x_BTD, batch=batch)
        if isinstance(cache, BeamCache):
            return cast(tuple[Array, AnySelfCache], self._decode_beams(x_BTD, cache, bias))
        length = x_BTD.shape[1]
        if lengths_B is None:
            lengths_B = jnp.full(batch, length, jnp.int32)
        else:
            lengths_B = as_integers("lengths_B", lengths_B)
            if lengths_B.shape != (batch,):
                raise ValueError(f"lengths_B must have shape ({batch},), not {lengths_B.shape}")
            is_wrong_B = check_lengths(lengths_B, length)
            lengths_B = jnp.where(is_wrong_B, 0, lengths_B).astype(jnp.int32)
            cache = dataclasses.replace(cache, length=jnp.where(is_wrong_B, LOST, cache.length))
            x_BTD = without_padding(x_BTD, jnp.arange(length)[None] < lengths_B[:, None])
        if length == 0:
            return x_BTD.astype(self.dtype), cache
        query_positions_BT = cache.length[:, None] + jnp.arange(length)[None]
        query_BTNH = self.project_query(x_BTD, query_positions_BT)
        key_BTKH, value_BTKH = self.project_key_value(x_BTD, query_positions_BT)
        if length == 1:
            slot_BT, new_cache, key_positions_BS = cache.place(length, lengths_B)
            buffers = cache.key, cache.value
        else:
            new_cache, buffers, key_positions_BS, is_lost_B = cache.append(
                key_BTKH, value_BTKH, lengths_B
            )
        slots = buffers[0].shape[2]
        mask = causal_mask(query_positions_BT, key_positions_BS, self.window)
        shape_BNTS = batch, query_BTNH.shape[2], length, slots
        logits = self._logits(bias_of(bias, query_positions_BT, key_positions_BS, shape_BNTS))
        if length == 1:
            # A token that comes alone sees all that is held; of a ring, what is not overwritten.
            end_B = jnp.minimum(new_cache.length, slots) if self.window in (None, slots) else None
            output_BTNH, (key_BKSH, value_BKSH) = append_and_attend(
                query_BTNH, buffers, (key_BTKH, value_BTKH), slot_BT, mask, end_B, logits
            )
            new_cache = dataclasses.replace(new_cache, key=key_BKSH, value=value_BKSH)
        else:
            output_BTNH = attend_to_cache(query_BTNH, *buffers, mask, logits=logits)
            output_BTNH = jnp.where(is_lost_B[:, None, None, None], jnp.nan, output_BTNH)
        return self.project_output(output_BTNH), cast(AnySelfCache, new_cache)

    def _decode_beams(
        self, x_R1D: Array, cache: BeamCache, bias: BiasFunction | None
    ) -> tuple[Array, BeamCache]:
        """All hypotheses of a batch element ask all of its keys at once, each seeing its own."""
        rows, length, _ = x_R1D.shape
        if length != 1:
            raise ValueError(f"a BeamCache takes one token a row, not T={length}")
        batch, _, beam_size, slots, _ = cache.key.shape
        position_R1 = cache.length[:, None]
        query_BbNH, key_BbKH, value_BbKH = (
            x_R1KH.reshape(batch, beam_size, *x_R1KH.shape[2:])
            for x_R1KH in (
                self.project_query(x_R1D, position_R1),
                *self.project_key_value(x_R1D, position_R1),
            )
        )
        # In each lane a token lies in the slot of its position.
        key_positions_1S = jnp.tile(jnp.arange(slots), beam_size)[None]
        query_positions_Bb = position_R1.reshape(batch, beam_size)
        shape_BNbS = batch, query_BbNH.shape[2], beam_size, beam_size * slots
        added = bias_of(bias, query_positions_Bb, key_positions_1S, shape_BNbS)
        cache, key_BKSH, value_BKSH, mask, is_lost_Bb = cache.append(key_BbKH, value_BbKH)
        output_BbNH = attend_to_cache(
            query_BbNH, key_BKSH, value_BKSH, mask, logits=self._logits(added)
        )
        output_BbNH = jnp.where(is_lost_Bb[:, :, None, None], jnp.nan, output_BbNH)
        return self.project_output(output_BbNH).reshape(x_R1D.shape), cache

    @automatic(lambda x_BTD, cache, **_: (spec(x_BTD), jax.tree.map(spec, cache)))
    def decode(
        self, x_BTD: Array, cache: AnyCache, *, bias: BiasFunction | None = None
    ) -> tuple[Array, AnyCache]:
        """One incremental step (Shazeer 2019, sections 2.4.1 and 3.1): `T` is 1.

        With a `CrossCache` the rows of `x_BTD` may be a multiple of the cache's (`b` beams of each
        sentence, row `i * b + j`): all beams of a sentence read the same keys and values.

        Returns:
          `[B, 1, D]` and the new cache (a `CrossCache` comes back as it is).

        Raises:
          ValueError: as `prefill`, or `T != 1` with a self-attention cache; a window, a rope or a
            bias with a `CrossCache`.
        """
        x_BTD = self._check_input("x_BTD", x_BTD)
        self._check_cache(cache, SelfCache | CrossCache)
        if not isinstance(cache, CrossCache):
            if x_BTD.shape[1] != 1:
                raise ValueError(
                    f"decode takes one token a row, not T={x_BTD.shape[1]}: use prefill for more"
                )
            return self.prefill(x_BTD, cache, bias=bias)
        self._check_no_positions(bias is not None)
        rows, length, d_model = x_BTD.shape
        batch = cache.key.shape[0]
        beams = rows // max(batch, 1)
        if beams * batch != rows:
            raise ValueError(
                f"{rows} rows over a cross-attention cache of {batch}: there must be a whole "
                "number of beams for each row of the cache"
            )
        x_BTD = x_BTD.reshape(batch, beams * length, d_model)
        query_BTNH = self.project_query(x_BTD, None)
        mask = cache.mask[:, None, None, :]
        output_BTNH = attend_to_cache(
            query_BTNH, cache.key, cache.value, mask, logits=self._logits(None)
        )
        return self.project_output(output_BTNH).reshape(rows, length, d_model), cache

    def _check_no_positions(self, is_asked: bool = False) -> None:
        if self.rope is not None or is_asked:
            raise ValueError(
                "a rope, positions or a bias by position with a memory, whose tokens have no "
                "positions among the queries': leave them out of cross-attention"
            )

    def _check_cache(self, cache: Any, cache_types: Any) -> None:
        if not isinstance(cache, cache_types):
            kind = type(cache).__name__
            raise ValueError(f"cache must be one that init_cache of the module gave, not a {kind}")
        num_kv_heads, head_dim = self.key.shape[-3:-1]
        if (cache.key.shape[1], cache.key.shape[-1]) != (num_kv_heads, head_dim):
            raise ValueError(
                f"the cache is of another module: its keys are {list(cache.key.shape)}, but this "
                f"one has {num_kv_heads} key/value heads of {head_dim}"
            )
        slots = cache.key.shape[2]
        if isinstance(cache, RingCache) and (self.window is None or self.window > slots):
            raise ValueError(
                f"a ring cache of {slots} slots holds too little for a module with "
                f"window={self.window}: make it with init_cache"
            )
        if isinstance(cache, BeamCache) and self.window is not None:
            raise ValueError(
                f"a BeamCache holds all tokens, and a module with window={self.window} sees the "
                "last: its beams are rows of the ring that init_cache gives"
            )
        if isinstance(cache, CrossCache) and self.window is not None:
            raise ValueError(
                f"window={self.window} with a memory: cross-attention sees all of its memory"
            )

    def _check_input(self, name: str, x: ArrayLike, batch: int | None = None) -> Array:
        d_model, x = self.out.shape[0], as_floats(name, x)
        if x.ndim != 3 or x.shape[2] != d_model or (batch is not None and x.shape[0] != batch):
            expected = f"[{'B' if batch is None else batch}, {name[-2]}, {d_model}]"
            hint = " (one row: x[None])" if x.ndim == 2 else ""
            raise ValueError(f"{name} must have shape {expected}, not {list(x.shape)}{hint}")
        return x


class MultiHeadAttention(Attention):
    """`Attention` in which every query head has keys and values of its own: `K = N`."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int | None = None,
        **options: Unpack[Options],
    ):
        super().__init__(d_model, num_heads, num_heads, head_dim, **options)


class GroupedQueryAttention(Attention):
    """`Attention` in which `N / K` query heads share each key/value head."""


class MultiQueryAttention(Attention):
    """`Attention` in which all query heads share one key/value head: `K = 1` (section 3)."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int | None = None,
        **options: Unpack[Options],
    ):
        super().__init__(d_model, num_heads, 1, head_dim, **options)

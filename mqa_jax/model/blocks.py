"""Residual blocks and the stacks of them.

Pre-norm blocks without biases, learned positions (Shazeer 2019, section 4.1, and its published code
base).

Array letters:
  B batch   S source length   T target length   D model dim   V vocabulary   L layers
"""

import functools

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from mqa_jax.attention.cache import CrossCache
from mqa_jax.attention.masks import padding_mask, segment_mask
from mqa_jax.attention.module import SelfCache, without_padding
from mqa_jax.core.arrays import as_integers
from mqa_jax.core.checks import check_integer
from mqa_jax.core.dropout import Dropout
from mqa_jax.core.sharding import over_batch
from mqa_jax.model.config import TransformerConfig
from mqa_jax.model.layers import Embedding, RMSNorm


class _Embedder(nnx.Module):
    """Positions added to token vectors. The token table is passed in, since models share it."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.positions = Embedding(
            config.max_length, config.d_model, axes="PD", rngs=rngs, **config.dtypes
        )
        self.dropout = Dropout(config.dropout_rate)

    def __call__(
        self,
        tokens_BT: ArrayLike,
        table: Embedding,
        positions_BT: ArrayLike | None,
        rngs: nnx.Rngs | None,
        is_token_BT: Array | None = None,
    ) -> Array:
        """`[B, T, D]`; zeros where `is_token_BT` is False, whatever ids and positions are there."""
        tokens_BT = as_integers("tokens_BT", tokens_BT)
        shape, max_length = tokens_BT.shape, self.positions.table.shape[0]
        if positions_BT is None:
            if tokens_BT.shape[1] > max_length:
                raise ValueError(
                    f"{tokens_BT.shape[1]} tokens in a row, but the model knows {max_length} "
                    "positions: shorten the input, or train with a larger max_length"
                )
            positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        positions_BT = as_integers("positions_BT", positions_BT)
        _check_shape("positions", positions_BT, shape)
        x_BTD = table(tokens_BT) + self.positions(positions_BT)
        if is_token_BT is not None:
            _check_shape("segment ids", is_token_BT, shape)
            x_BTD = without_padding(x_BTD, is_token_BT)
        return over_batch(self.dropout(x_BTD, rngs=rngs))


def _check_shape(name: str, x: Array, shape_BT: tuple[int, ...]) -> None:
    if x.shape not in (shape_BT, (1, shape_BT[1])):
        raise ValueError(
            f"{name} must have the shape of their tokens, {list(shape_BT)} (or one row for all), "
            f"not {list(x.shape)}"
        )


def tokens_and_mask(segment_ids_BT: ArrayLike | None) -> tuple[Array | None, Array | None]:
    """Which of `[B, T]` are tokens, and which see which; None and None for a whole sentence."""
    if segment_ids_BT is None:
        return None, None
    mask = segment_mask(segment_ids_BT, segment_ids_BT)
    return jnp.asarray(segment_ids_BT) != 0, mask


class _EncoderLayer(nnx.Module):
    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, rngs=rngs, **config.dtypes)
        self.attention = config.attention(rngs)
        self.feed_forward_norm = RMSNorm(config.d_model, rngs=rngs, **config.dtypes)
        self.feed_forward = config.feed_forward(rngs)
        self.dropout = Dropout(config.dropout_rate)

    def __call__(self, x_BSD: Array, mask: Array | None, rngs: nnx.Rngs | None) -> Array:
        drop = functools.partial(self.dropout, rngs=rngs)
        x_BSD += drop(self.attention(self.attention_norm(x_BSD), mask=mask, rngs=rngs))
        return x_BSD + drop(self.feed_forward(self.feed_forward_norm(x_BSD), rngs=rngs))


class _DecoderLayer(nnx.Module):
    def __init__(self, config: TransformerConfig, has_memory: bool, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, rngs=rngs, **config.dtypes)
        self.attention = config.attention(rngs, config.window)
        if has_memory:
            self.cross_attention_norm = RMSNorm(config.d_model, rngs=rngs, **config.dtypes)
            self.cross_attention = config.attention(rngs)
        self.feed_forward_norm = RMSNorm(config.d_model, rngs=rngs, **config.dtypes)
        self.feed_forward = config.feed_forward(rngs)
        self.dropout = Dropout(config.dropout_rate)

    def __call__(
        self,
        x_BTD: Array,
        memory_BSD: Array | None,
        mask: Array | None,
        memory_mask: Array | None,
        rngs: nnx.Rngs | None,
    ) -> Array:
        """Training: the whole sequence at once."""
        drop = functools.partial(self.dropout, rngs=rngs)
        y_BTD = self.attention(self.attention_norm(x_BTD), mask=mask, is_causal=True, rngs=rngs)
        x_BTD += drop(y_BTD)
        if memory_BSD is not None:
            y_BTD = self.cross_attention_norm(x_BTD)
            x_BTD += drop(self.cross_attention(y_BTD, memory_BSD, mask=memory_mask, rngs=rngs))
        return x_BTD + drop(self.feed_forward(self.feed_forward_norm(x_BTD), rngs=rngs))

    def extend(
        self, x_BTD: Array, cache: SelfCache, cross: CrossCache | None, lengths_B: ArrayLike | None
    ) -> tuple[Array, SelfCache]:
        """Decoding: `T` more tokens behind those in the cache."""
        y_BTD, cache = self.attention.prefill(self.attention_norm(x_BTD), cache, lengths_B)
        x_BTD += y_BTD
        if cross is not None:
            x_BTD += self.cross_attention.decode(self.cross_attention_norm(x_BTD), cross)[0]
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD)), cache


class _Decoder(nnx.Module):
    """The stack of decoder layers, between embedded tokens and what the softmax product takes."""

    def __init__(self, config: TransformerConfig, has_memory: bool, rngs: nnx.Rngs):
        self.embedder = _Embedder(config, rngs)
        self.layers = nnx.List(
            [_DecoderLayer(config, has_memory, rngs) for _ in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.d_model, rngs=rngs, **config.dtypes)
        self.dropout = Dropout(config.dropout_rate)
        self.config = config

    def __call__(
        self,
        tokens_BT: ArrayLike,
        table: Embedding,
        positions_BT: ArrayLike | None,
        segment_ids_BT: ArrayLike | None,
        *,
        memory_BSD: Array | None = None,
        memory_mask: Array | None = None,
        rngs: nnx.Rngs | None,
    ) -> Array:
        is_token_BT, mask = tokens_and_mask(segment_ids_BT)
        x_BTD = self.embedder(tokens_BT, table, positions_BT, rngs, is_token_BT)
        for layer in self.layers:
            x_BTD = self.config.call(layer, x_BTD, memory_BSD, mask, memory_mask, rngs)
        return self.dropout(self.norm(x_BTD), rngs=rngs)

    def extend(
        self,
        tokens_BT: ArrayLike,
        table: Embedding,
        cache: tuple[SelfCache, ...],
        cross: tuple[CrossCache | None, ...],
        lengths_B: ArrayLike | None,
    ) -> tuple[Array, tuple[SelfCache, ...]]:
        tokens_BT = as_integers("tokens_BT", tokens_BT)
        for name, given in (("cache", cache), ("cross", cross)):
            layers = len(given) if isinstance(given, tuple | list) else given
            if layers != len(self.layers):
                raise ValueError(
                    f"{name} must be a tuple of one for each of the {len(self.layers)} decoder "
                    f"layers, as init_cache and init_cross_cache give it, not {layers!r}"
                )
        (batch,), (rows, length) = cache[0].length.shape, tokens_BT.shape
        if rows != batch:
            raise ValueError(f"tokens for {rows} rows, but the cache has {batch}")
        is_token_BT = None
        if lengths_B is not None:
            lengths_B = as_integers("lengths_B", lengths_B)
            if lengths_B.shape != (batch,):
                raise ValueError(f"lengths_B must have shape ({batch},), not {lengths_B.shape}")
            is_token_BT = padding_mask(lengths_B, length)[:, 0, 0]
        positions_BT = cache[0].length[:, None] + jnp.arange(length)[None]
        x_BTD = self.embedder(tokens_BT, table, positions_BT, None, is_token_BT)
        new_cache = []
        for layer, layer_cache, layer_cross in zip(self.layers, cache, cross, strict=True):
            x_BTD, layer_cache = layer.extend(x_BTD, layer_cache, layer_cross, lengths_B)
            new_cache.append(layer_cache)
        return self.norm(x_BTD), tuple(new_cache)

    def init_cache(
        self, batch: int, length: int, dtype: DTypeLike | None = None
    ) -> tuple[SelfCache, ...]:
        length = check_integer("length", length)
        max_length = self.embedder.positions.table.shape[0]
        if length > max_length:
            raise ValueError(
                f"a cache of {length} tokens, but the model knows {max_length} positions: ask for "
                "fewer tokens, or train with a larger max_length"
            )
        return tuple(layer.attention.init_cache(batch, length, dtype) for layer in self.layers)

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
from jax.typing import ArrayLike

from mqa_jax.attention.cache import CrossCache
from mqa_jax.attention.module import SelfCache
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
        self, tokens_BT: Array, table: Embedding, positions_BT: Array | None, rngs: nnx.Rngs | None
    ) -> Array:
        max_length = self.positions.table.shape[0]
        if tokens_BT.ndim != 2:
            raise ValueError(f"tokens must have shape [B, T], not {list(tokens_BT.shape)}")
        if positions_BT is None:
            if tokens_BT.shape[1] > max_length:
                raise ValueError(
                    f"{tokens_BT.shape[1]} tokens in a row, but the model knows {max_length} "
                    "positions: shorten the input, or train with a larger max_length"
                )
            positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        x_BTD = table(tokens_BT) + self.positions(positions_BT)
        return over_batch(self.dropout(x_BTD, deterministic=rngs is None, rngs=rngs))


class _EncoderLayer(nnx.Module):
    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, rngs=rngs, **config.dtypes)
        self.attention = config.attention(rngs)
        self.feed_forward_norm = RMSNorm(config.d_model, rngs=rngs, **config.dtypes)
        self.feed_forward = config.feed_forward(rngs)
        self.dropout = Dropout(config.dropout_rate)

    def __call__(self, x_BSD: Array, mask: Array | None, rngs: nnx.Rngs | None) -> Array:
        drop = functools.partial(self.dropout, deterministic=rngs is None, rngs=rngs)
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
        drop = functools.partial(self.dropout, deterministic=rngs is None, rngs=rngs)
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
        self, tokens_BT, table, positions_BT, *, memory_BSD=None, mask, memory_mask=None, rngs
    ) -> Array:
        x_BTD = self.embedder(tokens_BT, table, positions_BT, rngs)
        for layer in self.layers:
            x_BTD = self.config.call(layer, x_BTD, memory_BSD, mask, memory_mask, rngs)
        return self.dropout(self.norm(x_BTD), deterministic=rngs is None, rngs=rngs)

    def extend(self, tokens_BT, table, cache, cross, lengths_B) -> tuple[Array, tuple]:
        positions_BT = cache[0].length[:, None] + jnp.arange(tokens_BT.shape[1])[None]
        x_BTD = self.embedder(tokens_BT, table, positions_BT, rngs=None)
        new_cache = []
        for layer, layer_cache, layer_cross in zip(self.layers, cache, cross, strict=True):
            x_BTD, layer_cache = layer.extend(x_BTD, layer_cache, layer_cross, lengths_B)
            new_cache.append(layer_cache)
        return self.norm(x_BTD), tuple(new_cache)

    def init_cache(self, batch: int, length: int) -> tuple[SelfCache, ...]:
        max_length = self.embedder.positions.table.shape[0]
        if length > max_length:
            raise ValueError(
                f"a cache of {length} tokens, but the model knows {max_length} positions: ask for "
                "fewer tokens, or train with a larger max_length"
            )
        return tuple(layer.attention.init_cache(batch, length) for layer in self.layers)

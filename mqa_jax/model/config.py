"""The size of a model, and what follows from it alone."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mqa_jax.attention import Attention
from mqa_jax.attention.masks import check_window
from mqa_jax.core.arrays import check_dtype
from mqa_jax.core.checks import check_integer, check_number
from mqa_jax.core.sharding import over_batch
from mqa_jax.model.layers import FeedForward


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The size of a model; a config file's `config.model` holds exactly these fields.

    Attributes:
      vocab_size: `V`, of source and target together.
      d_model: `D`.
      d_ff: width of the feed-forward layers.
      num_layers: layers of the decoder, and as many of the encoder.
      num_heads: query heads.
      num_kv_heads: key/value heads of all three kinds of attention; 1 is multi-query.
      head_dim: of queries, keys and values.
      max_length: positions that can be told apart, of source and of target: the longest sequence.
      window: of the decoder's self-attention, which then sees the current and the previous
        `window - 1` positions; None for all of them. Encoder and cross-attention see everything.
      dropout_rate: on embeddings, on each sublayer's output and on each stack's output.
      attention_dropout_rate: on attention weights.
      relu_dropout_rate: inside the feed-forward layers.
      remat: the backward pass computes the inside of each layer again instead of keeping it; saves
        memory, costs a third more arithmetic.
      dtype: of the activations and the caches.
      param_dtype: of the weights.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    window: int | None = None
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    relu_dropout_rate: float = 0.0
    remat: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises ValueError for a size, rate or dtype that no model can have."""
        sizes = "vocab_size d_model d_ff num_layers num_heads num_kv_heads head_dim max_length"
        for name in sizes.split():
            check_integer(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}"
            )
        check_window(self.window)
        for name in ("dropout_rate", "attention_dropout_rate", "relu_dropout_rate"):
            check_number(name, getattr(self, name), least=0, below=1)
        if not isinstance(self.remat, bool):
            raise ValueError(f"remat must be True or False, not {self.remat!r}")
        for name in ("dtype", "param_dtype"):
            check_dtype(name, getattr(self, name))

    def attention(self, rngs: nnx.Rngs, window: int | None = None) -> Attention:
        return Attention(
            self.d_model,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            window=window,
            dropout_rate=self.attention_dropout_rate,
            rngs=rngs,
            **self.dtypes,
        )

    def feed_forward(self, rngs: nnx.Rngs) -> FeedForward:
        return FeedForward(
            self.d_model, self.d_ff, dropout_rate=self.relu_dropout_rate, rngs=rngs, **self.dtypes
        )

    def call(self, layer: nnx.Module, *args: Any) -> Array:
        """The layer's output."""
        call = type(layer).__call__
        return over_batch((nnx.remat(call) if self.remat else call)(layer, *args))

    @property
    def dtypes(self) -> dict:
        return dict(dtype=jnp.dtype(self.dtype), param_dtype=jnp.dtype(self.param_dtype))

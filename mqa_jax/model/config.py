"""The size of a model, and what follows from it alone."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mqa_jax.attention import Attention
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

    def __post_init__(self):
        for name in ("vocab_size", "d_ff", "num_layers", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("dropout_rate", "attention_dropout_rate", "relu_dropout_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        for name in ("dtype", "param_dtype"):
            try:
                is_float = jnp.issubdtype(jnp.dtype(getattr(self, name)), jnp.floating)
            except TypeError:
                is_float = False
            if not is_float:
                raise ValueError(
                    f"{name} must be a floating-point type, such as float32, bfloat16 or float16, "
                    f"not {getattr(self, name)!r}"
                )

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

    def call(self, layer: nnx.Module, *args) -> Array:
        """The layer's output."""
        call = type(layer).__call__
        return over_batch((nnx.remat(call) if self.remat else call)(layer, *args))

    @property
    def dtypes(self) -> dict:
        return dict(dtype=jnp.dtype(self.dtype), param_dtype=jnp.dtype(self.param_dtype))

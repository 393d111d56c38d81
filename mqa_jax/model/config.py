"""What a model is made of, and what follows from that alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mqa_jax.attention import Attention
from mqa_jax.attention.cache import check_cache_dtype
from mqa_jax.attention.masks import check_window
from mqa_jax.attention.positions import RelativeBias, Rope
from mqa_jax.core.arrays import check_dtype
from mqa_jax.core.checks import check_integer, check_number
from mqa_jax.core.norms import NORMS, Norm
from mqa_jax.core.quantized import SCHEMES
from mqa_jax.core.sharding import over_batch
from mqa_jax.model.layers import ACTIVATIONS, FeedForward

BIASES = ("qkv", "out", "mlp", "logits")

# What fields of `TransformerConfig` can be, of which there are few values.
CHOICES: dict[str, tuple] = {
    "norm": tuple(NORMS),
    "block": ("pre", "post", "sandwich", "parallel"),
    "parallel_norms": (1, 2),
    "positions": ("learned", "sinusoidal", "rope", "relative"),
    "activation": tuple(ACTIVATIONS),
    "qk_norm": (False, True),
    "gated": (False, True),
    "tied_softmax": (None, False, True),
    "remat": (False, True),
    "quantized": (None, *SCHEMES),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """What a model is made of; a config file's `config.model` holds these fields.

    The defaults are the paper's; the other values are those of later models.

    Attributes:
      vocab_size: `V`, of source and target together.
      d_model: `D`.
      d_ff: width of the feed-forward layers.
      num_layers: layers of the decoder.
      num_heads: query heads.
      num_kv_heads: key/value heads; 1 is multi-query.
      head_dim: of queries, keys and values.
      max_length: positions that can be told apart, of source and of target: the longest sequence.
      window: of the decoder's self-attention, which then sees the current and the previous
        `window - 1` positions; None for all of them; a tuple of such, one a layer. Encoder and
        cross-attention see everything.
      num_encoder_layers: layers of the encoder; as many as the decoder's when None.
      encoder_kv_heads: key/value heads in the encoder; `num_kv_heads` when None.
      cross_kv_heads: key/value heads of cross-attention; `num_kv_heads` when None.
      norm: "rms", or "layer", which has a mean and biases.
      norm_epsilon: what norms add to a variance.
      block: what a sublayer `f` adds to `x`: "pre", `x + f(norm(x))`; "post",
        `norm(x + f(x))`, with no norm behind the stack (Vaswani et al. 2017); "sandwich",
        `x + norm(f(norm(x)))`; or "parallel", `x + attention(norm(x)) + feed_forward(norm(x))`,
        for models without an encoder.
      parallel_norms: of "parallel": 1, both take the same, or 2, each has its own.
      positions: "learned" vectors, added to the embeddings; "sinusoidal", likewise; "rope",
        queries and keys turned; or "relative", T5's biases on the logits.
      rope: of "rope", or a mapping of its fields.
      relative_buckets: of "relative", see `RelativeBias`.
      relative_distance: likewise.
      attention_scale: what attention's logits are multiplied by; `head_dim ** -0.5` when None.
      qk_norm: an RMS norm of queries and keys, see `Attention`.
      attention_softcap: bounds attention's logits, see `Attention`.
      logits_softcap: bounds the logits likewise.
      bias: which products have biases, of "qkv", "out" (of attention), "mlp" and "logits".
      activation: in the feed-forward layers: "relu", "gelu", "gelu_tanh" or "silu".
      gated: feed-forward layers with a third product, see `FeedForward`.
      embedding_scale: what token vectors are multiplied by.
      tied_softmax: whether the embedding is the softmax matrix too; when None, as in the paper: in
        an `EncoderDecoder`, not in a `DecoderOnly`.
      logits_scale: what the last vector is multiplied by; when None `d_model ** -0.5` where the
        softmax is tied, and 1 where it is not.
      dropout_rate: on embeddings, on each sublayer's output and on each stack's output.
      attention_dropout_rate: on attention weights.
      relu_dropout_rate: inside the feed-forward layers.
      remat: the backward pass computes the inside of each layer again instead of keeping it; saves
        memory, costs a third more arithmetic.
      dtype: of the activations and the caches.
      param_dtype: of the weights.
      quantized: weights in eight bits, for decoding: see `mqa_jax.convert.quantize`.
      cache_dtype: of keys and values in caches, "int8" and "fp8" among them; `dtype` when None.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    window: int | None | tuple[int | None, ...] = None
    num_encoder_layers: int | None = None
    encoder_kv_heads: int | None = None
    cross_kv_heads: int | None = None
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    block: str = "pre"
    parallel_norms: int = 1
    positions: str = "learned"
    rope: Rope = Rope()
    relative_buckets: int = 32
    relative_distance: int = 128
    attention_scale: float | None = None
    qk_norm: bool = False
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    bias: tuple[str, ...] = ()
    activation: str = "relu"
    gated: bool = False
    embedding_scale: float = 1.0
    tied_softmax: bool | None = None
    logits_scale: float | None = None
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    relu_dropout_rate: float = 0.0
    remat: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    quantized: str | None = None
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a size, rate, choice or dtype that no model can have."""
        # As they come from a config file.
        if isinstance(self.rope, Mapping):
            object.__setattr__(self, "rope", _rope(self.rope))
        if not isinstance(self.rope, Rope):
            raise ValueError(f"rope must be a Rope, or a mapping of its fields, not {self.rope!r}")
        for name in ("window", "bias"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        sizes = "vocab_size d_model d_ff num_layers num_heads num_kv_heads head_dim max_length"
        for name in sizes.split():
            check_integer(name, getattr(self, name))
        if self.num_encoder_layers is not None:
            check_integer("num_encoder_layers", self.num_encoder_layers)
        for name in ("num_kv_heads", "encoder_kv_heads", "cross_kv_heads"):
            heads = getattr(self, name)
            if heads is not None and self.num_heads % check_integer(name, heads):
                raise ValueError(f"{name}={heads} does not divide num_heads={self.num_heads}")
        self._check_windows()
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                raise ValueError(f"{name} {value!r} is not one of {', '.join(map(str, choices))}")
        if not isinstance(self.bias, tuple) or not set(self.bias) <= set(BIASES):
            raise ValueError(f"bias {self.bias!r} must be a tuple of some of {', '.join(BIASES)}")
        for name in ("dropout_rate", "attention_dropout_rate", "relu_dropout_rate"):
            check_number(name, getattr(self, name), least=0, below=1)
        check_number("norm_epsilon", self.norm_epsilon, above=0)
        check_number("embedding_scale", self.embedding_scale, above=0)
        for name in ("attention_softcap", "logits_softcap", "logits_scale"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0)
        if self.attention_scale is not None:
            check_number("attention_scale", self.attention_scale)
        for name, positions, nothing in (
            ("rope", "rope", Rope()),
            ("relative_buckets", "relative", 32),
            ("relative_distance", "relative", 128),
        ):
            if self.positions != positions and getattr(self, name) != nothing:
                raise ValueError(
                    f"{name}={getattr(self, name)} is of no effect with positions "
                    f"{self.positions!r}: choose {positions!r}"
                )
        if self.positions == "rope":
            self.rope.frequencies(self.head_dim)
        for name in ("dtype", "param_dtype"):
            check_dtype(name, getattr(self, name))
        if self.cache_dtype is not None:
            check_cache_dtype("cache_dtype", self.cache_dtype)

    def _check_windows(self) -> None:
        if not isinstance(self.window, tuple):
            check_window(self.window)
            return
        for window in self.window:
            check_window(window)
        if len(self.window) != self.num_layers:
            raise ValueError(
                f"window={self.window} must be one for all layers, or as many as num_layers="
                f"{self.num_layers}"
            )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each decoder layer."""
        return self.window if isinstance(self.window, tuple) else (self.window,) * self.num_layers

    def attention(
        self,
        rngs: nnx.Rngs,
        num_kv_heads: int | None = None,
        *,
        window: int | None = None,
        has_positions: bool = True,
    ) -> Attention:
        return Attention(
            self.d_model,
            self.num_heads,
            self.num_kv_heads if num_kv_heads is None else num_kv_heads,
            self.head_dim,
            window=window,
            rope=self.rope if self.positions == "rope" and has_positions else None,
            scale=self.attention_scale,
            softcap=self.attention_softcap,
            qk_norm=self.qk_norm,
            norm_epsilon=self.norm_epsilon,
            qkv_bias="qkv" in self.bias,
            out_bias="out" in self.bias,
            dropout_rate=self.attention_dropout_rate,
            cache_dtype=self.cache_dtype,
            rngs=rngs,
            **self.dtypes,
        )

    def relative_bias(self, rngs: nnx.Rngs, *, bidirectional: bool) -> RelativeBias | None:
        """Of one stack; None where positions are told apart in another way."""
        if self.positions != "relative":
            return None
        return RelativeBias(
            self.num_heads,
            num_buckets=self.relative_buckets,
            distance=self.relative_distance,
            bidirectional=bidirectional,
            param_dtype=self.param_dtype,
            rngs=rngs,
        )

    def feed_forward(self, rngs: nnx.Rngs) -> FeedForward:
        return FeedForward(
            self.d_model,
            self.d_ff,
            activation=self.activation,
            gated=self.gated,
            use_bias="mlp" in self.bias,
            dropout_rate=self.relu_dropout_rate,
            rngs=rngs,
            **self.dtypes,
        )

    def layer_norm(self, rngs: nnx.Rngs) -> Norm:
        """Of the kind that `norm` says."""
        return NORMS[self.norm](self.d_model, epsilon=self.norm_epsilon, rngs=rngs, **self.dtypes)

    def call(self, layer: nnx.Module, *args: Any) -> Array:
        """The layer's output."""
        call = type(layer).__call__
        return over_batch((nnx.remat(call) if self.remat else call)(layer, *args))

    @property
    def dtypes(self) -> dict:
        return dict(dtype=jnp.dtype(self.dtype), param_dtype=jnp.dtype(self.param_dtype))


def _rope(fields: Mapping[str, Any]) -> Rope:
    known = {field.name for field in dataclasses.fields(Rope)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"rope has unknown fields {unknown}; known are {sorted(known)}")
    return Rope(**fields)

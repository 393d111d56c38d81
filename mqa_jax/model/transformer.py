"""The paper's two models: an encoder-decoder for translation, a decoder for language modelling.

Modules hold weights only; caches are passed in and returned (Shazeer 2019, section 4).

Array letters:
  B batch   S source length   T target length   D model dim   V vocabulary   L layers
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from mqa_jax.attention import padding_mask, segment_mask
from mqa_jax.attention.cache import CrossCache
from mqa_jax.attention.functional import spoil
from mqa_jax.attention.masks import check_lengths
from mqa_jax.attention.module import SelfCache
from mqa_jax.attention.projections import cross_cache_spec
from mqa_jax.core.arrays import as_integers
from mqa_jax.core.dropout import Dropout
from mqa_jax.core.explicit import automatic, partition, spec
from mqa_jax.core.sharding import zeros
from mqa_jax.model.blocks import _Decoder, _Embedder, _EncoderLayer, normed, tokens_and_mask
from mqa_jax.model.config import TransformerConfig
from mqa_jax.model.layers import Embedding, Softmax, logits_spec
from mqa_jax.model.quantized import quantize_weights


class _Model(nnx.Module):
    """What both models end in: the vectors behind the decoder to logits."""

    def __init__(self, config: TransformerConfig, is_tied: bool, has_memory: bool, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model, rngs=rngs, **config.dtypes)
        self._build_encoder(rngs)
        self.decoder = _Decoder(config, has_memory, rngs)
        sizes = config.d_model, config.vocab_size
        is_tied = is_tied if config.tied_softmax is None else config.tied_softmax
        self.softmax = None if is_tied else Softmax(*sizes, rngs=rngs, **config.dtypes)
        has_bias = "logits" in config.bias
        dtype = jnp.dtype(config.param_dtype)
        self.logits_bias = zeros("V", sizes[1:], dtype=dtype) if has_bias else None
        if config.quantized is not None:
            quantize_weights(self, config.quantized)

    def _build_encoder(self, rngs: nnx.Rngs) -> None:
        """Of a model that has one."""

    @property
    def softmax_weight(self) -> nnx.Param:
        """`[V, D]`, what the logits are a product with."""
        return self.embedding.table if self.softmax is None else self.softmax.kernel

    def init_cache(
        self, batch: int, length: int, dtype: DTypeLike | None = None
    ) -> tuple[SelfCache, ...]:
        """Empty self-attention caches, one a decoder layer, for `length` (target) tokens a row.

        Their keys and values are of the model's dtype when `dtype` is None.
        """
        return self.decoder.init_cache(batch, length, dtype)

    def _logits(self, x_BTD: Array) -> Array:
        """`[B, T, V]` float32."""
        product = (self.softmax or self.embedding).logits
        logits_BTV = product(x_BTD, scale=self.config.logits_scale)
        if self.logits_bias is not None:
            bias_V = self.logits_bias[...].astype(jnp.float32)
            logits_BTV += jnp.broadcast_to(bias_V, logits_BTV.shape)
        if (cap := self.config.logits_softcap) is not None:
            logits_BTV = cap * jnp.tanh(logits_BTV / cap)
        return logits_BTV


class EncoderDecoder(_Model):
    """The translation model of the paper's section 4.1, with one matrix for source embedding,
    target embedding and softmax.

    Args:
      config: the sizes.
      rngs: where the weights' initial values come from.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        if config.block == "parallel":
            raise ValueError(
                "block='parallel' leaves no place for cross-attention: an EncoderDecoder is 'pre', "
                "'post' or 'sandwich'"
            )
        super().__init__(config, True, True, rngs)

    def _build_encoder(self, rngs: nnx.Rngs) -> None:
        config = self.config
        layers = config.num_encoder_layers or config.num_layers
        self.encoder_embedder = _Embedder(config, rngs)
        self.encoder_layers = nnx.List([_EncoderLayer(config, rngs) for _ in range(layers)])
        self.encoder_positions = config.relative_bias(rngs, bidirectional=True)
        self.encoder_norm = None if config.block == "post" else config.layer_norm(rngs)
        self.dropout = Dropout(config.dropout_rate)

    @automatic(
        lambda self, target_inputs_BT, **_: logits_spec(
            self.softmax_weight, *spec(target_inputs_BT)
        )
    )
    def __call__(
        self,
        source_tokens_BS: Array,
        target_inputs_BT: Array,
        *,
        source_segment_ids: Array | None = None,
        target_segment_ids: Array | None = None,
        source_positions: Array | None = None,
        target_positions: Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Array:
        """Logits of every next target token, all at once (training and scoring).

        Args:
          source_tokens_BS: source ids.
          target_inputs_BT: target ids, shifted right behind a beginning-of-sentence id.
          source_segment_ids: `[B, S]`, which sentence a token belongs to, 0 for padding; one
            sentence without padding when None.
          target_segment_ids: `[B, T]`, likewise; a target sentence sees the source of its own id.
          source_positions: `[B, S]`, restarting at 0 in each sentence; 0, 1, 2, ... when None.
          target_positions: `[B, T]`, likewise.
          rngs: dropout is applied when given (stream `dropout`).

        Returns:
          `[B, T, V]` float32.

        Raises:
          ValueError: shapes that do not fit, more tokens than positions, or segment ids on one
            side alone.
        """
        if (source_segment_ids is None) != (target_segment_ids is None):
            raise ValueError("give source_segment_ids and target_segment_ids, or neither")
        memory_BSD = self.encode(
            source_tokens_BS, segment_ids=source_segment_ids, positions=source_positions, rngs=rngs
        )
        memory_mask = None
        if source_segment_ids is not None and target_segment_ids is not None:
            memory_mask = segment_mask(target_segment_ids, source_segment_ids)
        x_BTD = self.decoder(
            target_inputs_BT,
            self.embedding,
            target_positions,
            target_segment_ids,
            memory_BSD=memory_BSD,
            memory_mask=memory_mask,
            rngs=rngs,
        )
        return self._logits(x_BTD)

    @automatic(lambda source_tokens_BS, **_: partition(*spec(source_tokens_BS), None))
    def encode(
        self,
        source_tokens_BS: Array,
        *,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Array:
        """The encoder's output, `[B, S, D]`; arguments as for `__call__`."""
        is_token_BS, mask = tokens_and_mask(segment_ids)
        x_BSD = self.encoder_embedder(
            source_tokens_BS, self.embedding, positions, rngs, is_token_BS
        )
        for layer in self.encoder_layers:
            x_BSD = self.config.call(layer, x_BSD, mask, self.encoder_positions, positions, rngs)
        return self.dropout(normed(self.encoder_norm, x_BSD), rngs=rngs)

    @automatic(
        lambda self, source_tokens_BS, **_: tuple(
            cross_cache_spec(layer.cross_attention, *spec(source_tokens_BS))
            for layer in self.decoder.layers
        )
    )
    def init_cross_cache(
        self, source_tokens_BS: Array, lengths_B: ArrayLike | None = None
    ) -> tuple[CrossCache, ...]:
        """Encodes the source and projects it for every decoder layer, once a decode.

        Args:
          source_tokens_BS: source ids, padded on the right.
          lengths_B: how many of each row are real; all when None.

        Raises:
          ValueError: shapes that do not fit, or lengths outside `0 .. S`. Under `jax.jit`, where
            lengths are not known, all that such a row is decoded to is NaN instead.
        """
        source_tokens_BS = as_integers("source_tokens_BS", source_tokens_BS)
        batch, length = source_tokens_BS.shape
        if lengths_B is None:
            lengths_B = jnp.full(batch, length)
        lengths_B = as_integers("lengths_B", lengths_B)
        if lengths_B.shape != (batch,):
            raise ValueError(f"lengths_B must have shape ({batch},), not {lengths_B.shape}")
        is_wrong_B1 = check_lengths(lengths_B, length)[:, None]
        is_token_BS = padding_mask(lengths_B, length)[:, 0, 0] | is_wrong_B1
        memory_BSD = self.encode(source_tokens_BS, segment_ids=is_token_BS.astype(jnp.int32))
        memory_BSD = spoil(memory_BSD, is_wrong_B1)
        return tuple(
            layer.cross_attention.init_cross_cache(memory_BSD, is_token_BS)
            for layer in self.decoder.layers
        )

    @automatic(lambda self, tokens_BT, cache, **_: _specs(self.softmax_weight, tokens_BT, cache))
    def prefill(
        self,
        tokens_BT: Array,
        cache: tuple[SelfCache, ...],
        cross: tuple[CrossCache, ...],
        lengths_B: ArrayLike | None = None,
    ) -> tuple[Array, tuple[SelfCache, ...]]:
        """`T` more target tokens a row behind those in the cache, padded on the right.

        Args:
          tokens_BT: target ids, the first of a sentence being the beginning-of-sentence id.
          cache: from `init_cache` or an earlier call.
          cross: from `init_cross_cache`.
          lengths_B: how many of the `T` are real; all when None.

        Returns:
          logits of the token behind each, `[B, T, V]` float32, and the new cache. Under `jax.jit`
          logits that nobody reads are not computed.
        """
        x_BTD, cache = self.decoder.extend(tokens_BT, self.embedding, cache, cross, lengths_B)
        return self._logits(x_BTD), cache

    @automatic(lambda self, tokens_B, cache, **_: _specs(self.softmax_weight, tokens_B, cache))
    def decode(
        self, tokens_B: Array, cache: tuple[SelfCache, ...], cross: tuple[CrossCache, ...]
    ) -> tuple[Array, tuple[SelfCache, ...]]:
        """One decode step: the next token of every row to logits `[B, V]` and the new cache.

        `cross` may have fewer rows, as `Attention.decode` describes (beams share their source).
        """
        tokens_B = as_integers("tokens_B", tokens_B)
        logits_BTV, cache = self.prefill(tokens_B[:, None], cache, cross)
        return logits_BTV[:, 0], cache


class DecoderOnly(_Model):
    """The language model of the paper's section 4.3: a decoder alone, softmax weights of its own.

    Args:
      config: the sizes.
      rngs: where the weights' initial values come from.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, False, False, rngs)

    @automatic(lambda self, inputs_BT, **_: logits_spec(self.softmax_weight, *spec(inputs_BT)))
    def __call__(
        self,
        inputs_BT: Array,
        *,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Array:
        """Logits of every next token, `[B, T, V]` float32; arguments as for `EncoderDecoder`."""
        x_BTD = self.decoder(inputs_BT, self.embedding, positions, segment_ids, rngs=rngs)
        return self._logits(x_BTD)

    @automatic(lambda self, tokens_BT, cache, **_: _specs(self.softmax_weight, tokens_BT, cache))
    def prefill(
        self,
        tokens_BT: Array,
        cache: tuple[SelfCache, ...],
        lengths_B: ArrayLike | None = None,
    ) -> tuple[Array, tuple[SelfCache, ...]]:
        """As `EncoderDecoder.prefill`, without a source."""
        no_memory = (None,) * len(self.decoder.layers)
        x_BTD, cache = self.decoder.extend(tokens_BT, self.embedding, cache, no_memory, lengths_B)
        return self._logits(x_BTD), cache

    @automatic(lambda self, tokens_B, cache, **_: _specs(self.softmax_weight, tokens_B, cache))
    def decode(
        self, tokens_B: Array, cache: tuple[SelfCache, ...]
    ) -> tuple[Array, tuple[SelfCache, ...]]:
        """One decode step: the next token of every row to logits `[B, V]` and the new cache."""
        tokens_B = as_integers("tokens_B", tokens_B)
        logits_BTV, cache = self.prefill(tokens_B[:, None], cache)
        return logits_BTV[:, 0], cache


def _specs(weight_VD: nnx.Param, tokens: Array, cache: tuple[SelfCache, ...]) -> tuple:
    return logits_spec(weight_VD, *spec(tokens)), jax.tree.map(spec, cache)


Model = EncoderDecoder | DecoderOnly

MODELS: Mapping[str, type[Model]] = {"translation": EncoderDecoder, "language_model": DecoderOnly}


def build_model(task: str, model: Mapping[str, Any], *, rngs: nnx.Rngs) -> Model:
    """The model of a config: `config.task` and `config.model`.

    Raises:
      ValueError: an unknown task, or a field that `TransformerConfig` does not have.
    """
    if task not in MODELS:
        raise ValueError(f"task={task!r} is not one of {sorted(MODELS)}")
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    if unknown := sorted(set(model) - known):
        raise ValueError(f"config.model has unknown fields {unknown}; known are {sorted(known)}")
    return MODELS[task](TransformerConfig(**model), rngs=rngs)

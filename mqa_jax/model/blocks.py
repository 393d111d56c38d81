"""Residual blocks and the stacks of them.

By default pre-norm blocks without biases and learned positions (Shazeer 2019, section 4.1, and its
published code base); the other kinds are those that `TransformerConfig` names.

Array letters:
  B batch   S source length   T target length   D model dim   V vocabulary   L layers
"""

import functools
from collections.abc import Callable, Mapping

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from mqa_jax.attention.cache import CrossCache
from mqa_jax.attention.masks import padding_mask, segment_mask, without_padding
from mqa_jax.attention.module import Attention, SelfCache
from mqa_jax.attention.positions import RelativeBias, sinusoids
from mqa_jax.core.arrays import as_integers
from mqa_jax.core.checks import check_integer
from mqa_jax.core.dropout import Dropout
from mqa_jax.core.norms import Norm
from mqa_jax.core.sharding import over_batch
from mqa_jax.model.config import TransformerConfig
from mqa_jax.model.layers import Embedding, FeedForward


class _Embedder(nnx.Module):
    """Positions added to token vectors. The token table is passed in, since models share it."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        sizes = config.max_length, config.d_model
        is_learned = config.positions == "learned"
        self.positions = (
            Embedding(*sizes, axes="PD", rngs=rngs, **config.dtypes) if is_learned else None
        )
        self.dropout = Dropout(config.dropout_rate)
        self.config = config

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
        shape, max_length = tokens_BT.shape, self.config.max_length
        if positions_BT is None:
            if tokens_BT.shape[1] > max_length:
                raise ValueError(
                    f"{tokens_BT.shape[1]} tokens in a row, but the model knows {max_length} "
                    "positions: shorten the input, or train with a larger max_length"
                )
            positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        positions_BT = as_integers("positions_BT", positions_BT)
        _check_shape("positions", positions_BT, shape)
        x_BTD = table(tokens_BT)
        if self.config.embedding_scale != 1:
            x_BTD *= jnp.asarray(self.config.embedding_scale, x_BTD.dtype)
        if self.positions is not None:
            x_BTD += self.positions(positions_BT)
        elif self.config.positions == "sinusoidal":
            table_PD = jnp.asarray(sinusoids(max_length, x_BTD.shape[2]), x_BTD.dtype)
            # One that the table does not have is NaN, as of learned positions.
            is_known_BT = (positions_BT >= 0) & (positions_BT < max_length)
            added_BTD = table_PD[jnp.where(is_known_BT, positions_BT, 0)]
            x_BTD += jnp.where(is_known_BT[..., None], added_BTD, jnp.nan)
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


def normed(norm: Norm | None, x_BTD: Array) -> Array:
    """Behind a stack, whose last norm may be its last layer's."""
    return x_BTD if norm is None else norm(x_BTD)


class _Layer(nnx.Module):
    """Sublayers, and how each adds to what comes in. The subclasses say what the sublayers see."""

    attention: Attention
    attention_norm: Norm
    feed_forward: FeedForward

    def __init__(
        self,
        config: TransformerConfig,
        sublayers: Mapping[str, Callable[[], nnx.Module]],
        rngs: nnx.Rngs,
    ):
        has_one_norm = config.block == "parallel" and config.parallel_norms == 1
        for name, build in sublayers.items():
            if not (has_one_norm and name == "feed_forward"):
                setattr(self, f"{name}_norm", config.layer_norm(rngs))
            setattr(self, name, build())
            if config.block == "sandwich":
                setattr(self, f"{name}_post_norm", config.layer_norm(rngs))
        self.dropout = Dropout(config.dropout_rate)
        self.block = config.block

    def _run(
        self, x_BTD: Array, sublayers: Mapping[str, Callable[[Array], Array]], rngs: nnx.Rngs | None
    ) -> Array:
        """The output for `x_BTD`, from the sublayers in front of the feed-forward one."""
        drop = functools.partial(self.dropout, rngs=rngs)
        feed_forward: Callable[[Array], Array] = functools.partial(self.feed_forward, rngs=rngs)
        if self.block == "parallel":
            y_BTD = self.attention_norm(x_BTD)
            z_BTD = self.feed_forward_norm(x_BTD) if hasattr(self, "feed_forward_norm") else y_BTD
            return x_BTD + drop(sublayers["attention"](y_BTD)) + drop(feed_forward(z_BTD))
        for name, sublayer in {**sublayers, "feed_forward": feed_forward}.items():
            norm = getattr(self, f"{name}_norm")
            if self.block == "post":
                x_BTD = norm(x_BTD + drop(sublayer(x_BTD)))
                continue
            y_BTD = drop(sublayer(norm(x_BTD)))
            if self.block == "sandwich":
                y_BTD = getattr(self, f"{name}_post_norm")(y_BTD)
            x_BTD += y_BTD
        return x_BTD


class _EncoderLayer(_Layer):
    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        sublayers = {
            "attention": lambda: config.attention(rngs, config.encoder_kv_heads),
            "feed_forward": lambda: config.feed_forward(rngs),
        }
        super().__init__(config, sublayers, rngs)

    def __call__(
        self,
        x_BSD: Array,
        mask: Array | None,
        bias: RelativeBias | None,
        positions_BS: ArrayLike | None,
        rngs: nnx.Rngs | None,
    ) -> Array:
        attend = functools.partial(
            self.attention, mask=mask, bias=bias, positions_BT=positions_BS, rngs=rngs
        )
        return self._run(x_BSD, {"attention": attend}, rngs)


class _DecoderLayer(_Layer):
    cross_attention: Attention

    def __init__(
        self, config: TransformerConfig, window: int | None, has_memory: bool, rngs: nnx.Rngs
    ):
        sublayers: dict[str, Callable[[], nnx.Module]] = {
            "attention": lambda: config.attention(rngs, window=window)
        }
        if has_memory:
            sublayers["cross_attention"] = lambda: config.attention(
                rngs, config.cross_kv_heads, has_positions=False
            )
        sublayers["feed_forward"] = lambda: config.feed_forward(rngs)
        super().__init__(config, sublayers, rngs)

    def __call__(
        self,
        x_BTD: Array,
        memory_BSD: Array | None,
        mask: Array | None,
        memory_mask: Array | None,
        bias: RelativeBias | None,
        positions_BT: ArrayLike | None,
        rngs: nnx.Rngs | None,
    ) -> Array:
        """Training: the whole sequence at once."""
        sublayers: dict[str, Callable[[Array], Array]] = {
            "attention": functools.partial(
                self.attention,
                mask=mask,
                bias=bias,
                positions_BT=positions_BT,
                is_causal=True,
                rngs=rngs,
            )
        }
        if memory_BSD is not None:
            sublayers["cross_attention"] = functools.partial(
                self.cross_attention, memory_BSD=memory_BSD, mask=memory_mask, rngs=rngs
            )
        return self._run(x_BTD, sublayers, rngs)

    def extend(
        self,
        x_BTD: Array,
        cache: SelfCache,
        cross: CrossCache | None,
        lengths_B: ArrayLike | None,
        bias: RelativeBias | None,
    ) -> tuple[Array, SelfCache]:
        """Decoding: `T` more tokens behind those in the cache."""

        def attend(y_BTD: Array) -> Array:
            nonlocal cache
            y_BTD, cache = self.attention.prefill(y_BTD, cache, lengths_B, bias=bias)
            return y_BTD

        sublayers = {"attention": attend}
        if cross is not None:
            sublayers["cross_attention"] = lambda y_BTD: self.cross_attention.decode(y_BTD, cross)[
                0
            ]
        return self._run(x_BTD, sublayers, None), cache


class _Decoder(nnx.Module):
    """The stack of decoder layers, between embedded tokens and what the softmax product takes."""

    def __init__(self, config: TransformerConfig, has_memory: bool, rngs: nnx.Rngs):
        self.embedder = _Embedder(config, rngs)
        self.layers = nnx.List(
            [_DecoderLayer(config, window, has_memory, rngs) for window in config.windows]
        )
        self.positions = config.relative_bias(rngs, bidirectional=False)
        self.norm = None if config.block == "post" else config.layer_norm(rngs)
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
            x_BTD = self.config.call(
                layer, x_BTD, memory_BSD, mask, memory_mask, self.positions, positions_BT, rngs
            )
        return self.dropout(normed(self.norm, x_BTD), rngs=rngs)

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
            x_BTD, layer_cache = layer.extend(
                x_BTD, layer_cache, layer_cross, lengths_B, self.positions
            )
            new_cache.append(layer_cache)
        return normed(self.norm, x_BTD), tuple(new_cache)

    def init_cache(
        self, batch: int, length: int, dtype: DTypeLike | None = None
    ) -> tuple[SelfCache, ...]:
        length = check_integer("length", length)
        max_length = self.config.max_length
        if length > max_length:
            raise ValueError(
                f"a cache of {length} tokens, but the model knows {max_length} positions: ask for "
                "fewer tokens, or train with a larger max_length"
            )
        return tuple(layer.attention.init_cache(batch, length, dtype) for layer in self.layers)

"""The families of encoder-decoders: their keys and our options."""

from typing import Any

from mqa_jax.attention.positions import FARTHEST
from mqa_jax.hub import names
from mqa_jax.hub.family import MOST_LAYERS, Family, Fields, even, written
from mqa_jax.hub.keys import Keys
from mqa_jax.model.config import TransformerConfig

_T5_SIZES = dict(
    vocab_size="vocab_size",
    d_model="d_model",
    d_ff="d_ff",
    num_encoder_layers="num_layers",
    num_heads="num_heads",
    head_dim="d_kv",
)


def _read_t5(keys: Keys, sizes: Fields) -> Fields:
    is_mt5 = keys.text("model_type") == "mt5"
    projection = keys.text("feed_forward_proj", "gated-gelu" if is_mt5 else "relu")
    activation = projection.removeprefix("gated-")
    if projection == "gated-gelu":
        activation = "gelu_new"
    # Of a mT5 the one key says nothing, and the other it does not have.
    is_scaled = keys.flag("scale_decoder_outputs", keys.flag("tie_word_embeddings", True))
    is_scaled = is_scaled and not is_mt5
    return dict(
        num_layers=keys.integer(
            "num_decoder_layers", sizes["num_encoder_layers"], most=MOST_LAYERS
        ),
        num_kv_heads=sizes["num_heads"],
        # It has no longest length; this is the usual one.
        max_length=512,
        norm_epsilon=keys.number("layer_norm_epsilon", 1e-6),
        positions="relative",
        relative_buckets=keys.integer("relative_attention_num_buckets", 32),
        relative_distance=keys.integer("relative_attention_max_distance", 128, most=FARTHEST),
        attention_scale=1.0,
        activation=keys.known_activation(
            "feed_forward_proj", keys.text("dense_act_fn", activation)
        ),
        gated=keys.flag("is_gated_act", projection.startswith("gated-")),
        tied_softmax=is_scaled,
        logits_scale=sizes["d_model"] ** -0.5 if is_scaled else 1.0,
    )


def _write_t5(config: TransformerConfig) -> Fields:
    activation = written(config.activation, gelu_tanh="gelu_new")
    is_scaled = config.logits_scale != 1.0
    return dict(
        num_decoder_layers=config.num_layers,
        layer_norm_epsilon=config.norm_epsilon,
        relative_attention_num_buckets=config.relative_buckets,
        relative_attention_max_distance=config.relative_distance,
        feed_forward_proj=("gated-" if config.gated else "")
        + ("gelu" if config.gated and activation == "gelu_new" else activation),
        dense_act_fn=activation,
        is_gated_act=config.gated,
        # To version 4 this says whether logits are scaled, to version 5 the other one does.
        tie_word_embeddings=is_scaled,
        scale_decoder_outputs=is_scaled,
        is_encoder_decoder=True,
    )


_MARIAN_SIZES = dict(
    vocab_size="vocab_size",
    d_model="d_model",
    d_ff="decoder_ffn_dim",
    num_layers="decoder_layers",
    num_encoder_layers="encoder_layers",
    num_heads="decoder_attention_heads",
    max_length="max_position_embeddings",
)


def _read_marian(keys: Keys, sizes: Fields) -> Fields:
    same = dict(
        encoder_ffn_dim=sizes["d_ff"],
        encoder_attention_heads=sizes["num_heads"],
        decoder_vocab_size=sizes["vocab_size"],
    )
    keys.only(same, "encoder and decoder must be alike, here")
    is_scaled = keys.flag("scale_embedding", False)
    return dict(
        num_kv_heads=sizes["num_heads"],
        head_dim=even(keys, "d_model", "decoder_attention_heads"),
        norm="layer",
        norm_epsilon=1e-5,
        block="post",
        positions="sinusoidal",
        bias=("qkv", "out", "mlp", "logits"),
        activation=keys.activation("activation_function", "gelu"),
        embedding_scale=sizes["d_model"] ** 0.5 if is_scaled else 1.0,
    )


def _write_marian(config: TransformerConfig) -> Fields:
    return dict(
        encoder_ffn_dim=config.d_ff,
        encoder_attention_heads=config.num_heads,
        decoder_vocab_size=config.vocab_size,
        activation_function=written(config.activation, silu="swish"),
        scale_embedding=config.embedding_scale != 1.0,
        share_encoder_decoder_embeddings=True,
        # About all tables together; that the softmax has one of its own, its tensor tells.
        tie_word_embeddings=True,
        is_encoder_decoder=True,
    )


# Of old files; it was never used.
_CROSS_BIAS = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
_T5_LIKE: dict[str, Any] = dict(
    sizes=_T5_SIZES,
    read=_read_t5,
    write=_write_t5,
    names=names.t5,
    task="translation",
    tables=("decoder.embed_tokens.weight", "encoder.embed_tokens.weight"),
    ignored={_CROSS_BIAS: None},
    says_tied=False,
    only=dict(is_encoder_decoder=True),
)

TRANSLATORS = (
    Family("t5", "T5ForConditionalGeneration", **_T5_LIKE),
    Family("mt5", "MT5ForConditionalGeneration", is_tied=False, **_T5_LIKE),
    Family(
        "marian",
        "MarianMTModel",
        sizes=_MARIAN_SIZES,
        read=_read_marian,
        write=_write_marian,
        names=names.marian,
        task="translation",
        head="model.",
        tables=("model.decoder.embed_tokens.weight", "model.encoder.embed_tokens.weight"),
        ignored={r"model\.(en|de)coder\.embed_positions\.weight": None},
        only=dict(
            share_encoder_decoder_embeddings=True,
            static_position_embeddings=True,
            normalize_before=False,
            add_final_layer_norm=False,
            normalize_embedding=False,
        ),
    ),
)
